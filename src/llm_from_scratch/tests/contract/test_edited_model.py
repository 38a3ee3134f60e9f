"""A researcher's first act: core/model.py is edited in a copy of the package, and every command still works.

Each edit adds or removes a parameter. The names, shapes and counts must come from the edited model alone: training,
saving, resuming, sampling, evaluating, planning and the rollback work; formats that do not support the new part
refuse by that name.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import llm_from_scratch
from llm_from_scratch.config import GPTConfig
from llm_from_scratch.core.sizes import count_params

from ..tiny import QUICK, arguments, write_data

PACKAGE = Path(llm_from_scratch.__file__).resolve().parent
BLOCK = "self.ln_2 = make_norm(config)\n"
ADD_MLP = "x = x + self.mlp(self.ln_2(x))\n"
ATTENTION = "self.c_proj = Linear(heights[0], config.n_embd, bias=config.bias)\n"
MLP = "self.c_proj = Linear(config.mlp_width, config.n_embd, bias=config.bias)\n"


# Runs the commands that are written to its standard input, a line of JSON each
DRIVER = """
import contextlib, importlib, io, json, os, sys
answers = os.fdopen(os.dup(1), "w")
for line in sys.stdin:
    command, *words = json.loads(line)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = importlib.import_module("llm_from_scratch.cli." + command).main(words)
    print(json.dumps({"code": code, "out": out.getvalue(), "err": err.getvalue()}), file=answers, flush=True)
"""


@dataclass
class Edit:
    """Replacements in core/model.py. exported: the name that each format must give when it refuses."""

    changes: dict[str, str]
    nanogpt: str
    hf: str | None
    """None: transformers' model can be this one."""


def added(line: str, use: str, name: str) -> Edit:
    return Edit({BLOCK: BLOCK + f"        {line}\n", ADD_MLP: use + "\n"}, name, name)


EDITS = {
    "a gate": added(
        "self.gate = nn.Parameter(torch.ones(config.n_embd))",
        "x = x + self.gate.to(x.dtype) * self.mlp(self.ln_2(x))",
        "transformer.h.0.gate",
    ),
    "a bias": added(
        "self.shift = nn.Parameter(torch.zeros(config.n_embd))",
        "x = x + self.mlp(self.ln_2(x)) + self.shift.to(x.dtype)",
        "transformer.h.0.shift",
    ),
    "a norm": added(
        "self.ln_3 = make_norm(config)", "x = x + self.ln_3(self.mlp(self.ln_2(x)))", "transformer.h.0.ln_3.weight"
    ),
    "a counter": added(
        'self.register_buffer("calls", torch.zeros(2, dtype=torch.int64))',
        "x = x + self.mlp(self.ln_2(x)) + (self.calls.sum() * 0).to(x.dtype)",
        "transformer.h.0.calls",
    ),
    "no biases in c_proj": Edit(
        {ATTENTION: ATTENTION.replace("config.bias", "False"), MLP: MLP.replace("config.bias", "False")},
        "transformer.h.0.attn.c_proj.bias",
        None,
    ),
}


