"""llm-train, llm-plan and nanoGPT's train.py."""

from __future__ import annotations

import contextlib
import gc
import os
import shlex
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from ..checkpoint.contents import is_dataset_name
from ..config import Config, GPTConfig
from ..errors import DamagedError, TrainingError, UserError, shared_by_all
from ..machine.budget import Budget, Deadline, parse_budget
from ..machine.files import read_json
from ..machine.processes import after_first, process_age
from ..machine.terminal import announce, drop_lost_output, note
from ..presets import COMMAND_LINE, HELP_FLAGS, Parsed, find_preset, nanogpt_defaults, parse
from ..settings import flatten, leaf_types, to_dict
from .common import command, data_prepared_last, explain_activation, need_data, not_named

# Settings that are not read from a checkpoint: the run's folder, and settings of this call only. A checkpoint may be
# untrusted, so it cannot switch on wandb or a mirror either.
NOT_INHERITED = {"out_dir", "init_from", "eval_only", "allow_new_data", "progress", "wandb_log", "mirror"}
# Whether a stored value may be used without naming it again: no path, and no tasks, which can run code.
HARMLESS: dict[str, Callable[[object], bool]] = {"dataset": is_dataset_name, "eval_tasks": lambda value: value is None}
OWN_FLAGS = {
    "print_config": "Print the resolved settings as a preset.",
    "dry_run": "Estimate time and memory. Nothing is trained or written.",
    "exportable": "With --budget: only models that transformers supports.",
}
OWN_VALUES = {  # name: (an example, its help)
    "budget": ("10min", "Run length: a time, FLOPs (1e15flops) or tokens (50Mtokens). Chooses all other settings."),
    "law": ("FILE.json", "With --budget: use this scaling law, written by llm-scale."),
    "cooldown": ("0.2", "Start a cool-down from --init_from=OUT_DIR/step-N. Its length: this fraction of N steps."),
    "gpu": ("h100", "GPU model of the machines."),
    "gpus": ("8", "GPUs per machine."),
    "nodes": ("4", "Number of machines."),
}
CLUSTER = ("gpu", "gpus", "nodes")  # options of llm-plan
COMMON = (
    "dataset", "out_dir", "init_from", "max_iters", "epochs", "batch_size", "learning_rate", "n_layer", "n_head",
    "n_embd", "block_size", "dropout", "eval_interval", "device", "seed",
)  # fmt: skip
HELP = """Trains a GPT, or resumes a run.

  llm-train --dataset=book --budget=10min     choose everything for 10 minutes
  llm-train quick --dataset=book --dry_run    estimate time and memory
  llm-train --init_from=resume --out_dir=out  resume a run
"""
NANOGPT_HELP = """Trains a GPT with nanoGPT's settings, or resumes a run.

  python train.py config/train_shakespeare_char.py            a preset
  python train.py config/train_shakespeare_char.py --dry_run  time and memory
  python train.py --init_from=resume --out_dir=out            resume a run
"""
PLAN_HELP = """Estimates time, memory and finish time of a run without training. The same as
llm-train --dry_run.

  llm-plan quick --dataset=book                    a new run
  llm-plan --init_from=resume --out_dir=out        the rest of a run
  llm-plan gpt2-124m --gpus=8 --gpu=h100 --nodes=4 the run on 4 x 8 GPUs
"""
PRESETS_HELP = """
PRESETs are files or these names. Later ones override earlier ones, and the
command line overrides all. Without a preset: {default}.

{presets}"""


