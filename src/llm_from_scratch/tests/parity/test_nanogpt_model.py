"""The model against nanoGPT's: names, order and values of the weights, and every method that scripts call.

Without a checkout of nanoGPT, the expected numbers are recorded results of its model (torch 2.13, CPU).
"""

import importlib.util
import inspect
import pickle
import pydoc_data.topics
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_from_scratch.config import GPTConfig
from llm_from_scratch.core.model import GPT
from llm_from_scratch.errors import UserError
from llm_from_scratch.tests.parity.reference import NANOGPT_DIR, nanogpt, needs_nanogpt, quietly

ROOT = Path(__file__).resolve().parents[4]
TINY: dict[str, Any] = {"block_size": 8, "vocab_size": 11, "n_layer": 2, "n_head": 2, "n_embd": 4, "dropout": 0.0}

LAYER = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]


def names(n_layer: int, bias: bool) -> list[str]:
    kinds = ["weight", "bias"] if bias else ["weight"]
    layers = [f"transformer.h.{i}.{module}.{kind}" for i in range(n_layer) for module in LAYER for kind in kinds]
    return ["transformer.wte.weight", "transformer.wpe.weight", *layers, *(f"transformer.ln_f.{k}" for k in kinds)]


def seeded(seed: int = 1337, **changes: Any) -> Any:
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{**TINY, **changes}))


@pytest.mark.parametrize("bias", [True, False])
def test_names_and_their_order(bias: bool) -> None:
    model = seeded(bias=bias)
    assert [name for name, _ in model.named_parameters()] == names(2, bias)  # optimizer states are stored in this order
    assert list(model.state_dict()) == [*names(2, bias), "lm_head.weight"]
    assert model.lm_head.weight is model.transformer.wte.weight


def test_initial_weights_from_a_seed() -> None:
    """The first numbers of each matrix as nanoGPT draws them after torch.manual_seed(1337)."""
    expected = {
        "transformer.wte.weight": [-0.0177939, -0.0306131, 0.036649],
        "transformer.wpe.weight": [-0.0109539, -0.0349655, -0.0028408],
        "transformer.h.0.attn.c_attn.weight": [-0.0072789, 0.0196636, 0.0471578],
        "transformer.h.0.attn.c_proj.weight": [-0.0018993, 0.0080974, -0.0030463],
        "transformer.h.0.mlp.c_fc.weight": [0.0001806, 0.019378, -0.0326668],
        "transformer.h.0.mlp.c_proj.weight": [-0.0019772, 0.0042025, 0.0055462],
        "transformer.h.1.attn.c_attn.weight": [0.0087152, 0.0081971, 0.0168038],
        "transformer.h.1.attn.c_proj.weight": [-0.0079733, -0.0081835, -0.0007492],
        "transformer.h.1.mlp.c_fc.weight": [0.0201787, 0.0064053, 0.008103],
        "transformer.h.1.mlp.c_proj.weight": [0.001362, 0.000982, -0.0010085],
    }
    for name, p in seeded(bias=True).named_parameters():
        if p.dim() == 2:
            assert p.flatten()[:3].tolist() == pytest.approx(expected[name], abs=1e-6), name
        else:
            assert torch.equal(p, torch.full_like(p, 0.0 if name.endswith("bias") else 1.0)), name


@needs_nanogpt
@pytest.mark.parametrize("shape", [{}, {"bias": False}, {"n_embd": 48, "n_head": 3, "n_layer": 3, "dropout": 0.2}])
def test_same_weights_logits_losses_and_gradients_as_nanogpt(shape: dict[str, Any]) -> None:
    module, sizes = nanogpt(), {**TINY, "bias": True, **shape}
    torch.manual_seed(7)
    theirs = quietly(module.GPT, module.GPTConfig(**sizes))
    ours = seeded(7, **sizes)
    for (name, a), (other, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other and torch.equal(a, b), name
    idx, targets = torch.randint(11, (3, 8)), torch.randint(-1, 11, (3, 8))
    results = []
    for model in (ours, theirs):
        torch.manual_seed(1)  # dropout draws the same numbers in the same order
        logits, loss = model(idx, targets)
        loss.backward()
        results.append((logits, loss))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7, msg=name)


@needs_nanogpt
def test_state_dicts_are_exchanged_with_nanogpt() -> None:
    module = nanogpt()
    theirs, ours = quietly(module.GPT, module.GPTConfig(**TINY)), seeded()
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(seeded(3).state_dict())


