"""llm-generate as users call it: options, prompts from files and pipes, JSON lines, conversation, bad input."""

from __future__ import annotations

import io
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from llm_from_scratch.checkpoint.store import save_checkpoint
from llm_from_scratch.cli import generate, sample
from llm_from_scratch.config import GenerationConfig, GPTConfig
from llm_from_scratch.core.model import GPT
from llm_from_scratch.core.tokenizer import ByteTokenizer, CharTokenizer
from llm_from_scratch.generation.generator import Generator

from ..forked import Forked
from ..memorised import SIGNS, TEXT, TOKENIZER, memorised

START = TEXT[:6]
DASHES = "---------------"
SHORT = ["--max_new_tokens=12", "--device=cpu"]


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory) -> Path:
    """A run with a trained model as its best checkpoint and an untrained one as its last."""
    folder = tmp_path_factory.mktemp("run") / "out"
    torch.manual_seed(0)
    for step, model, val_loss in ((10, memorised("modern"), 1.0), (20, GPT(memorised("modern").config), 4.0)):
        save_checkpoint(
            folder,
            step=step,
            model_config=model.config,
            model=model.state_dict(),
            run_id="r",
            tokenizer=TOKENIZER,
            val_loss=val_loss,
        )
    return folder


@pytest.fixture
def best(out_dir) -> list[str]:
    return [f"--out_dir={out_dir}", "--which=best", *SHORT]


def call(capsys, *argv: str) -> tuple[int, str, str]:
    code = generate.main(list(argv))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def greedy(prompt: str = START, tokens: int = 12) -> str:
    params = GenerationConfig(num_samples=1, max_new_tokens=tokens, temperature=0.0)
    return Generator(memorised("modern"), TOKENIZER).generate(prompt, params)[0].text


def test_prompt_and_continuation_are_printed(capsys, best):
    code, out, err = call(capsys, *best, f"--start={START}", "--temperature=0")
    assert (code, out) == (0, START + greedy() + "\n")
    assert "step-00000010" in err and "cpu, float32" in err


def test_the_default_prompt_of_a_model_that_never_saw_a_line_break(capsys, here):
    tokenizer = CharTokenizer.from_text(["xyz "])
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=4, n_layer=1, n_head=1, n_embd=8))
    save_checkpoint("out", step=1, model_config=model.config, model=model.state_dict(), run_id="r", tokenizer=tokenizer)
    code, out, err = call(capsys, *SHORT)
    assert code == 0 and out[0] == " " and len(out) == 14 and set(out[:13]) <= set("xyz ")
    assert "this model never saw a line break: the samples start with ' '" in err
    assert sample.main(["--num_samples=1", *SHORT]) == 0
    assert capsys.readouterr().out.startswith(" ")
    code, out, err = call(capsys, *SHORT, "--start=a")  # not the default: refused
    assert code == 2 and "never saw the character 'a'" in err


def test_which_checkpoint(capsys, out_dir):
    common = [f"--start={START}", "--temperature=0", *SHORT]
    texts = {
        name: call(capsys, *common, *args)[1]
        for name, args in {
            "best": [f"--out_dir={out_dir}", "--which=best"],
            "step": [f"--out_dir={out_dir}", "--which=10"],
            "directory": [f"--checkpoint={out_dir / 'step-00000010'}"],
            "last": [f"--out_dir={out_dir}", "--which=last"],
            "none": [f"--checkpoint={out_dir}"],
        }.items()
    }
    assert texts["best"] == texts["step"] == texts["directory"] != texts["last"] == texts["none"]


def test_several_samples_are_separated_and_seeded(capsys, best):
    code, out, _ = call(capsys, *best, f"--start={START}", "--num_samples=3", "--seed=7", "--temperature=3")
    samples = out.split(f"\n{DASHES}\n")
    assert code == 0 and samples[3] == "" and len(set(samples[:3])) == 3
    assert all(sample.startswith(START) for sample in samples[:3])
    # the seed that a sample is shown with gives it alone
    assert call(capsys, *best, f"--start={START}", "--seed=9", "--temperature=3")[1] == samples[2] + "\n"
    assert call(capsys, *best, f"--start={START}", "--num_samples=3", "--seed=7", "--temperature=3")[1] == out


