"""A toy of each kind is added to a copy, in the documented number of files, and goes through the commands of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ..edited import Edit, EditedCopy
from ..tiny import QUICK

MODEL, CONFIG = "core/model.py", "config.py"
PARTS: dict[str, tuple[int, list[Edit]]] = {
    "activation": (
        2,
        [
            Edit(MODEL, '    "relu2": ReLUSquared,\n', '    "relu2": ReLUSquared,\n    "mish": nn.Mish,\n'),
            Edit(CONFIG, '"relu2", "swiglu"]', '"relu2", "mish", "geglu", "swiglu"]'),
        ],
    ),
    "gated activation": (
        2,
        [
            Edit(
                MODEL,
                "ACTIVATIONS: dict[str, Any] = {\n",
                "class GeGLU(nn.Module):\n"
                "    def forward(self, gate: Tensor, x: Tensor) -> Tensor:\n"
                "        return F.gelu(gate) * x\n\n\n"
                'ACTIVATIONS: dict[str, Any] = {\n    "geglu": GeGLU,\n',
            ),
            Edit(CONFIG, 'GATED_ACTIVATIONS = ("swiglu",)', 'GATED_ACTIVATIONS = ("swiglu", "geglu")'),
        ],
    ),
    "ALiBi": (
        2,
        [
            Edit(
                MODEL,
                "POSITIONS: dict[str, type[LearnedPositions]] = {",
                "class AlibiPositions(LearnedPositions):\n"
                "    has_table = False\n\n"
                "    def prepare(self, pos: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:\n"
                "        return (pos,)\n\n"
                "    def forward(self, q: Tensor, k: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:\n"
                "        return q, k\n\n"
                "    def bias(self, q: Tensor, k: Tensor, pos: Tensor) -> Tensor:\n"
                "        H, keys = q.size(1), torch.arange(k.size(2), device=q.device)\n"
                "        slopes = 2.0 ** (-8 * torch.arange(1, H + 1, device=q.device) / H)\n"
                "        distance = (keys - pos[..., None]).unsqueeze(-3)\n"
                "        bias = slopes[:, None, None] * distance\n"
                "        return bias.masked_fill(distance > 0, -math.inf).to(q.dtype)\n\n\n"
                'POSITIONS: dict[str, type[LearnedPositions]] = {\n    "alibi": AlibiPositions,\n   ',
            ),
            Edit(
                MODEL,
                "        y = self.attend(q, k, v, mask, causal)",
                "        if isinstance(self.positions, AlibiPositions):\n"
                "            mask, causal = self.positions.bias(q, k, *where), False\n"
                "        y = self.attend(q, k, v, mask, causal)",
            ),
            Edit(CONFIG, 'Literal["learned", "rope"]', 'Literal["learned", "rope", "alibi"]'),
        ],
    ),
    "optimizer": (
        3,
        [
            Edit(
                "training/lion.py",
                "",
                "from .rule import Rule, with_gradients\n\n\n"
                "class Lion(Rule):\n"
                "    def slots(self, p):\n"
                '        return {"momentum": (tuple(p.shape), self.dtype)}\n\n'
                "    def step(self, group, state, found_inf=None):\n"
                "        for _, p in with_gradients(group):\n"
                "            if not state[p]:\n"
                "                state[p] = self.new_state(p)\n"
                '            m = state[p]["momentum"]\n'
                "            p.mul_(1 - group['lr'] * group['weight_decay'])\n"
                "            p.add_(m.lerp(p.grad, 0.1).sign(), alpha=-group['lr'])\n"
                "            m.lerp_(p.grad, 0.01)\n",
            ),
            Edit(
                "training/optimizer.py",
                'OPTIMIZERS: dict[str, type[Rule]] = {"adamw": AdamW,',
                'from .lion import Lion\n\nOPTIMIZERS: dict[str, type[Rule]] = {"lion": Lion, "adamw": AdamW,',
            ),
            Edit(CONFIG, 'Literal["adamw", "muon", "normuon"]', 'Literal["adamw", "muon", "normuon", "lion"]'),
        ],
    ),
    "schedule": (
        2,
        [
            Edit("training/scheduler.py", '{"cosine": cosine,', '{"root": root, "cosine": cosine,'),
            Edit(
                "training/scheduler.py",
                "def constant(",
                "def root(step: int, peak: float, config: SchedulerConfig, end: int) -> float:\n"
                "    return peak / (1 + step) ** 0.5\n\n\ndef constant(",
            ),
            Edit(CONFIG, 'Literal["cosine", ', 'Literal["root", "cosine", '),
        ],
    ),
    "sampler": (
        2,
        [
            Edit(
                "generation/sampling.py",
                "Filter = Callable",
                "def cutoff(logits: Tensor, p: float) -> Tensor:\n"
                "    probs = logits.softmax(-1)\n"
                "    return logits.masked_fill(probs < probs.amax(-1, keepdim=True).clamp(max=p), -math.inf)\n\n\n"
                "Filter = Callable",
            ),
            Edit(
                "generation/sampling.py",
                '    "min_p": lambda',
                '    "cutoff": lambda logits, params: cutoff(logits, params.cutoff),\n    "min_p": lambda',
            ),
            Edit(CONFIG, "    min_p: float = 0.0\n", "    cutoff: float = 0.0\n    min_p: float = 0.0\n"),
            Edit(CONFIG, 'between(self, 0, 1, "min_p")', 'between(self, 0, 1, "min_p", "cutoff")'),
        ],
    ),
    "text source": (
        1,
        [
            Edit(
                "data/sources.py",
                "KNOWN_TEXTS = {\n",
                "class Counting:\n"
                '    name = key = "counting"\n'
                "    size, documents, has_many = 0, 200, True\n\n"
                "    def identity(self) -> dict[str, Any]:\n"
                '        return {"path": self.name}\n\n'
                "    def pieces(self) -> Iterator[tuple[str, bool]]:\n"
                '        yield from (("abcdefghijklm"[i % 7 :] * (1 + i % 3), True) for i in range(200))\n\n\n'
                'KNOWN_TEXTS = {\n    "counting": KnownText(lambda root, key, report: Counting(), "char"),\n',
            ),
        ],
    ),
}
# with the cache as without it, alone and in an engine; int8 gives some text
DECODE = """
import queue
from llm_from_scratch.config import GenerationConfig
from llm_from_scratch.generation.engine import Engine, Request
from llm_from_scratch.generation.generator import Generator
from llm_from_scratch.serving.options import ServeOptions
from llm_from_scratch.serving.protocol import CompletionRequest, read
from llm_from_scratch.serving.service import open_service

