"""Settings for every command: defaults < preset files < command line. A preset is a YAML file (nested by section, or
flat) or a Python file of flat assignments as in nanoGPT. If the first preset is a Python file, the defaults are
nanoGPT's: such files are written for train.py. Files and command line are merged as {leaf name: text} and parsed once
by tyro with the types of config.py, so a value means the same in every place."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import io
import itertools
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

from .completion import completion_script, completion_shell
from .config import Config
from .errors import UserError, one_line
from .help_text import help_text
from .setting_text import as_text, literal_values, union_members
from .settings import did_you_mean, flatten, leaf_types, leaves_by_section

PACKAGE = Path(__file__).resolve().parent
ROOTS = (PACKAGE.parent.parent, PACKAGE / "_presets")  # a checkout, an installed package
COMMAND_LINE = "command line"
HELP_FLAGS = ("-h", "--help", "--help-all", "--help_all")
HELP_OPTIONS = {
    "-h, --help": "Show this help.",
    "--version": "Print the version.",
    "--completion {bash,zsh}": "Print a completion script.",
}
SYNONYMS = {  # what other programs call our settings
    "lr": "learning_rate", "steps": "max_iters", "iters": "max_iters", "layers": "n_layer", "heads": "n_head",
    "context": "block_size", "resume": "init_from=resume --out_dir=RUN", "data": "dataset", "output": "out_dir",
    "model": "init_from", "prompt": "start", "length": "max_new_tokens", "max_tokens": "max_new_tokens",
    "num_epochs": "epochs",
}  # fmt: skip
MAX_PRESET, MAX_BRACKETS = 1 << 16, 1 << 8  # limits of a YAML preset; ours have about 50 lines
T = TypeVar("T")


@dataclass
class Parsed(Generic[T]):
    """The settings of one call of a command."""

    tree: T
    sources: dict[str, str] = field(default_factory=dict)
    """Leaf name -> the preset file or "command line" that set it. Defaults are absent."""
    positionals: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    """The presets, in the order they were read."""

    def on_command_line(self, name: str) -> bool:
        return self.sources.get(name) == COMMAND_LINE


def parse(
    tree_type: type[T], argv: list[str], *, prog: str, description: str = "",
    defaults: dict[str, Any] | None = None, presets: bool = True, base_preset: str | None = None,
    common: Sequence[str] = (), shown: Callable[[dict[str, Any], list[Path]], dict[str, str]] | None = None,
    own: dict[str, str] = {},  # noqa: B006
) -> Parsed[T]:  # fmt: skip
    """Reads a command line into a dataclass tree. defaults: defaults of this command by leaf name, in place of
    the tree's. presets: arguments without dashes are preset files (else they are returned as positionals). base_preset:
    the preset to use if none is given; with it, a Python file as the first preset starts from nanoGPT's defaults.
    `--help` prints the settings in common, or all if common is empty, `--help_all` all, with the values that this
    command line gives them, and exits. shown: from the settings and the presets to texts that it prints instead of a
    default. own: {option: help} of options that the command reads itself, for `--help_all`. {presets} in description
    becomes a line for each. `--completion SHELL` prints a script. Raises UserError: unknown name (with the nearest),
    wrong type, missing or unreadable preset."""
    if argv and argv[0].partition("=")[0] == "--completion":
        shell, command = completion_shell(argv), partial(_tyro, tree_type, _command(prog))
        print(completion_script(command, shell, _presets() if base_preset else {}))
        raise SystemExit(0)
    leaves = leaf_types(tree_type)
    wanted = next((arg for arg in argv if arg in HELP_FLAGS), None)
    options, words = _split([arg for arg in argv if arg not in HELP_FLAGS], leaves, leaves_by_section(tree_type))
    names = words if presets else []
    files = [find_preset(name) for name in names or ([base_preset] if base_preset else [])]
    if base_preset and files[0].suffix == ".py":
        defaults = {**(defaults or {}), **nanogpt_defaults()}
    settings: dict[str, Any] = flatten(tree_type()) | (defaults or {})
    merged: dict[str, str] = {name: as_text(name, value, leaves) for name, value in (defaults or {}).items()}
    sources: dict[str, str] = {}
    for path in files:
        values = _read_yaml(path, leaves) if path.suffix != ".py" else _read_python(path, settings, leaves)
        for key, value in values.items():
            merged[key], settings[key], sources[key] = as_text(key, value, leaves, path), value, str(path)
    for key, text in options.items():
        merged[key], settings[key], sources[key] = as_text(key, text, leaves), text, COMMAND_LINE
    if wanted:
        for key, text in options.items():
            with contextlib.suppress(ValueError, SyntaxError):  # a word
                settings[key] = ast.literal_eval(text)
        notes = {name: text for name, text in (shown(settings, files) if shown else {}).items() if name not in sources}
        is_short = wanted in ("-h", "--help")
        options = {"-h, --help": HELP_OPTIONS["-h, --help"]} if is_short else HELP_OPTIONS | own
        text = _described(prog, description, is_short and bool(common))
        print(help_text(tree_type, settings, notes, common if is_short else (), prog, text, options))
        raise SystemExit(0)
    tree = _read(tree_type, merged, sources, prog)
    return Parsed(tree, sources, [] if presets else words, [str(path) for path in files])


def _command(prog: str) -> str:
    """A usage line, such as "llm-inspect DATASET" or "llm-train [PRESET ...]", without its arguments."""
    return re.split(r" (?=[\[A-Z])", prog)[0]


def _described(prog: str, description: str, is_short: bool) -> str:
    if is_short:
        description += f"\n\n{_command(prog)} --help-all lists every setting."
    if "{presets}" in description:
        lines = (f"  {name:<14} {text}" for name, text in _presets().items())
        description = description.replace("{presets}", "\n".join(lines))
    return description


def _presets() -> dict[str, str]:
    """{preset in configs/: the first sentence of its first comment}."""
    folder = next(path for root in ROOTS if (path := root / "configs").is_dir())
    firsts = {path.stem: path.read_text(encoding="utf-8").partition("\n")[0] for path in sorted(folder.glob("*.yaml"))}
    return {name: line.lstrip("# ").partition(". ")[0] for name, line in firsts.items()}


def build(tree_type: type[T], values: dict[str, Any]) -> T:
    """A tree with the given leaves (nested by section, or flat). Raises UserError as parse() does."""
    leaves = leaf_types(tree_type)
    flat = _flatten_sections(values, leaves, "the settings")
    return _read(tree_type, {key: as_text(key, value, leaves) for key, value in flat.items()}, {}, "settings")


def preset(*names: str, **settings: Any) -> Config:
    """The settings of these presets (files or names; default: llm-train's settings) with the given settings applied:
    preset("quick", dataset="book", max_iters=200). max_iters replaces a preset's epochs. Raises UserError as parse()
    does."""
    for name in names:
        if not isinstance(name, (str, Path)) or str(name).startswith("-"):
            raise UserError(f"{name!r} is not a preset: expected names or files, and settings as NAME=VALUE")
    config = parse(Config, [str(name) for name in names], prog="preset", base_preset="default").tree
    given = {name for name in ("epochs", "max_iters") if settings.get(name) is not None}
    if len(given) == 2:
        raise UserError("epochs and max_iters both set the length of the run; remove one")
    length = {"epochs": None} if "max_iters" in given else {"lr_decay_iters": None} if given else {}
    return build(Config, flatten(config) | length | settings)


def nanogpt_defaults() -> dict[str, Any]:
    """The settings of config/train_nanogpt.py: nanoGPT's defaults if they are not Config's."""
    path = next(path for root in ROOTS if (path := root / "config" / "train_nanogpt.py").is_file())
    return _read_python(path, {}, leaf_types(Config))


def find_preset(name: str) -> Path:
    """The file of a preset, given as a path or as a bare name in configs/ or config/ (here or in the package)."""
    given = Path(name)
    roots, candidates = [Path("."), *ROOTS], [given]
    if given.suffix in (".yaml", ".yml", ".py"):
        candidates += [root / given for root in ROOTS]
    else:
        candidates += [root / "configs" / f"{name}.yaml" for root in roots]
        candidates += [root / "config" / f"{name}.py" for root in ROOTS]
    if found := next(filter(Path.is_file, candidates), None):
        return found
    known = sorted({p.stem for root in roots for p in [*root.glob("configs/*.yaml"), *root.glob("config/*.py")]})
    hint = did_you_mean(given.stem, known, f"available: {', '.join(known)}")
    if given.name and given.is_dir():
        hint = " or ".join(shlex.quote(f"--{kind}={name}") for kind in ("out_dir", "dataset")) + " names a folder"
    elif "=" in name:
        hint = f"did you mean {shlex.join([f'--{name}'])}?"
    elif given.name == name and any((Path(folder) / name).is_dir() for folder in ("data/processed", "data")):
        hint = f"to use the data of that name: {shlex.join([f'--dataset={name}'])}"
    raise UserError(f"no preset file {name!r}; {hint} (settings are written as --key=value)")


def _split(argv: list[str], leaves: dict[str, Any], sections: dict[str, set[str]]) -> tuple[dict[str, str], list[str]]:
    """Options by leaf name, and the other arguments."""
    options: dict[str, str] = {}
    words, rest = list[str](), list(argv)
    while rest:
        arg = rest.pop(0)
        if not arg.startswith("--"):
            if arg.startswith("-") and arg != "-":
                raise UserError(f"unknown setting {arg!r}: write --key=value; see --help")
            words.append(arg)
            continue
        key, equals, text = arg[2:].partition("=")
        key = key.replace("-", "_")
        section, _, leaf = key.rpartition(".")
        if section in sections:
            if leaf not in sections[section]:
                raise UserError(f"unknown setting --{one_line(key)}{_misplaced(leaf, section, sections)}")
            key = leaf
        if key not in leaves:
            raise UserError(f"unknown setting --{one_line(key)}{_nearest(key, leaves)}")
        if not equals:
            text = _value_of_bare(key, leaves[key], rest)
        options[key] = text
    return options, words


def _value_of_bare(key: str, hint: Any, rest: list[str]) -> str:
    """The value of `--key value`, or True for a bare `--flag`."""
    kinds, following = union_members(hint), rest[0] if rest else "--"
    if bool in kinds and following.lower() not in ("true", "false") and following not in literal_values(kinds):
        return "True"
    if following.startswith("--"):
        raise UserError(f"--{key} needs a value: --{key}=VALUE")
    return rest.pop(0)


def _read_yaml(path: Path, leaves: dict[str, Any]) -> dict[str, Any]:
    import yaml  # 20 ms that --help does not need

    try:
        with path.open("rb") as file:
            raw = file.read(MAX_PRESET + 1)
        if len(raw) > MAX_PRESET or raw.count(b"[") + raw.count(b"{") > MAX_BRACKETS:
            raise ValueError(f"too large for a preset: more than {MAX_PRESET} bytes or {MAX_BRACKETS} brackets")
        text = raw.decode("utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise ValueError("it uses an alias (*name); write the value instead")  # nested aliases grow to gigabytes
        content = yaml.safe_load(text)
        if path.suffix not in (".yaml", ".yml") and not isinstance(content, dict):
            raise ValueError
    except Exception as error:  # YAMLError, or ValueError for an impossible date or number
        if path.suffix not in (".yaml", ".yml"):
            first = shlex.join(["llm-prepare", str(path)])
            raise UserError(f"{path} is not a preset (a YAML or Python file); to train on a text: {first}") from None
        raise UserError(f"cannot read the preset {path}: {one_line(error, 300)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} must contain settings as key: value, got {type(content).__name__}")
    # a preset may also have settings of other commands
    flat = _flatten_sections(content, leaf_types(Config) | leaves, str(path))
    return {key: value for key, value in flat.items() if key in leaves}


def _flatten_sections(content: dict[str, Any], leaves: dict[str, Any], where: str) -> dict[str, Any]:
    """{section: {leaf: value}} or {leaf: value} as {leaf: value}. Refuses unknown names and wrong sections."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if key in _SECTIONS and isinstance(value, (dict, type(None))):
            for leaf, leaf_value in (value or {}).items():
                if leaf not in _SECTIONS[key]:
                    hint = _misplaced(str(leaf), key, _SECTIONS)
                    raise UserError(f"unknown setting {one_line(key)}.{one_line(leaf)} in {where}{hint}")
                flat[leaf] = leaf_value
        elif key in leaves:
            flat[key] = value
        else:
            raise UserError(f"unknown setting {one_line(key)} in {where}{_nearest(str(key), leaves)}")
    return flat


def _read_python(path: Path, settings: dict[str, Any], leaves: dict[str, Any]) -> dict[str, Any]:
    """Runs a Python preset as nanoGPT does, with the settings so far as its globals."""
    known = flatten(Config())
    before = {**known, **settings}
    names: dict[str, Any] = {**before, "__file__": str(path), "__name__": "__preset__"}
    try:
        source = ast.parse(path.read_text(encoding="utf-8"), str(path))
        code = compile(source, str(path), "exec")
        # The only place that runs code from a file, which the user named on the command line.
        exec(code, names)
    except (Exception, SystemExit) as error:
        raise UserError(f"the preset {path} failed: {type(error).__name__}: {one_line(error)}") from None
    assigned = {n.id for n in ast.walk(source) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    values: dict[str, Any] = {}
    for name, value in names.items():
        if name.startswith("__") or not isinstance(value, (int, float, str, list, tuple, dict, type(None))):
            continue
        if name in leaves and (name in assigned or value is not before.get(name)):
            values[name] = value
        elif name not in before and not name.startswith("_"):
            # a helper variable is fine, a misspelt setting is not
            if hint := did_you_mean(name, [*leaves, *known], "", similarity=0.85):
                raise UserError(f"unknown setting {one_line(name)} in {path}; {hint}")
    return values


_SECTIONS = leaves_by_section(Config)


def _misplaced(leaf: str, section: str, sections: dict[str, set[str]]) -> str:
    owner = next((name for name, leaves in sections.items() if leaf in leaves), None)
    return f": it belongs to section {owner}" if owner else _nearest(leaf, sections[section])


def _nearest(name: str, known: Any) -> str:
    if (meant := SYNONYMS.get(name, "")).partition("=")[0] in known:
        return f"; did you mean --{meant}?"
    return f"; {did_you_mean(name, known, 'see --help-all')}"


def _tyro(tree_type: type, prog: str, words: list[str]) -> Any:
    import tyro  # a quarter of the time of --help, which does not need it

    ways = (tyro.conf.FlagConversionOff, tyro.conf.OmitArgPrefixes, tyro.conf.UsePythonSyntaxForLiteralCollections)
    return tyro.cli(tree_type, args=words, prog=prog, use_underscores=True, config=ways)


def _read(tree_type: type[T], merged: dict[str, str], sources: dict[str, str], prog: str) -> T:
    """A tree with these settings. tyro is given a group of just these fields, because its time grows with their number:
    50 ms for all settings of a run."""
    types, tree = leaf_types(tree_type), tree_type()
    if not merged:
        return tree
    import tyro

    plain = tyro.conf.arg(help="")  # else it would search the source for a docstring
    group = dataclasses.make_dataclass("Settings", [(key, Annotated[types[key], plain]) for key in merged])
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(errors):
            found = _tyro(group, prog, [f"--{key}={text}" for key, text in merged.items()])
    except SystemExit:
        raise UserError(_one_line(errors.getvalue(), merged, sources, types)) from None
    owners = {leaf: getattr(tree, name) for name, leaves in leaves_by_section(tree_type).items() for leaf in leaves}
    for key in merged:
        setattr(owners.get(key, tree), key, getattr(found, key))
    return tree


def _one_line(box: str, merged: dict[str, str], sources: dict[str, str], types: dict[str, Any]) -> str:
    """tyro's message box as one line: the setting, its value and where it was set."""
    lines = filter(None, (line.strip().strip("│|").strip() for line in box.splitlines()[1:]))  # the first is a title
    blocks = itertools.groupby(lines, lambda line: set(line) <= set("╭╰╮╯─-"))
    text = next((" ".join(block) for is_rule, block in blocks if not is_rule), "")
    for key, value in merged.items():
        if re.search(rf"--{key}\b", text):
            expected = re.search(r"Expected one of (\(.*?\))|\bto be one of (\{.*?\})", text)
            reason = re.sub(r"^Error parsing --\w+: ", "", text)
            where = f" (set in {sources[key]})" if sources.get(key, COMMAND_LINE) != COMMAND_LINE else ""
            detail = f"expected one of {expected.group(1) or expected.group(2)}" if expected else reason
            kinds = union_members(types[key])
            if number := "a whole number" if int in kinds else "a number" if float in kinds else "":
                others = sorted(literal_values(kinds)) + ["None"] * (type(None) in kinds)
                detail = f"expected {' or '.join([number, *others])}"
            return f"{key}={value!r} is not valid{where}: {detail}"
    return text or "the settings could not be read"