def _main(argv: list[str], prog: str, nanogpt: bool = False, dry_run: bool = False) -> int:
    began = time.monotonic() - process_age(time.process_time())
    typed, (flags, values, argv) = argv, _own_options(argv, () if nanogpt else OWN_VALUES)
    if ("law" in values or flags["exportable"]) and "budget" not in values:
        raise UserError(
            f"--{'law' if 'law' in values else 'exportable'} needs --budget: add it, for example --budget=10min"
        )
    budget = parse_budget(values["budget"]) if "budget" in values else None
    defaults, base_preset = (nanogpt_defaults(), None) if nanogpt else (data_prepared_last(), "default")
    default = "nanoGPT's settings" if nanogpt else "default"
    text = PLAN_HELP if dry_run else NANOGPT_HELP if nanogpt else HELP
    text += PRESETS_HELP.replace("{default}", default)
    hidden = {"exportable", *OWN_VALUES} if nanogpt else set[str]() if dry_run else {*CLUSTER}
    own = {f"--{name}": about for name, about in OWN_FLAGS.items() if name not in hidden}
    own |= {f"--{name} {value}": about for name, (value, about) in OWN_VALUES.items() if name not in hidden}
    read = partial(parse, Config, prog=f"{prog} [PRESET ...]", description=text, common=COMMON, own=own)
    words = [arg for arg in argv if arg not in HELP_FLAGS]
    if words != argv:
        _print_help(argv, words, read, defaults, base_preset)
    parsed: Parsed[Config] = read(argv, defaults=defaults, base_preset=base_preset)
    from ..checkpoint.store import resolved_init  # --help does not need it

    training = parsed.tree.training
    writes = not (dry_run or any(flags.values()))
    resumes = training.init_from in ("resume", "auto") and not training.eval_only
    if training.mirror is not None and resumes and writes:
        parsed.tree.validate()
        from ..checkpoint.mirror import restore

        url, out_dir = training.mirror, Path(training.out_dir)
        after_first(lambda: restore(url, out_dir, note), parsed.tree.system.collective_timeout)
    begin = resolved_init(training.init_from, training.out_dir)
    # the dataset came from data_prepared_last: nanoGPT's defaults and its presets name openwebtext
    chosen = not (nanogpt or "dataset" in parsed.sources or parsed.files[0].endswith(".py"))
    cooldown: dict[str, Any] = {}
    if "cooldown" in values:
        begin, cooldown = "resume", _cooldown(parsed, values["cooldown"], writes)
    if begin == "resume":
        saved = _saved_settings(parsed.tree, parsed.sources, prog, typed)
        if saved is not None:
            chosen = False
            # the settings of the run replace the defaults; this call's settings override them
            parsed = read(argv, defaults={**defaults, **saved, **cooldown})
    config, deadline, is_auto = parsed.tree, None, parsed.tree.training.init_from == "auto"
    config.training.init_from = begin
    with shared_by_all():
        choose_length(parsed)
        config.validate()
    if asked := {name: values[name] for name in CLUSTER if name in values}:
        others = [*(values.keys() - asked.keys()), *(name for name in flags if flags[name] and name != "dry_run")]
        return _on_cluster(config, asked, dry_run or flags["dry_run"], others)
    if chosen and not flags["print_config"]:
        need_data(config.data.dataset)
    if budget is not None and begin == "resume":
        if not is_auto:
            raise UserError("--budget chooses the settings of a new run; to train a run longer, raise --max_iters")
        note("resuming with the settings that --budget chose when the run started")
    elif budget is not None:
        config, deadline = _dial(parsed, budget, began, flags["exportable"], values.get("law"))
    if flags["print_config"]:
        shown = to_dict(config)
        if config.training.epochs is not None:
            del shown["training"]["max_iters"]  # set by epochs; the output must be a valid preset
        import yaml  # --help does not need it

        print(yaml.safe_dump(shown, sort_keys=False, allow_unicode=True), end="")
        return 0
    from ..training.check import check

    check(config)  # before torch is imported, which takes seconds

    if flags["dry_run"] or dry_run:
        return _dry_run(parsed)
    gc.disable()  # torch's import creates many objects and hardly any garbage: 7% faster
    from ..training.trainer import train

    gc.enable()
    try:
        result = train(config, parsed.sources, prog, deadline=deadline)
        drop_lost_output()  # a full disk under the output costs lines, not the run
        speaks = config.logging.progress != "none" and os.environ.get("RANK", "0") == "0"
        if speaks and result.checkpoint is not None and not result.exit_code:
            sampler = "python sample.py" if nanogpt else "llm-chat" if _is_chat(result.checkpoint) else "llm-generate"
            announce(f"sample from it: {sampler} {shlex.join([f'--out_dir={result.out_dir}'])}")
        if speaks:
            explain_activation()
        return result.exit_code
    except TrainingError as error:
        drop_lost_output()
        note(f"error: {error}")
        return 1