params = GenerationConfig(num_samples=1, max_new_tokens=12, temperature=0.0)
prompts = ["abc", "a", "hijklm"]
generator = Generator.from_checkpoint("whole", device="cpu")
texts = [[c.tokens for c in generator.generate(prompts, params, use_cache=cached)] for cached in (True, False)]
assert texts[0] == texts[1], texts
asked = read(CompletionRequest, b'{"prompt": "abc", "max_tokens": 12, "cutoff": 1}')
service = open_service(generator, ServeOptions(), "whole", None, "recompute", 0)
(asked,) = service.completion(asked).requests
assert asked.params.cutoff == asked.params.temperature == service.info()["defaults"]["cutoff"] + 1
params = asked.params  # only the most likely token is left
assert [c.tokens for c in generator.generate(prompts, params)] == texts[1]
engine, updates = Engine(generator, slots=4), queue.Queue()
for prompt in prompts:
    request = Request(generator.encode(prompt), params)
    engine.submit(request, lambda update, prompt=prompt: updates.put((prompt, update)))
served, done = {prompt: [] for prompt in prompts}, 0
while done < len(prompts):
    prompt, update = updates.get(timeout=60)
    assert update.error is None, update.error
    served[prompt] += [token.id for delta in update.deltas for token in delta.tokens]
    done += update.done
engine.close()
assert list(served.values()) == texts[1], (served, texts)
assert len(Generator.from_checkpoint("whole", device="cpu", quantize="int8").generate("abc", params)[0].tokens) == 12
"""
SETTINGS = {**QUICK, "activation": "geglu", "pos_embedding": "alibi", "optimizer_type": "lion", "schedule": "root"}


@pytest.mark.parametrize("part", list(PARTS))
def test_a_part_is_added_in_few_files(part: str) -> None:
    files, edits = PARTS[part]
    assert len({edit.file for edit in edits}) == files


@pytest.mark.slow
def test_all_edits_train_resume_plan_and_sample_or_are_refused_by_name(tmp_path: Path) -> None:
    copy = EditedCopy(tmp_path, [edit for _, edits in PARTS.values() for edit in edits])
    copy.run("cli.prepare_data", "counting")
    words = [f"--{name}={value}" for name, value in SETTINGS.items()] + ["--dataset=counting"]
    copy.run("cli.train", *words, "--out_dir=whole", "--sample_interval=4", "--start=a", "--max_new_tokens=4")
    copy.run("cli.train", *words, "--out_dir=parts", "--max_iters=4", "--lr_decay_iters=8")
    copy.run("cli.train", "--init_from=resume", "--out_dir=parts", "--dataset=counting", "--max_iters=8")
    whole, parts = (load_file(tmp_path / run / "step-00000008" / "model.safetensors") for run in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    moments = load_file(tmp_path / "whole" / "step-00000008" / "optimizer.safetensors")
    assert {name.rpartition("/")[2] for name in moments} <= {"momentum", "step"} and len(moments) >= len(whole)
    rates = [json.loads(line).get("lr") for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert any(rate == pytest.approx(1e-2 / 8**0.5) for rate in rates if rate)  # that of step 7

    assert "memory" in copy.run("cli.plan", *words)
    assert "val" in copy.run("cli.evaluate", "--out_dir=whole", "--dataset=counting")
    (tmp_path / "decode.py").write_text(DECODE)
    assert "own forward" not in copy.run("decode.py")
    refused = copy.run("cli.export", "--out_dir=whole", "--format=hf", "--output=exported", code=2)
    assert "is not supported by" in refused and "c_gate" in refused
    other = copy.run("cli.train", "--init_from=resume", "--out_dir=parts", "--dataset=counting", "--max_iters=9",
                     "--optimizer_type=adamw", code=2)  # fmt: skip
    assert "lion" in other and len(other.strip().splitlines()[-1]) < 400