def test_json_lines(capsys, best):
    stop = greedy()[5:7]
    code, out, _ = call(
        capsys, *best, f"--start={START}", "--jsonl", "--num_samples=2", "--temperature=0", f"--stop={stop}", "--seed=3"
    )
    first, second = (json.loads(line) for line in out.splitlines())
    assert code == 0 and first | {"seed": 4} == second
    assert first == {"prompt": START, "text": greedy()[:5], "tokens": 7, "finish_reason": "stop", "seed": 3}


def test_streaming_writes_the_same(capsys, best):
    arguments = [*best, f"--start={START}", "--num_samples=2", "--temperature=3"]
    assert call(capsys, *arguments, "--stream=True")[1] == call(capsys, *arguments)[1]


@pytest.mark.cases(2)
@pytest.mark.parametrize(
    "options",
    [
        ["--top_k=1"],
        ["--temperature=1.5", "--top_p=1e-6"],
        ["--min_p=1", "--top_k=None"],
        ["--repetition_penalty=1.0000001", "--temperature=0"],
    ],
)
def test_sampling_options_reach_the_sampler(capsys, best, options):
    assert call(capsys, *best, f"--start={START}", *options)[1] == START + greedy() + "\n"


def test_penalties_reach_the_sampler(capsys, best):
    assert len(set(greedy(tokens=62))) < 62
    for option in ("--presence_penalty=100", "--frequency_penalty=100"):
        text = call(capsys, *best, f"--start={START}", option, "--temperature=0", "--max_new_tokens=62")[1][6:-1]
        assert len(set(text)) == 62, option
    option = "--repetition_penalty=1e6"  # counts the prompt's six characters, too
    text = call(capsys, *best, f"--start={START}", option, "--temperature=0", "--max_new_tokens=56")[1][:-1]
    assert len(set(text)) == 62


def test_a_logit_bias_reaches_the_sampler(capsys, best):
    (token,) = TOKENIZER.encode("Q").tolist()
    option = f"--logit_bias={{{token}: 100}}"
    assert call(capsys, *best, f"--start={START}", option)[1] == START + "Q" * 12 + "\n"


def test_int8_and_proposals_leave_a_text_far_from_ties_as_it_is(capsys, best, out_dir):
    for option in ("--quantize=int8", "--draft=lookup", f"--draft={out_dir}"):
        for stream in ("--stream=True", "--stream=False"):
            arguments = [*best, f"--start={START}", "--temperature=0", option, stream]
            code, out, err = call(capsys, *arguments)
            assert (code, out) == (0, START + greedy() + "\n")
            assert ("int8" in err) == ("int8" in option)


def test_a_draft_of_another_vocabulary_is_refused(capsys, best, tmp_path):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=256, n_layer=1, n_head=1, n_embd=8))
    save_checkpoint(
        tmp_path / "small", step=1, model_config=model.config, model=model.state_dict(), run_id="r",
        tokenizer=ByteTokenizer(),
    )  # fmt: skip
    code, out, err = call(capsys, *best, f"--start={START}", f"--draft={tmp_path / 'small'}")
    assert (code, out, err.count("\n")) == (2, "", 1) and "the draft model must have the same vocabulary" in err


def test_a_preset_gives_settings(capsys, best, tmp_path):
    preset = tmp_path / "some.yaml"
    preset.write_text(f"generation: {{start: '{START}', temperature: 0}}\noptimizer: {{learning_rate: 1}}\n")
    assert call(capsys, str(preset), *best)[1] == START + greedy() + "\n"


