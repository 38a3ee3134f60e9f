"""sample.py as nanoGPT's users call it: settings, presets, nanoGPT's checkpoints, and its samples for a seed."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_from_scratch.checkpoint.store import save_checkpoint
from llm_from_scratch.cli import sample
from llm_from_scratch.config import GenerationConfig, GPTConfig
from llm_from_scratch.core.model import GPT
from llm_from_scratch.core.tokenizer import Tokenizer
from llm_from_scratch.generation.batch import Prefill
from llm_from_scratch.generation.generator import Generator

from .. import forked
from ..memorised import BLOCK, TEXT, TOKENIZER, memorised
from ..parity.reference import NANOGPT_DIR, needs_nanogpt

ROOT = Path(__file__).resolve().parents[4]
START = TEXT[:5]
DASHES = "---------------\n"


def write_ckpt(path: Path, dataset: str = "signs", prefix: str = "", **model_args: Any) -> GPT:
    """A ckpt.pt with the keys and types that nanoGPT's train.py writes."""
    model = memorised("gpt2", padding=0)
    config = model.config
    args = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(
        {
            "model": {prefix + name: tensor for name, tensor in model.state_dict().items()},
            "optimizer": None,
            "model_args": {**args, "dropout": 0.0, **model_args},
            "iter_num": 120,
            "best_val_loss": torch.tensor(1.5),
            "config": {"dataset": dataset, "out_dir": path.parent.name, "init_from": "scratch"},
        },
        path,
    )
    return model


@pytest.fixture
def nanogpt_run(tmp_path, monkeypatch) -> Path:
    """A working directory with out/ckpt.pt and data/signs/meta.pkl, as after nanoGPT's prepare.py and train.py."""
    monkeypatch.chdir(tmp_path)
    write_ckpt(tmp_path / "out" / "ckpt.pt")
    folder = tmp_path / "data" / "signs"
    folder.mkdir(parents=True)
    (folder / "train.bin").write_bytes(TOKENIZER.encode(TEXT).tobytes())
    chars = TOKENIZER.chars
    meta = {
        "vocab_size": len(chars),
        "itos": dict(enumerate(chars)),
        "stoi": {c: i for i, c in enumerate(chars)},
    }
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return tmp_path


def call(capsys, *argv: str) -> tuple[int, str, str]:
    code = sample.main(list(argv))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def as_nanogpt_prints(prompt: str, seed: int, samples: int, tokens: int, temperature: float, top_k: int) -> str:
    """What its script does: seed, build the model, load, then one sample after the other, without a cache."""
    ids = torch.from_numpy(TOKENIZER.encode(prompt).astype("int64"))[None]
    trained = memorised("gpt2", padding=0)
    torch.manual_seed(seed)
    model = GPT(trained.config).eval()
    model.load_state_dict(trained.state_dict())
    rows = [model.generate(ids, tokens, temperature, top_k)[0].tolist() for _ in range(samples)]
    return "".join(f"{TOKENIZER.decode(row)}\n{DASHES}" for row in rows)


def test_a_seed_gives_nanogpts_samples(capsys, nanogpt_run):
    code, out, err = call(
        capsys, f"--start={START}", "--num_samples=3", f"--max_new_tokens={3 * BLOCK}", "--temperature=2.0", "--top_k=9"
    )
    assert code == 0 and "ckpt.pt" in err
    assert out == as_nanogpt_prints(START, 1337, 3, 3 * BLOCK, 2.0, 9)
    assert len(set(out.split(DASHES)[:3])) == 3


@pytest.mark.slow
@pytest.mark.parametrize("samples", [1, 2])
def test_the_defaults_are_nanogpts(capsys, nanogpt_run, samples: int):
    code, out, _ = call(capsys, f"--num_samples={samples}")
    assert code == 0 and out == as_nanogpt_prints("\n", 1337, samples, 500, 0.8, 200)
    assert sample.SampleSettings().num_samples == 10


@needs_nanogpt
def test_nanogpts_own_script_prints_the_same(capsys, nanogpt_run):
    for name in ("sample.py", "model.py", "configurator.py"):
        shutil.copy(Path(str(NANOGPT_DIR)) / name, nanogpt_run)
    for options in (["--seed=1"], ["--seed=2", "--temperature=1.7", "--top_k=5"]):
        options += ["--num_samples=3", f"--start={START}", "--max_new_tokens=60", "--device=cpu", "--dtype=float32"]
        theirs = subprocess.run([sys.executable, "sample.py", *options], capture_output=True, text=True, timeout=300)
        assert theirs.returncode == 0, theirs.stderr
        code, out, _ = call(capsys, *options)
        assert code == 0 and theirs.stdout.endswith(out) and out.count(DASHES) == 3