def test_without_targets_only_the_last_position() -> None:
    model, idx = seeded(), torch.randint(11, (3, 5))
    last, none = model(idx)
    every, loss = model(idx, idx)
    assert last.shape == (3, 1, 11) and none is None and every.shape == (3, 5, 11) and loss.dim() == 0
    torch.testing.assert_close(last[:, 0], every[:, -1])


IDX = torch.tensor([[1, 2], [3, 4]])


def to_sample() -> GPT:
    model = seeded(bias=True).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=1.0)  # so that the choice depends on the logits
    torch.manual_seed(5)
    return model


def generated() -> list[list[int]]:
    return to_sample().generate(IDX, 12, temperature=0.9, top_k=5).tolist()


# what nanoGPT's generate drew from the same seeds
GENERATED = [
    [1, 2, 10, 10, 2, 10, 10, 10, 10, 10, 10, 2, 10, 2],
    [3, 4, 10, 2, 4, 1, 10, 10, 10, 5, 9, 9, 9, 7],
]


def test_generate_past_the_context() -> None:
    rows = generated()
    model, drawn = to_sample(), IDX
    with torch.no_grad():
        for _ in range(12):
            logits = model(drawn[:, -8:])[0][:, -1] / 0.9
            logits[logits < logits.topk(5).values[:, -1:]] = -torch.inf
            drawn = torch.cat([drawn, torch.multinomial(logits.softmax(-1), 1)], 1)
    assert rows == drawn.tolist()
    if torch.__version__ >= "2.8":  # older ones draw other numbers from a seed
        assert rows == GENERATED


@needs_nanogpt
def test_generate_draws_the_same_as_nanogpt() -> None:
    module = nanogpt()
    torch.manual_seed(1337)
    model = quietly(module.GPT, module.GPTConfig(**TINY, bias=True)).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=1.0)
    torch.manual_seed(5)
    assert model.generate(torch.tensor([[1, 2], [3, 4]]), 12, temperature=0.9, top_k=5).tolist() == generated()


def test_top_k_keeps_all_ties() -> None:
    model = seeded()
    torch.nn.init.zeros_(model.lm_head.weight)  # all logits are equal, so top_k=1 forbids nothing
    torch.manual_seed(0)
    drawn = model.generate(torch.zeros(64, 1, dtype=torch.long), 1, top_k=1)[:, 1]
    assert drawn.unique().numel() == 11


def test_crop_block_size() -> None:
    model, idx = seeded(), torch.randint(11, (2, 4))
    before = model(idx)[0]
    config = model.config
    model.crop_block_size(4)
    assert config.block_size == 4 and model.transformer.wpe.weight.shape == (4, 4)
    torch.testing.assert_close(model(idx)[0], before)
    for wrong in (0, 5):
        with pytest.raises(UserError, match="block_size"):
            model.crop_block_size(wrong)
    with pytest.raises(UserError, match="block_size=4"):
        model(torch.randint(11, (2, 5)))


def test_get_num_params() -> None:
    # GPT-2's published 124M: 50257*768 + 1024*768 + 12 layers of 7,087,872 + ln_f 1536
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50257))
    assert model.get_num_params(non_embedding=False) == 124_439_808
    assert model.get_num_params() == 124_439_808 - 1024 * 768