def test_prompt_from_a_file(capsys, best, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_bytes("é€\r\na".encode())
    assert call(capsys, *best, f"--start=FILE:{path}", "--temperature=0")[1].startswith("é€\na")


def pipe(monkeypatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def test_prompt_from_a_pipe(capsys, best, monkeypatch):
    pipe(monkeypatch, START.encode())
    assert call(capsys, *best, "--start=-", "--temperature=0")[1] == START + greedy() + "\n"


def test_a_conversation_over_a_pipe(capsys, best, monkeypatch):
    """Line after line, each with another seed; an empty line and a bad one end nothing."""
    pipe(monkeypatch, f"{START}\n\n☃\n{START}\nabc".encode())
    code, out, err = call(capsys, *best, "--interactive", "--jsonl", "--num_samples=2", "--temperature=3")
    samples = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [(s["prompt"], s["seed"]) for s in samples] == [
        *((START, 1337), (START, 1338)),
        *((START, 1341), (START, 1342)),
        *(("abc", 1343), ("abc", 1344)),
    ]
    assert samples[0]["text"] != samples[2]["text"]
    assert "U+2603" in err


def test_ctrl_c_ends_a_conversation(capsys, best, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda prompt: (_ for _ in ()).throw(KeyboardInterrupt))
    assert call(capsys, *best, "--interactive")[0] == 0


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal(monkeypatch) -> io.StringIO:
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    return screen


def test_a_terminal_shows_control_characters_harmlessly(monkeypatch):
    screen = terminal(monkeypatch)
    generate.write("a\x1b]52;c;x\x07\x9b1m\tb\n\r")
    assert screen.getvalue() == "a\ufffd]52;c;x\ufffd\ufffd1m\tb\n\ufffd"


def test_a_terminal_streams(best, monkeypatch):
    screen, writes = terminal(monkeypatch), []
    monkeypatch.setattr(generate, "write", writes.append)
    assert generate.main([*best, f"--start={START}", "--temperature=0"]) == 0
    assert "".join(writes) == START + greedy() + "\n" and len(writes) == 14 and screen.getvalue() == ""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no pseudo-terminals here")
def test_a_conversation_at_a_terminal(out_dir):
    """Ctrl-C ends a sample, a bad prompt ends nothing, the arrow key brings it back, Ctrl-D ends."""
    import pty

    settings = [f"--checkpoint={out_dir}", "--which=best", "--max_new_tokens=1000000", "--temperature=0"]
    command = [sys.executable, "-m", "llm_from_scratch.cli.generate", "--interactive", *settings]
    process, screen = pty.fork()
    if not process:
        signal.signal(
            signal.SIGINT, signal.SIG_DFL
        )  # a test run in the background ignores it, and so would its children
        os.execve(sys.executable, command, {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm"})
    seen = b""

    def read_until(text: bytes) -> bytes:
        nonlocal seen
        while text not in seen:
            assert select.select([screen], [], [], 120)[0], seen
            seen += os.read(screen, 4096)
        before, seen = seen.split(text, 1)
        return before

    try:
        read_until(b"> ")
        os.write(screen, f"{START}\n".encode())
        read_until(f"{START}{greedy(tokens=5)}".encode())  # it streams: a million tokens are not awaited
        os.write(screen, b"\x03")
        read_until(b"> ")
        os.write(screen, "☃\n".encode())
        read_until(b"U+2603")
        read_until(b"> ")
        os.write(screen, b"\x1b[A")
        read_until("☃".encode())
        os.write(screen, b"\x15\x04")
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    except BaseException:
        os.kill(process, signal.SIGKILL)
        raise
    finally:
        os.close(screen)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--start="], ["prompt is empty"]),
        (["--start=☃"], ["'☃'", "U+2603"]),
        (["--start=FILE:/no/such/file"], ["/no/such/file", "No such file"]),
        (["--which=11"], ["no checkpoint of step 11", "10"]),
        (["--which=worst"], ["worst", "best"]),
        (["--temperature=-1"], ["temperature=-1", "0 or more"]),
        (["--top_p=7"], ["top_p=7", "to 1"]),
        (["--top_k=-1"], ["top_k=-1"]),
        (["--num_samples=0"], ["num_samples=0", "1 or more"]),
        (["--max_new_tokens=0"], ["max_new_tokens=0"]),
        (["--max_new_tokens=many"], ["max_new_tokens", "many"]),
        (['--stop=[""]'], ["stop contains an empty string"]),
        (["--seed=-1"], ["seed=-1"]),
        (["--device=cuda:99"], ["--device=cuda:99", "CUDA"]),
        (["--device=tpu"], ["tpu", "cpu"]),
        (["--quantize=int4"], ["quantize", "int8"]),
        (["--draft=nowhere"], ["nowhere"]),
        (["--logit_bias={99: 1}"], ["token 99", "0 to 61"]),
        (["--logit_bias=5"], ["logit_bias", "{ID: NUMBER"]),
        (["--logit_bias={1: 1e9}"], ["logit_bias of token 1", "1000"]),
        (["--tempreture=1"], ["tempreture", "did you mean temperature?"]),
        (["--jsonl", "--stream"], ["--jsonl and --stream"]),
        (["--interactive", "--start=a"], ["--interactive", "--start"]),
        (["--checkpoint=elsewhere"], ["--checkpoint and --out_dir"]),
        (["nowhere.yaml"], ["nowhere.yaml"]),
    ],
)
def test_bad_input_gets_one_line(capsys, out_dir, arguments, words):
    code, out, err = call(capsys, f"--out_dir={out_dir}", *arguments)
    assert code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert all(word in err for word in words), err


def test_prompts_that_are_not_text(capsys, best, monkeypatch, tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"ab\xff")
    (tmp_path / "empty.txt").write_bytes(b"")
    assert "not UTF-8 text (byte 2)" in call(capsys, *best, f"--start=FILE:{tmp_path / 'bad.txt'}")[2]
    assert "is empty" in call(capsys, *best, f"--start=FILE:{tmp_path / 'empty.txt'}")[2]
    assert "cannot read" in call(capsys, *best, f"--start=FILE:{tmp_path}")[2]
    pipe(monkeypatch, b"")
    assert "empty" in call(capsys, *best, "--start=-")[2]
    pipe(monkeypatch, b"a\n\xff\n")
    code, _, err = call(capsys, *best, "--interactive")
    assert code == 2 and "not UTF-8" in err


def test_a_failing_compiler_is_reported(capsys, best, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no C++ compiler\nand a page of advice")

    monkeypatch.setattr(torch, "compile", lambda step: fail)
    code, out, err = call(capsys, *best, f"--start={START}", "--compile")
    assert code == 2 and out == "" and err.count("\n") == 1
    assert "torch.compile failed (RuntimeError: no C++ compiler); run without --compile" in err


def test_a_missing_checkpoint_is_reported_without_torch(tmp_path):
    begin = time.perf_counter()
    program = (
        "import sys; from llm_from_scratch.cli import generate\n"
        f"code = generate.main(['--out_dir={(tmp_path / 'none').as_posix()}'])\n"
        "print(code, 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.stdout.split() == ["2", "False"]
    assert result.stderr.startswith("error: no checkpoint") and result.stderr.count("\n") == 1
    assert time.perf_counter() - begin < 30


def test_help_imports_no_torch():
    program = (
        "import sys; from llm_from_scratch.cli import generate\n"
        "try: generate.main(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and "--repetition_penalty" in result.stdout


def test_a_pipe_neither_hangs_nor_breaks(out_dir, tmp_path):
    """A process: standard input stays open and unread, the output has an encoding that lacks most characters."""
    words = [f"--out_dir={out_dir}", *SHORT, "--which=best", "--start=é€", "--temperature=0"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    with Forked("llm_from_scratch.cli.generate", *words, stdin=subprocess.PIPE, env=environment) as process:
        assert process.wait(120) == 0, process.stderr.read()
        assert process.stdout.read().startswith("??")


def test_a_byte_model_is_continued_from_any_text(capsys, tmp_path):
    from llm_from_scratch.core.tokenizer import ByteTokenizer

    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=256, n_layer=1, n_head=2, n_embd=16))
    save_checkpoint(
        tmp_path, step=1, model_config=model.config, model=model.state_dict(), run_id="r", tokenizer=ByteTokenizer()
    )
    code, out, _ = call(capsys, f"--out_dir={tmp_path}", *SHORT, "--start=\udcff☃ 東京", "--jsonl")
    assert code == 0 and json.loads(out)["tokens"] == 12


def test_the_library_reads_the_same_checkpoints(out_dir):
    generator = Generator.from_checkpoint(out_dir, which="best", device="cpu")
    params = GenerationConfig(num_samples=1, max_new_tokens=12, temperature=0.0)
    assert generator.generate(START, params)[0].text == greedy()
    assert set(SIGNS) == set(generator.tokenizer.decode(range(generator.tokenizer.vocab_size)))
