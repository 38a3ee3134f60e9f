"""train.py, llm-train, llm-eval, bench.py: what they print, what they refuse, and how fast they respond."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from llm_from_scratch.checkpoint.store import find_checkpoint, load_checkpoint
from llm_from_scratch.cli import bench, evaluate, train
from llm_from_scratch.config import Config
from llm_from_scratch.core.model import GPT
from llm_from_scratch.presets import nanogpt_defaults, parse
from llm_from_scratch.settings import flatten
from llm_from_scratch.training import forecast

from .. import forked
from ..tiny import LETTERS, TOKENIZER, arguments, babble, read_metrics, write_data

ROOT = Path(__file__).resolve().parents[4]
in_checkout = pytest.mark.skipif(not (ROOT / "train.py").is_file(), reason="the root scripts lie in a checkout only")
SMALL = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.fixture
def project(here: Path) -> Path:
    """A folder with data/tiny, in which the user stands."""
    write_data(here / "data" / "tiny")
    return here


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """A run's folder."""
    out = tmp_path_factory.mktemp("trained") / "run"
    assert train.main(arguments(dataset=tiny_data, out_dir=out)) == 0
    return out


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


# --- training ---


@in_checkout
def test_train_py_prints_the_lines_that_scripts_parse(project: Path) -> None:
    settings = arguments(dataset="tiny", max_iters=6, eval_interval=3, final_eval=True)
    done = forked.run(str(ROOT / "train.py"), *settings)
    assert done.returncode == 0 and done.stderr == ""
    assert "\x1b" not in done.stdout and "\r" not in done.stdout
    iters = re.findall(r"^iter (\d+): loss (\d+\.\d{4}), time \d+\.\d\dms, mfu (-?\d+\.\d\d)%$", done.stdout, re.M)
    steps = re.findall(r"^step (\d+): train loss (\d+\.\d{4}), val loss (\d+\.\d{4})$", done.stdout, re.M)
    assert [int(n) for n, *_ in iters] == [0, 1, 2, 3, 4, 5, 6]  # nanoGPT's inclusive count
    assert [float(mfu) >= 0 for *_, mfu in iters] == [False] * 5 + [True] * 2  # nanoGPT's first five are -100%
    assert [int(n) for n, *_ in steps] == [0, 3, 6]  # and no evaluation after the last step of nanoGPT's
    logged = {e["step"]: e["loss"] for e in read_metrics(project / "out") if "loss" in e}
    assert {int(n): float(loss) for n, loss, _ in iters} == {n: round(loss, 4) for n, loss in logged.items()}
    assert done.stdout.splitlines()[-1] == "sample from it: python sample.py --out_dir=out"
    assert load_checkpoint(find_checkpoint("out")).step == 7