def _is_chat(checkpoint: Path) -> bool:
    from ..core.tokenizer import META_FILE

    return (checkpoint / META_FILE).is_file() and "chat" in read_json(checkpoint / META_FILE)


def _print_help(
    argv: list[str], words: list[str], read: Callable[..., Parsed[Config]], defaults: dict[str, Any], base: str | None
) -> None:
    """Prints the help of argv, and exits. words: argv without the request for help. The defaults of a resumed run are
    its settings."""
    if any("init_from" in word for word in words):
        from ..checkpoint.store import resolved_init

        with contextlib.suppress(UserError):  # without a run, or with a mistake, the help is the general one
            parsed = read(words, defaults=defaults, base_preset=base)
            training = parsed.tree.training
            if resolved_init(training.init_from, training.out_dir) == "resume":
                defaults = {**defaults, **(_saved_settings(parsed.tree, dict.fromkeys(HARMLESS, ""), "", []) or {})}
                base = None

    def shown(settings: dict[str, Any], files: list[Path]) -> dict[str, str]:
        no_data = "dataset" not in defaults and base is not None and files[0].suffix != ".py"
        texts = {"dataset": "none found: run llm-prepare FILE"} if no_data else {}
        if settings["init_from"] not in ("scratch", "resume", "auto"):
            own = [item.name for item in fields(GPTConfig) if item.name not in ("block_size", "dropout")]
            texts |= dict.fromkeys(own, f"from {settings['init_from']}")
        return texts

    read(argv, defaults=defaults, base_preset=base, shown=shown)


def _own_options(argv: list[str], names: Collection[str]) -> tuple[dict[str, bool], dict[str, str], list[str]]:
    """Separates OWN_FLAGS and the options of these names from the settings of the run."""
    flags, values, rest, words = dict.fromkeys(OWN_FLAGS, False), dict[str, str](), list[str](), list(argv)
    while words:
        arg = words.pop(0)
        name, equals, value = arg.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        following = words[0] if words and not equals else "--"
        if not arg.startswith("--") or name not in (*flags, *names):
            rest.append(arg)
        elif name in flags:
            value = words.pop(0) if following.lower() in ("true", "false") else value
            if value.lower() not in ("", "true", "false"):
                raise UserError(f"--{name} must be True or False, got {value!r}")
            flags[name] = value.lower() != "false"
        elif not equals and following.startswith("--"):
            raise UserError(f"--{name} needs a value: --{name}={OWN_VALUES[name][0]}")
        else:
            values[name] = value if equals else words.pop(0)
    return flags, values, rest


def _dial(
    parsed: Parsed[Config], budget: Budget, began: float, exportable: bool, law: str | None
) -> tuple[Config, Deadline | None]:
    """The configuration that the budget chooses, and when the run ends. It prints what was chosen."""
    init_from = parsed.tree.training.init_from
    if init_from != "scratch":
        raise UserError(f"--budget chooses a new model, but init_from={init_from!r} gives one: remove one of them")
    from ..training.dial import dial  # torch takes seconds
    from ..training.law import read_law

    default, flat = str(find_preset("default")), flatten(parsed.tree)
    fixed = {name: flat[name] for name, source in parsed.sources.items() if source != default}
    found = dial(parsed.tree, fixed, budget, began, exportable, read_law(law) if law else None)
    parsed.tree = found.config
    if os.environ.get("RANK", "0") == "0" and found.config.logging.progress != "none":
        for line in found.lines:
            note(line)
    return found.config, found.deadline