def test_compiled_checkpoints_and_a_named_dataset(capsys, nanogpt_run):
    options = [f"--start={START}", "--num_samples=1", "--max_new_tokens=9"]
    expected = call(capsys, *options)[1]
    write_ckpt(nanogpt_run / "other" / "ckpt.pt", dataset="gone", prefix="_orig_mod.")
    code, out, err = call(capsys, *options, "--out_dir=other")
    assert code == 2 and "'gone'" in err and err.count("\n") == 1
    for dataset in ("signs", "data/signs"):
        assert call(capsys, *options, "--out_dir=other", f"--dataset={dataset}")[1] == expected
    assert call(capsys, *options, "--init_from=other/ckpt.pt", "--dataset=signs")[1] == expected


def test_presets_of_the_trainer_are_accepted(capsys, nanogpt_run):
    """A preset may set what only train.py knows; on the command line that is an error."""
    (nanogpt_run / "train_it.py").write_text(
        "out_dir = 'out'\nbatch_size = 5 * 8\nlearning_rate = 1e-3\nnum_samples = 2\nwandb_run_name = 'x' + out_dir\n"
    )
    options = [f"--start={START}", "--max_new_tokens=7"]
    code, out, _ = call(capsys, "train_it.py", *options)
    assert code == 0 and out.count(DASHES) == 2
    assert call(capsys, "train_it.py", "--num_samples=1", *options)[1].count(DASHES) == 1
    code, _, err = call(capsys, "--learning_rate=1e-3")
    assert code == 2 and "learning_rate" in err


def test_our_checkpoints(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = memorised("modern")
    save_checkpoint(
        "out",
        step=3,
        model_config=model.config,
        model=model.state_dict(),
        run_id="r",
        tokenizer=TOKENIZER,
        val_loss=1.0,
    )
    code, out, err = call(capsys, f"--start={START}", "--temperature=0", "--max_new_tokens=15", "--num_samples=2")
    assert code == 0 and "step-00000003" in err
    first, second, rest = out.split(DASHES)
    assert first == second and first.startswith(START) and len(first) == 21 and rest == ""
    assert call(capsys, f"--start={START}", "--which=3", "--top_k=0", "--num_samples=1")[0] == 0


def test_end_of_text_in_the_prompt_is_the_token(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = Tokenizer.from_name("bpe:300", TEXT)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=1, n_embd=16))
    save_checkpoint("out", step=1, model_config=model.config, model=model.state_dict(), run_id="r", tokenizer=tokenizer)
    seen = []
    prefill = Prefill.__init__
    monkeypatch.setattr(
        Prefill,
        "__init__",
        lambda self, decoder, prompts, *a, **k: (
            seen.append([list(p) for p in prompts]) or prefill(self, decoder, prompts, *a, **k)
        ),
    )
    assert call(capsys, "--start=<|endoftext|>", "--num_samples=1", "--max_new_tokens=2")[0] == 0
    assert seen == [[[tokenizer.eot_id]]]


@pytest.mark.slow
def test_a_hugging_face_folder(capsys, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("llm_from_scratch.interop.hf")
    tokenizer = Tokenizer.from_name("bpe:300", TEXT)
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=tokenizer.vocab_size, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    code, out, _ = call(
        capsys,
        f"--init_from={tmp_path}",
        f"--start={START}",
        "--temperature=0",
        "--max_new_tokens=6",
        "--num_samples=1",
    )
    ids = torch.from_numpy(tokenizer.encode(START).astype("int64"))[None]
    expected = theirs.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert (code, out) == (0, tokenizer.decode(expected[0].tolist()) + "\n" + DASHES)
    params = GenerationConfig(num_samples=1, max_new_tokens=6, temperature=0.0)
    (completion,) = Generator.from_pretrained(str(tmp_path), device="cpu").generate(START, params)
    assert ids[0].tolist() + completion.tokens == expected[0].tolist()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--out_dir=nowhere"], ["nowhere"]),
        (["--init_from=scratch"], ["scratch", "resume"]),
        (["--start="], ["prompt is empty"]),
        (["--start=☃"], ["U+2603"]),
        (["--start=FILE:none.txt"], ["none.txt"]),
        (["--num_samples=-3"], ["num_samples=-3"]),
        (["--temperature=-0.5"], ["temperature=-0.5"]),
        (["--dtype=float99"], ["dtype", "float99"]),
        (["--device=cuda:99"], ["cuda:99"]),
        (["--top_kk=3"], ["did you mean top_k?"]),
        (["config/none.py"], ["config/none.py"]),
    ],
)
def test_bad_input_gets_one_line(capsys, nanogpt_run, arguments, words):
    code, out, err = call(capsys, *arguments)
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    assert all(word in err for word in words), err


@pytest.mark.skipif(not (ROOT / "sample.py").is_file(), reason="the script lies in a checkout, not in a package")
def test_the_script_runs_from_the_checkout(nanogpt_run):
    (nanogpt_run / "prompt.txt").write_text(START, encoding="utf-8")
    options = ["--start=FILE:prompt.txt", "--num_samples=2", "--max_new_tokens=5", "--device=cpu"]
    result = forked.run(str(ROOT / "sample.py"), *options)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(START) and result.stdout.count(DASHES) == 2