def test_llm_train_ends_at_max_iters_and_resumes_by_name(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(arguments(dataset="tiny", dropout=0.25)) == 0
    assert find_checkpoint("out").name == "step-00000008"
    assert "sample from it: llm-generate --out_dir=out" in capsys.readouterr().out
    # the run's own settings come back from the checkpoint, not from the presets
    assert train.main(["--init_from=resume", "--max_iters=10"]) == 0
    assert [e["step"] for e in read_metrics(project / "out") if "loss" in e] == list(range(10))
    found = load_checkpoint(find_checkpoint("out"))
    assert found.step == 10 and found.model_config.dropout == 0.25 and found.config["data"]["batch_size"] == 4
    # every value is stored, so that a checkpoint means the same after defaults have changed
    assert {leaf for section in found.config.values() for leaf in section} == set(flatten(Config()))
    assert train.main(["--init_from=resume", "--max_iters=12", "--n_embd=32"]) == 2
    assert "--n_embd=32 contradicts the loaded weights, which have 16" in capsys.readouterr().err


@pytest.mark.cases(2)
@pytest.mark.parametrize("extra", [[], ["--epochs=2"], ['--stop=["a", "b"]', "--start=é: x\n", "--learning_rate=1e-5"]])
@pytest.mark.parametrize("nanogpt", [False, True])
def test_print_config_is_a_preset(
    extra: list[str], nanogpt: bool, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main, defaults = (train.main_nanogpt, nanogpt_defaults()) if nanogpt else (train.main, {})
    given = ["--n_layer=3"] if "--epochs=2" in extra else arguments(n_layer=3, max_iters=7)
    assert main([*given, *extra, "--print_config"]) == 0
    printed = capsys.readouterr().out
    (project / "printed.yaml").write_text(printed, encoding="utf-8")
    assert main(["printed.yaml", "--print_config"]) == 0
    assert capsys.readouterr().out == printed
    tree = parse(Config, ["printed.yaml"], prog="x", defaults=defaults).tree
    told = flatten(tree)
    assert told["n_layer"] == 3 and yaml.safe_load(printed)["model"]["n_layer"] == 3
    assert not (project / "out").exists()


def test_a_python_preset_means_the_same_in_train_py_and_llm_train(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "my.py").write_text("n_layer = 3\n")
    printed = []
    for main in (train.main, train.main_nanogpt):
        assert main(["my.py", "--print_config"]) == 0
        printed.append(yaml.safe_load(capsys.readouterr().out))
    assert printed[0] == printed[1]
    assert (printed[0]["model"]["n_layer"], printed[0]["model"]["n_embd"]) == (3, 768)
    assert train.main(["my.py"]) == 2  # not on data/tiny, which was prepared last
    assert "dataset 'openwebtext' not found" in capsys.readouterr().err


def test_dry_run_prints_and_writes_nothing(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(project)
    assert train.main([*arguments(dataset="tiny"), "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "3,568 parameters" in out and "tokens per iteration will be: 32" in out
    assert re.search(r"length: 8 steps, 0\.13 epochs", out) and "memory: about" in out
    assert files(project) == before


def test_the_length_is_printed_once(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecast, "forecast", lambda plan: None)  # it measures steps, which takes most of the time
    monkeypatch.setattr(forecast, "lines", lambda plan, found: [])

    def steps(*argv: str) -> int:
        small = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=8", "--batch_size=10"]
        assert train.main([*argv, "--dry_run", "--dataset=tiny", *small]) == 0
        return int(re.search(r"length: ([\d,]+) steps", capsys.readouterr().out)[1].replace(",", ""))  # type: ignore

    (project / "a.yaml").write_text("training: {max_iters: 7, gradient_accumulation_steps: 1}\n")
    (project / "b.yaml").write_text("training: {epochs: 2, gradient_accumulation_steps: 1}\n")
    (project / "both.yaml").write_text("training: {epochs: 2, max_iters: 7, gradient_accumulation_steps: 1}\n")
    assert steps("a.yaml") == 7 and steps("b.yaml", "--max_iters=9") == 9
    assert steps("a.yaml", "--epochs=1") == 25  # 2,000 tokens, 80 a step
    assert steps("a.yaml", "b.yaml") == 50 and steps("b.yaml", "a.yaml") == 7  # the later preset wins
    for argv in (["--epochs=1", "--max_iters=2"], ["both.yaml"]):
        assert train.main([*argv, "--dataset=tiny"]) == 2
        assert "epochs and max_iters both set the length of the run" in capsys.readouterr().err


# --- evaluation ---


def naive_loss(run: Path, ids: np.ndarray, block: int) -> float:
    found = load_checkpoint(find_checkpoint(run))
    model = GPT(found.model_config).eval()
    model.load_state_dict(found.model)
    total = 0.0
    with torch.no_grad():
        for at in range(1, len(ids)):
            window = torch.from_numpy(ids[(at - 1) // block * block : at].astype(np.int64))[None]
            total -= float(model(window)[0][0, -1].double().log_softmax(-1)[int(ids[at])])
    return total / (len(ids) - 1)


@pytest.mark.parametrize("block", [8, pytest.param(5, marks=pytest.mark.slow)])
def test_llm_eval_is_the_loss_of_every_token(
    block: int, trained: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        f"--out_dir={trained}",
        f"--dataset={tiny_data}",
        f"--eval_block_size={block}",
        "--device=cpu",
        "--dtype=float32",
    ]
    assert evaluate.main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = naive_loss(trained, TOKENIZER.encode(babble(205, seed=1)), block)
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert found["perplexity"] == pytest.approx(np.exp(expected), rel=1e-5)
    assert found["tokens"] == found["bytes"] == 204
    assert found["bits_per_byte"] == pytest.approx(expected / np.log(2), rel=1e-5)
    assert evaluate.main([*argv, "--eval_batch_size=3"]) == 0
    assert capsys.readouterr().out.startswith(f"loss {expected:.4f}, perplexity ")
    assert evaluate.main([*argv, "--json", "--quantize=int8"]) == 0
    rounded = json.loads(capsys.readouterr().out)
    assert rounded["loss"] == pytest.approx(expected, abs=0.02) and rounded["loss"] != found["loss"]


def test_llm_eval_reads_a_text(trained: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in (babble(100, seed=5), "abc", "ab"):  # the last ones are shorter than a window
        (here / "text.txt").write_text(text)
        assert evaluate.main(["text.txt", f"--out_dir={trained}", "--json", "--dtype=float32"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["loss"] == pytest.approx(naive_loss(trained, TOKENIZER.encode(text), 8), rel=1e-5)


def test_llm_eval_reads_a_folder_of_texts(trained: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = {"a.txt": babble(25, seed=5), "songs/1.md": babble(12, seed=6), "songs/deep/2.txt": babble(9, seed=7)}
    for name, text in (texts | {"empty.txt": "", "songs/picture.png": "x"}).items():
        (here / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (here / "texts" / name).write_text(text)
    rows = [json.dumps({"text": babble(6, seed=seed)}) for seed in (8, 9)]
    (here / "texts" / "b.jsonl").write_text("\n".join(rows))
    texts["b.jsonl"] = babble(6, seed=8) + babble(6, seed=9)
    argv = ["--text_files=texts/", f"--out_dir={trained}", "--dtype=float32", "--device=cpu"]
    assert evaluate.main([*argv, "--json"]) == 0
    told = capsys.readouterr()
    assert told.err == "texts/empty.txt: skipped, because the loss needs at least 2 tokens\n"
    found = json.loads(told.out)
    losses = {name: naive_loss(trained, TOKENIZER.encode(text), 8) for name, text in texts.items()}
    weights = {name: len(text) - 1 for name, text in texts.items()}
    groups = {"a.txt": ["a.txt"], "b.jsonl": ["b.jsonl"], "songs": ["songs/1.md", "songs/deep/2.txt"]}
    assert list(found["domains"]) == list(groups)
    for group, part in [*((groups[name], part) for name, part in found["domains"].items()), (list(texts), found)]:
        tokens = sum(weights[name] for name in group)
        assert part["tokens"] == part["bytes"] == tokens
        assert part["loss"] == pytest.approx(sum(losses[name] * weights[name] for name in group) / tokens, rel=1e-5)
    assert evaluate.main([*argv, "--stride=3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition(", ")[2] for line in lines] == [*groups, "total of texts/"]
    assert all("windows of 8, 3 apart" in line for line in lines)


def test_options_of_llm_eval_that_contradict_each_other(
    trained: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "texts").mkdir()
    (here / "a.txt").write_text("abc abc")
    for argv, words in (
        (["a.txt", "--stride=9"], "stride=9 exceeds the window of 8 tokens"),
        (["--stride=0"], "stride=0 is out of range"),
        (["--text_files=nosuch"], "--text_files=nosuch is not a folder"),
        (["--text_files=texts"], "the folder 'texts' contains no .txt"),
        (["--text_files=texts", "--dataset=tiny"], "give --dataset or --text_files, not both"),
        (["--text_files=texts", "--split=val"], "--split has no effect on text_files"),
        (["a.txt", "--split=val"], "--split has no effect on a.txt"),
        (["a.txt", "--text_files=texts"], "give a text file or --text_files, not both"),
        (["a.txt", "--tasks=b.yaml"], "several tasks: --tasks=b.yaml,a.txt"),
        (["--tasks=b.yaml", "--stride=2"], "--stride has no effect on tasks"),
        (["--tasks=b.yaml", "--text_files=texts"], "give --text_files or --tasks, not both"),
        (["--num_fewshot=1"], "--num_fewshot needs --tasks"),
        (["--limit=5"], "--limit needs --tasks"),
        (["--tasks=a", "--limit=0"], "limit=0.0 is out of range"),
        (["--tasks=a", "--num_fewshot=-1"], "num_fewshot=-1 is out of range"),
    ):
        assert evaluate.main([f"--out_dir={trained}", *argv]) == 2, argv
        told = capsys.readouterr()
        assert words in told.err and told.err.startswith("error: ") and told.err.count("\n") == 1 and not told.out, argv


# --- the benchmark ---


def test_bench_ends_quickly_on_a_cpu(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--batch_size=2", "--block_size=8", "--n_layer=1", "--n_head=2", "--n_embd=16", "--vocab_size=20"]
    assert bench.main_nanogpt([*small, "--steps=3", "--burnin_steps=1", "--device=cpu", "--json"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert any(line.startswith("using random tokens: dataset 'openwebtext' not found") for line in out)
    assert any("using smaller sizes: compile=False" in line for line in out)
    assert sum(line.startswith(f"{k}/3 loss: ") for k in range(3) for line in out) == 3
    assert re.match(r"time per iteration: \d+\.\d+ms, MFU: n/a", out[-2])
    figures = json.loads(out[-1])
    assert figures["ms_per_step"] > 0 and figures["tokens_per_s"] > 0
    assert files(here) == []


def test_bench_without_data_names_no_dataset(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--device=cuda:99"]) == 2
    errors = capsys.readouterr().err
    assert "using random tokens: no prepared data found" in errors and "openwebtext" not in errors


@pytest.mark.slow
def test_bench_reads_data_if_there_is_any(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--batch_size=2", "--block_size=8", "--n_layer=1", "--n_head=2", "--n_embd=16", "--dataset=tiny"]
    assert bench.main([*small, "--steps=1", "--burnin_steps=0", "--device=cpu"]) == 0
    out, errors = capsys.readouterr()
    assert "random tokens" not in out and "recently prepared" not in errors
    assert bench.main([*small[:-1], "--profile", "--device=cpu"]) == 0
    assert "using the most recently prepared data: tiny (override with --dataset=NAME)" in capsys.readouterr().err
    assert (project / "bench_log" / "trace.json").is_file()


# --- help ---

COMMANDS = ["train", "evaluate", "bench", "generate", "prepare_data", "export", "sample"]


@pytest.mark.parametrize(
    "command", [pytest.param(name, marks=() if name == "train" else pytest.mark.slow) for name in COMMANDS]
)
def test_help_answers_at_once_without_torch(command: str) -> None:
    program = f"""
import resource, sys
from llm_from_scratch.cli import {command}
sys.argv = ["{command}", "--help"]
try:
    code = {command}.main()
except SystemExit as stop:
    code = stop.code
assert not code, code
used = resource.getrusage(resource.RUSAGE_SELF)
print(used.ru_utime + used.ru_stime, "torch" in sys.modules, "transformers" in sys.modules, file=sys.stderr)
"""
    pytest.importorskip("resource")
    # a processor that others use too counts more seconds for the same work
    limit = 0.4 if os.getloadavg()[0] < (os.cpu_count() or 1) else 0.8
    seconds = []
    for _ in range(3):  # the best counts
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=SMALL)
        assert done.returncode == 0, done.stderr
        assert "--" in done.stdout
        cpu, *heavy = done.stderr.split()
        assert heavy == ["False", "False"]
        seconds.append(float(cpu))
        if seconds[-1] < limit:
            return
    raise AssertionError(f"{seconds} s of CPU time for --help")


# --- mistakes ---

BIG = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 8, "device": "cpu"}
# name: (arguments, words of the message); run in a folder that holds what `bench_of_mistakes` makes
MISTAKES: dict[str, tuple[list[str], str]] = {
    "unknown key": (["--batchsize=3"], "unknown setting --batchsize; did you mean batch_size?"),
    "unknown key in a preset": (["bad.yaml"], "unknown setting batchsize in bad.yaml; did you mean batch_size?"),
    "unknown preset": (["nosuch"], "no preset file 'nosuch'"),
    "wrong type": (["--batch_size=many"], "batch_size='many' is not valid: expected a whole number"),
    "batch 0": (["--batch_size=0"], "batch_size=0 is out of range: expected 1 or more"),
    "negative rate": (["--learning_rate=-1"], "learning_rate=-1.0 is out of range"),
    "top_p": (["--top_p=7"], "top_p=7.0 is out of range"),
    "heads": (["--n_embd=10", "--n_head=4"], "n_embd=10 is not divisible by n_head=4"),
    "missing data": (["--dataset=nosuch"], "make it with: llm-prepare FILE --out_dir=data/processed/nosuch"),
    "short data": (["--dataset=short"], "has 5 tokens, but a window needs block_size + 1 = 9"),
    "empty data": (["--dataset=empty"], "is empty: the train split does not have tokens"),
    "foreign id": (["--dataset=foreign"], "token 30 has id 999, outside the vocabulary of 20 ids"),
    "small vocabulary": (["--vocab_size=7"], "vocab_size=7 is smaller than the 20 ids of the tokenizer"),
    "damaged manifest": (["--dataset=damaged"], "manifest.json is damaged"),
    "no checkpoint": (["--init_from=resume", "--out_dir=nosuch"], "no checkpoint nosuch"),
    "empty out_dir": (["--init_from=resume", "--out_dir=hollow"], "no checkpoint in hollow"),
    "no weights": (["--init_from=nosuch"], "unknown init_from 'nosuch': no such checkpoint or folder"),
    "another shape": (["--init_from=run", "--n_embd=32"], "--n_embd=32 contradicts the loaded weights, which have 16"),
    "resumed in another shape": (["--init_from=resume", "--out_dir=run", "--n_layer=9"], "--n_layer=9 contradicts"),
    "no cuda": (["--device=cuda"], "does not find a CUDA device; use --device=cpu"),
    "fp8 on a cpu": (["--fp8=True"], "--fp8=True needs a CUDA device of compute capability 8.9"),
    "flex attention on a cpu": (["--flex_attention=True"], "--flex_attention=True needs a CUDA device"),
    "no such device": (["--device=tpu"], "device='tpu' is not one of auto, cpu, cuda"),
    "file in the way": (["--out_dir=file"], "out_dir=file is a file"),
    "file on the way": (["--out_dir=file/sub/run"], "out_dir=file/sub/run cannot be written"),
    "out_dir too long": (["--out_dir=" + "x" * 300], "cannot be written"),
    "half set": (["WORLD_SIZE=2"], "the distributed environment is incomplete: RANK"),
    "bad flag": (["--dry_run=perhaps"], "--dry_run must be True or False"),
    "no prompt": (["--sample_interval=2", "--start=Z"], "--start"),
    "nccl on a cpu": (["--backend=mpi"], "backend='mpi' is not one of auto, nccl, gloo"),
    "nanoGPT has no rope": (["--save_nanogpt_ckpt", "--pos_embedding=rope", "--n_embd=16"], "pos_embedding=rope"),
}


def bench_of_mistakes(folder: Path, run: Path) -> None:
    """What the mistakes are made on."""
    good = TOKENIZER.encode(babble(200))
    bad = good.copy()
    bad[30] = 999
    write_data(folder / "data" / "tiny")
    write_data(folder / "data" / "short", train=good[:5], val=good[:5])
    write_data(folder / "data" / "empty", train=[], val=[])
    write_data(folder / "data" / "foreign", train=bad)
    (write_data(folder / "data" / "damaged") / "manifest.json").write_text("{")
    (folder / "bad.yaml").write_text("batchsize: 3\n")
    (folder / "file").write_text("in the way")
    (folder / "hollow").mkdir()
    (folder / "run").symlink_to(run, target_is_directory=True)


def ask(asked: dict[str, list[str]]) -> dict[str, list[Any]]:
    """[exit code, output, errors] of llm-train for each list of arguments; NAME=VALUE goes to the environment."""
    answers = {}
    for name, argv in asked.items():
        out, err = io.StringIO(), io.StringIO()
        environment = dict(word.split("=") for word in argv if not word.startswith("-") and "=" in word)
        words = [word for word in argv if word.startswith("-") or "=" not in word]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
            for key, value in environment.items():
                patch.setenv(key, value)
            try:
                code: Any = train.main(words)
            except BaseException as error:
                code = f"{type(error).__name__}: {error}"
        answers[name] = [code, out.getvalue(), err.getvalue()]
    return answers


PROGRAM = f"""
import json, sys
from {__name__} import ask
print(json.dumps([sys.flags.optimize, ask(json.loads(sys.stdin.read()))]))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for CUDA where there is none")
@pytest.mark.parametrize("optimize", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["python", "python -O"])
def test_mistakes_get_one_line_and_leave_nothing_behind(optimize: bool, here: Path, trained: Path) -> None:
    bench_of_mistakes(here, trained)
    before, of_run = files(here), files(trained)
    common = [f"--{name}={value}" for name, value in {**BIG, "dataset": "tiny", "max_iters": 2}.items()]
    asked = {
        name: [*[word for word in argv if not word.startswith("--")], *common,
               *[word for word in argv if word.startswith("--")]]
        for name, (argv, _) in MISTAKES.items()
    }  # fmt: skip
    asked["resumed in another shape"] = ["--dataset=tiny", *MISTAKES["resumed in another shape"][0]]
    asked["another shape"] = ["--dataset=tiny", "--device=cpu", *MISTAKES["another shape"][0]]
    if optimize:
        done = subprocess.run(
            [sys.executable, "-O", "-c", PROGRAM], input=json.dumps(asked), capture_output=True, text=True, env=SMALL
        )
        assert done.returncode == 0, done.stderr
        level, answers = json.loads(done.stdout.splitlines()[-1])
        assert level == 1
    else:
        answers = ask(asked)
    wrong = {}
    for name, (_, words) in MISTAKES.items():
        code, out, err = answers[name]
        if code != 2 or words not in err or not err.startswith("error: ") or err.count("\n") != 1 or out:
            wrong[name] = answers[name]
    assert wrong == {}
    assert files(here) == before and files(trained) == of_run


def test_mistakes_in_evaluation(here: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench_of_mistakes(here, trained)
    (here / "latin.txt").write_bytes(b"caf\xe9")
    (here / "one.txt").write_text("a")
    (here / "greek.txt").write_text("aβ")
    write_data(here / "data" / "other", tokenizer=type(TOKENIZER).from_text([LETTERS[:-1] + "z"]))
    for argv, words in (
        (["--out_dir=nosuch"], "no checkpoint nosuch"),
        (["--which=99"], "no checkpoint of step 99"),
        (["--which=better"], "is not last, best or a step"),
        (["--split=test"], "split='test' is not one of train, val"),
        (["--eval_block_size=9"], "eval_block_size=9 exceeds the model's block_size=8"),
        (["--eval_block_size=0"], "eval_block_size=0 is out of range"),
        (["--eval_batch_size=0"], "eval_batch_size=0 is out of range"),
        (["--dataset=nosuch"], "dataset 'nosuch' not found"),
        (["--dataset=other"], "uses the tokenizer char"),
        (["--dataset=foreign", "--split=train"], "outside the vocabulary"),
        (["latin.txt"], "latin.txt is not UTF-8 text (byte 3)"),
        (["one.txt"], "one.txt has 1 tokens; the loss needs at least 2"),
        (["greek.txt"], "'β'"),
        (["gone.txt"], "cannot read gone.txt"),
        (["hollow"], "cannot read hollow"),
        (["one.txt", "latin.txt"], "expected one text file"),
        (["one.txt", "--dataset=tiny"], "give a text file or --dataset, not both"),
        (["--device=cuda:77"], "--device=cuda:77"),
    ):  # fmt: skip
        given = argv if "--out_dir=nosuch" in argv else ["--out_dir=run", *argv]
        if all(word.startswith("--") and not word.startswith("--dataset") for word in argv):
            given = [*given, "--dataset=tiny"]
        assert evaluate.main(given) == 2, argv
        told = capsys.readouterr()
        assert words in told.err and told.err.startswith("error: ") and told.err.count("\n") == 1 and not told.out, argv


def test_a_loss_that_explodes_is_exit_code_1(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings: dict[str, Any] = {"dataset": "tiny", "learning_rate": 1e19, "max_iters": 50}
    assert train.main(arguments(**settings)) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: the loss is") and told.count("\n") == 1 and "Try --learning_rate" in told


def test_a_closed_pipe_and_ctrl_c_are_quiet(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    from llm_from_scratch.training import trainer

    monkeypatch.setattr(trainer, "train", interrupted)
    assert train.main(arguments(dataset="tiny")) == 130
    assert capsys.readouterr().err == "interrupted\n"