class Copy:
    """A copy of the package with an edit, whose commands run in a folder of their own."""

    def __init__(self, edit: Edit, folder: Path):
        self.folder, self.source = folder, folder / "src"
        shutil.copytree(
            PACKAGE, self.source / PACKAGE.name, ignore=shutil.ignore_patterns("tests", "__pycache__", "page")
        )
        for presets in ("config", "configs"):
            if (PACKAGE.parents[1] / presets).is_dir():  # a checkout
                shutil.copytree(PACKAGE.parents[1] / presets, folder / presets)
        path = self.source / PACKAGE.name / "core" / "model.py"
        text = path.read_text(encoding="utf-8")
        for old, new in edit.changes.items():
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        path.write_text(text, encoding="utf-8")
        self.data = write_data(folder / "data")

        # one process for all commands: to import torch takes longer than what they do
        environment = {**os.environ, "PYTHONPATH": str(self.source), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER], cwd=folder, env=environment, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __enter__(self) -> Copy:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def run(self, command: str, *words: str, code: int = 0) -> str:
        """Standard output, or of a command that fails standard error."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps([command, *words]), file=self.process.stdin, flush=True)
        done = json.loads(self.process.stdout.readline())
        assert done["code"] == code, done
        return done["err"] if code else done["out"]

    def train(self, *words: str, code: int = 0, **settings: object) -> str:
        return self.run("train", *arguments(dataset=self.data, eval_iters=1, bias=True, **settings), *words, code=code)


def check_training(copy: Copy) -> None:
    """A run that is stopped half-way and resumed has the same weights as one that is not, to the bit."""
    copy.train(out_dir="whole", max_iters=8)
    copy.train(out_dir="cut", max_iters=4, lr_decay_iters=8)
    assert "resuming from" in copy.train("--init_from=resume", out_dir="cut", max_iters=8, lr_decay_iters=8)
    whole, cut = (next((copy.folder / name).glob("step-00000008")) for name in ("whole", "cut"))
    assert (whole / "model.safetensors").read_bytes() == (cut / "model.safetensors").read_bytes()
    assert (whole / "optimizer.safetensors").read_bytes() == (cut / "optimizer.safetensors").read_bytes()


def check_use(copy: Copy) -> None:
    """The run writes text and is evaluated."""
    words = ("--start=ba", "--num_samples=1", "--max_new_tokens=6", "--device=cpu", "--temperature=1e-6")
    text = copy.run("generate", "--out_dir=whole", *words)
    assert text.startswith("ba") and copy.run("generate", "--out_dir=whole", *words) == text
    found = json.loads(copy.run("evaluate", "--out_dir=whole", f"--dataset={copy.data}", "--device=cpu", "--json=True"))
    assert 0 < found["loss"] < 4


def check_exports(copy: Copy, edit: Edit) -> None:
    """Formats without a name for the edit refuse by name, before the run if it was asked for there."""
    said = copy.run("export", "--out_dir=whole", "--format=nanogpt", "--output=x.pt", code=2)
    assert edit.nanogpt in said and said.count("\n") == 1
    said = copy.train(out_dir="early", save_nanogpt_ckpt=True, code=2)
    assert edit.nanogpt in said and not (copy.folder / "early").exists()
    if edit.hf is not None:
        said = copy.run("export", "--out_dir=whole", "--format=hf", "--output=hf", code=2)
        assert edit.hf in said and said.count("\n") == 1 and not (copy.folder / "hf").exists()
    else:
        copy.run("export", "--out_dir=whole", "--format=hf", "--output=hf")


def check_commands(edit: Edit, folder: Path) -> None:
    with Copy(edit, folder) as copy:
        check_training(copy)
        check_use(copy)
        check_exports(copy, edit)


def test_a_gate_in_the_block_is_trained_saved_resumed_and_sampled(tmp_path: Path) -> None:
    check_commands(EDITS["a gate"], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in EDITS if name != "a gate"])
def test_every_edit_works_through_the_commands(name: str, tmp_path: Path) -> None:
    check_commands(EDITS[name], tmp_path)


@pytest.mark.slow
def test_an_edited_model_is_counted_in_the_plan_and_survives_a_roll_back(tmp_path: Path) -> None:
    """The plan counts the new parameters; a rollback loads the checkpoint that the run wrote itself."""
    settings = {**QUICK, "vocab_size": 20}
    config = GPTConfig(**{f.name: settings[f.name] for f in dataclasses.fields(GPTConfig) if f.name in settings})
    with Copy(EDITS["a gate"], tmp_path) as copy:
        said = copy.train("--dry_run", out_dir="planned")
        assert f"model: {count_params(config) + config.n_embd:,} parameters" in said
        copy.train(out_dir="run", max_iters=4)
        wild = {"learning_rate": 1e30, "min_lr": 1e30, "max_skipped_steps": 1, "max_rollbacks": 1}
        said = copy.train("--init_from=resume", out_dir="run", code=1, max_iters=8, **wild)
        assert "stopped: max_rollbacks=1 reached" in said and (copy.folder / "run" / "step-00000004").is_dir()


UNLOADABLE = {
    "a parameter that depends on more than the configuration": (
        "if torch.empty(0).device.type != \"meta\":\n            self.extra = nn.Parameter(torch.zeros(3))",
        "transformer.h.0.extra",
    ),
    "a type that no checkpoint stores": (
        "self.phase = nn.Parameter(torch.zeros(3, dtype=torch.complex64))", "transformer.h.0.phase"
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", UNLOADABLE)
def test_a_run_does_not_start_if_its_first_state_cannot_be_saved(name: str, tmp_path: Path) -> None:
    line, blamed = UNLOADABLE[name]
    with Copy(Edit({BLOCK: BLOCK + f"        {line}\n"}, "", None), tmp_path) as copy:
        said = copy.train(out_dir="run", code=2)
    assert "cannot be saved" in said and blamed in said and said.count("\n") == 1
    assert not list((tmp_path / "run").glob("step-*"))