def test_estimate_mfu() -> None:
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50304))
    # (6 N + 12 L H Q T) T flops a sequence, over an A100's 312e12 a second; N = 123,689,472 without positions
    per_sequence = (6 * 123_689_472 + 12 * 12 * 12 * 64 * 1024) * 1024
    assert model.estimate_mfu(480, 2.5) == pytest.approx(per_sequence * 480 / 2.5 / 312e12, rel=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_configure_optimizers(bias: bool) -> None:
    model = seeded(bias=bias)
    optimizer = quietly(model.configure_optimizers, 0.1, 3e-4, (0.9, 0.95), "cpu")
    assert isinstance(optimizer, torch.optim.AdamW)
    by_id = {id(p): name for name, p in model.named_parameters()}
    groups = [[by_id[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    matrices = [name for name, p in model.named_parameters() if p.dim() >= 2]
    assert groups == [matrices, [name for name in names(2, bias) if name not in matrices]]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert all(group["lr"] == 3e-4 and tuple(group["betas"]) == (0.9, 0.95) for group in optimizer.param_groups)
    assert all(group["eps"] == 1e-8 for group in optimizer.param_groups)


@pytest.mark.skipif(not (ROOT / "model.py").is_file(), reason="model.py lies in a checkout only")
def test_root_module_gives_nanogpts_names() -> None:
    spec = importlib.util.spec_from_file_location("root_model", ROOT / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.GPTConfig(**TINY, bias=False)  # as nanoGPT's scripts call it: GPTConfig(**model_args)
    torch.manual_seed(0)
    parts = [module.Block(config), module.CausalSelfAttention(config), module.MLP(config)]
    x = torch.randn(2, 8, 4)
    assert all(part(x).shape == x.shape for part in parts)
    torch.testing.assert_close(module.LayerNorm(4, bias=True)(x), torch.nn.LayerNorm(4)(x))
    assert module.LayerNorm(4, bias=False).bias is None
    assert module.GPT is GPT and module.GPTConfig is GPTConfig


def test_signatures_of_nanogpts_methods() -> None:
    """Positional calls of users' scripts: the first parameters are nanoGPT's, in its order."""
    expected = {
        "forward": ["self", "idx", "targets"],
        "generate": ["self", "idx", "max_new_tokens", "temperature", "top_k"],
        "crop_block_size": ["self", "block_size"],
        "configure_optimizers": ["self", "weight_decay", "learning_rate", "betas", "device_type"],
        "estimate_mfu": ["self", "fwdbwd_per_iter", "dt"],
        "get_num_params": ["self", "non_embedding"],
        "from_pretrained": ["model_type", "override_args"],
    }
    for name, parameters in expected.items():
        assert list(inspect.signature(getattr(GPT, name)).parameters)[: len(parameters)] == parameters, name
    assert list(inspect.signature(GPTConfig).parameters)[:7] == [
        "block_size",
        "vocab_size",
        "n_layer",
        "n_head",
        "n_embd",
        "dropout",
        "bias",
    ]


@needs_nanogpt
@pytest.mark.skipif(not (ROOT / "model.py").is_file(), reason="model.py lies in a checkout only")
def test_nanogpts_own_scripts_run_on_our_model_and_configurator(tmp_path: Path) -> None:
    """Its train.py and sample.py, unmodified, next to our model.py and configurator.py: same losses, same text."""
    source = Path(str(NANOGPT_DIR))
    printed = []
    for whose in (source, ROOT):
        folder = tmp_path / whose.name
        data = folder / "data" / "shakespeare_char"
        data.mkdir(parents=True)
        for name in ("train.py", "sample.py"):
            shutil.copy(source / name, folder)
        for name in ("model.py", "configurator.py"):
            (folder / name).symlink_to(whose / name)
        characters, ids = np.unique(list("".join(pydoc_data.topics.topics.values())[:20_000]), return_inverse=True)
        meta = {"stoi": {c: i for i, c in enumerate(characters.tolist())}, "itos": dict(enumerate(characters.tolist()))}
        (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(characters), **meta}))
        for split in ("train", "val"):
            ids.astype(np.uint16).tofile(data / f"{split}.bin")
        settings: dict[str, Any] = {
            "eval_iters": 1,
            "log_interval": 1,
            "block_size": 16,
            "batch_size": 4,
            "n_layer": 1,
            "n_head": 2,
        }
        settings |= {"n_embd": 16, "max_iters": 4, "eval_interval": 2, "lr_decay_iters": 4, "device": "cpu"}
        options = [
            f"--{key}={value}" for key, value in (settings | {"compile": False, "always_save_checkpoint": True}).items()
        ]
        commands = [
            ["train.py", str(source / "config" / "train_shakespeare_char.py"), *options],
            ["sample.py", "--out_dir=out-shakespeare-char", "--device=cpu", "--num_samples=1", "--max_new_tokens=30"],
        ]
        lines: list[str] = []
        for command in commands:
            done = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, check=True)
            lines += done.stdout.splitlines()
        told = [line for line in lines if line.startswith(("step ", "iter "))]
        text = lines[[line.startswith("Loading meta") for line in lines].index(True) :]
        printed.append([re.sub(r"time [\d.]+ms.*", "", line) for line in told + text])
    assert len(printed[0]) > 10 and printed[0][0].startswith("step 0: train loss")
    assert printed[0] == printed[1]