def _cooldown(parsed: Parsed[Config], share: str, writes: bool) -> dict[str, Any]:
    """Prepares the run of --cooldown, and returns its settings. writes: whether the command may write."""
    given = [name for name in ("max_iters", "epochs", "schedule", "lr_decay_iters") if parsed.on_command_line(name)]
    if given or not writes:
        raise UserError(
            f"--cooldown sets the length and the schedule of a new run: remove --{(given or ['dry_run'])[0]}"
        )
    training = parsed.tree.training
    if training.init_from in ("scratch", "resume", "auto"):
        raise UserError("--cooldown begins at a step of a run: give its folder, --init_from=OUT_DIR/step-N")
    from ..training.branch import begin_cooldown

    try:
        number = float(share)
    except ValueError:
        raise UserError(f"cooldown={share!r} is not a number: give a fraction of the steps, such as 0.2") from None
    return begin_cooldown(training.init_from, training.out_dir, number)


def choose_length(parsed: Parsed[Any]) -> None:
    """Chooses between epochs and max_iters: the later one wins; both in one place are an error."""
    training, sources = parsed.tree.training, parsed.sources
    if training.epochs is None:
        return
    order = [*parsed.files, COMMAND_LINE]
    of_epochs, of_iters = sources.get("epochs"), sources.get("max_iters")
    if of_iters is not None and of_epochs == of_iters:
        raise UserError("epochs and max_iters both set the length of the run; remove one")
    if of_iters is not None and (of_epochs is None or order.index(of_iters) > order.index(of_epochs)):
        training.epochs = None
        return
    if sources.get("lr_decay_iters") not in (COMMAND_LINE, of_epochs):
        parsed.tree.scheduler.lr_decay_iters = None  # follows max_iters


def _saved_settings(config: Config, sources: dict[str, str], prog: str, argv: list[str]) -> dict[str, Any] | None:
    """The settings of the run in out_dir by leaf name; None for a nanoGPT checkpoint."""
    from ..checkpoint import store as checkpoints

    out_dir = Path(config.training.out_dir)
    for _, path in reversed(checkpoints.list_checkpoints(out_dir)):
        with contextlib.suppress(DamagedError, AttributeError):
            content = checkpoints.read_settings(path)
            flat = {leaf: value for section in content.values() for leaf, value in section.items()}
            break
    else:
        if checkpoints.find_checkpoint(out_dir, which="last").is_dir():  # raises if none is good
            raise UserError(f"the checkpoints in {out_dir} do not contain settings: choose another --out_dir")
        return None
    if named := {k: flat.get(k) for k, may in HARMLESS.items() if k not in sources and not may(flat.get(k))}:
        raise not_named(f"the run in {out_dir}", named, prog, argv)
    known = leaf_types(Config)
    return {k: v for k, v in flat.items() if k in known and k not in NOT_INHERITED and _is_plain(k, v)}


def _is_plain(name: str, value: Any) -> bool:
    """Whether a stored value may be used: neither a path, which is never followed, nor tasks."""
    if name in HARMLESS:
        return HARMLESS[name](value)
    return not (name == "start" and (str(value).startswith("FILE:") or value == "-"))


def _on_cluster(config: Config, asked: dict[str, str], is_plan: bool, others: list[str]) -> int:
    if not is_plan:
        raise UserError(f"--{next(iter(asked))} estimates a run on other machines: use it with llm-plan")
    if config.training.init_from not in ("scratch", "resume"):
        raise UserError(f"--{next(iter(asked))} needs --init_from=scratch or resume: remove --init_from")
    if others:
        raise UserError(f"--{others[0]} has no effect with --{next(iter(asked))}: remove one of them")
    from ..training.cluster import cluster_of, lines

    print("\n".join(lines(config, cluster_of(asked))))
    return 0


def _dry_run(parsed: Parsed[Config]) -> int:
    from ..training.forecast import forecast, lines
    from ..training.plan import describe
    from ..training.setup import make_plan

    plan = make_plan(parsed.tree, parsed.sources)
    print("\n".join(describe(plan)), flush=True)
    print("\n".join(lines(plan, forecast(plan))))
    print("dry run: nothing was trained, nothing was written")
    return 0


main = command(partial(_main, prog="llm-train"))
main_nanogpt = command(partial(_main, prog="python train.py", nanogpt=True))
main_plan = command(partial(_main, prog="llm-plan", dry_run=True))

if __name__ == "__main__":
    sys.exit(main())
