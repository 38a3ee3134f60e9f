"""machine/device.py: what is chosen for a machine, and what is refused."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

from llm_from_scratch.config import GPTConfig, SystemConfig
from llm_from_scratch.core.model import GPT
from llm_from_scratch.errors import UserError
from llm_from_scratch.machine import device as runtimes
from llm_from_scratch.machine.device import distributed_env, resolve, resolve_device, resolve_dtype, start, stop

CPU = torch.device("cpu")


class Cuda:
    """A machine with CUDA devices, as far as the choices go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int = 2, bf16: bool = True, name: str = "NVIDIA H200"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation
        )
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)


@pytest.fixture
def no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    Cuda(monkeypatch, count=0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def env(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)


TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


def test_a_plain_machine(no_accelerator: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "cpu_has_native_bf16", lambda: False)
    found = resolve(SystemConfig())
    assert (found.device, found.dtype, found.compile) == (CPU, torch.float32, False)
    assert (found.rank, found.world_size, found.backend, found.is_master) == (0, 1, "gloo", True)
    assert found.peak_flops is None
    assert found.reasons["device"] == "cpu (chosen for this machine)"
    assert resolve(SystemConfig(device="cpu")).reasons["device"] == "cpu (as set)"
    assert resolve(SystemConfig(compile=True)).compile and not resolve(SystemConfig(compile=True)).compile_may_fail


def test_a_machine_with_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    Cuda(monkeypatch)
    monkeypatch.setattr(runtimes, "has_triton", lambda: True)
    found = resolve(SystemConfig())
    assert (found.device.type, found.dtype, found.compile, found.compile_may_fail) == (
        "cuda",
        torch.bfloat16,
        True,
        True,
    )
    assert found.peak_flops == 989e12 and "NVIDIA H200" in found.reasons["device"]
    assert not resolve(SystemConfig(compile=False)).compile
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match="torch finds only cuda:0 to cuda:1"):
        resolve_device("cuda:2")
    monkeypatch.setattr(runtimes, "has_triton", lambda: False)
    assert not resolve(SystemConfig()).compile
    env(monkeypatch, **TORCHRUN)
    found = resolve(SystemConfig())
    assert (found.device, found.backend, found.is_master) == (torch.device("cuda:1"), "nccl", False)
    env(monkeypatch, LOCAL_RANK="2", RANK="2", WORLD_SIZE="3")
    with pytest.raises(UserError, match="torch finds only cuda:0 to cuda:1"):
        resolve(SystemConfig())


def test_an_old_gpu_uses_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    Cuda(monkeypatch, bf16=False, name="Tesla T4")
    assert resolve_dtype("auto", torch.device("cuda")) == torch.float16
    assert resolve(SystemConfig()).peak_flops == 65e12
    Cuda(monkeypatch, name="Unheard of")
    assert resolve(SystemConfig()).peak_flops is None


def test_absent_devices_are_refused(no_accelerator: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda", "cuda:0"):
        with pytest.raises(UserError, match=f"--device={name}: torch .* does not find a CUDA device; use --device=cpu"):
            resolve_device(name)
    with pytest.raises(UserError, match="does not find an Apple GPU"):
        resolve_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto").type == resolve_device("mps").type == "mps"
    env(monkeypatch, **TORCHRUN)
    with pytest.raises(UserError, match="cannot share an Apple GPU"):
        resolve(SystemConfig(device="mps"))


def test_torchruns_environment(monkeypatch: pytest.MonkeyPatch, no_accelerator: None) -> None:
    assert distributed_env() == (0, 0, 1)
    env(monkeypatch, **TORCHRUN)
    assert distributed_env() == (1, 1, 2)
    assert resolve(SystemConfig()).backend == "gloo"
    with pytest.raises(UserError, match="--backend=nccl needs CUDA devices"):
        resolve(SystemConfig(backend="nccl"))


@pytest.mark.parametrize("missing", TORCHRUN)
def test_a_half_set_environment_is_refused(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    env(monkeypatch, **TORCHRUN)
    for unset in ("", None):
        monkeypatch.setenv(missing, "") if unset == "" else monkeypatch.delenv(missing)
        with pytest.raises(UserError, match=f"is incomplete: {missing} missing; start with torchrun"):
            distributed_env()


@pytest.mark.parametrize(
    "change", [{"RANK": "2"}, {"RANK": "-1"}, {"WORLD_SIZE": "x"}, {"LOCAL_RANK": "-1"}, {"WORLD_SIZE": "0"}]
)
def test_an_impossible_environment_is_refused(change: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    env(monkeypatch, **{**TORCHRUN, **change})
    with pytest.raises(UserError):
        distributed_env()


@pytest.mark.parametrize(
    ("dtype", "result"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float16")]
)
def test_products_are_in_the_dtype_and_weights_in_float32(dtype: str, result: str) -> None:
    model = GPT(GPTConfig(block_size=4, vocab_size=7, n_layer=1, n_head=2, n_embd=8))
    seen = []
    model.transformer.h[0].mlp.c_fc.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    runtime = resolve(SystemConfig(device="cpu", dtype=dtype))  # type: ignore[arg-type]
    runtime.place(model)
    with runtime.autocast():
        _, loss = model(torch.zeros(2, 4, dtype=torch.long), torch.zeros(2, 4, dtype=torch.long))
    loss.backward()
    assert seen == [getattr(torch, result)] and loss.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize("native", [True, False])
def test_a_processor_that_multiplies_bfloat16_trains_in_it(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "cpu_has_native_bf16", lambda: native)
    runtime = resolve(SystemConfig(device="cpu"))
    assert runtime.dtype == (torch.bfloat16 if native else torch.float32)
    assert resolve(SystemConfig(device="cpu", dtype="float32")).dtype == torch.float32


@pytest.mark.parametrize(
    ("capability", "isa", "native"),
    [("AVX512", None, True), ("AVX2", None, False), ("AVX512", "avx2", False), ("AVX512", "AVX512_CORE_BF16", True)],
)
def test_bfloat16_is_native_only_if_torch_uses_it(
    capability: str, isa: str | None, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if isa is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)
    assert runtimes.cpu_has_native_bf16() is native
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert not runtimes.cpu_has_native_bf16()


def test_emulated_bfloat16_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    for native in (True, False):
        monkeypatch.setattr(runtimes, "cpu_has_native_bf16", lambda native=native: native)
        reasons = resolve(SystemConfig(device="cpu", dtype="bfloat16")).reasons
        assert ("float32 is faster" in reasons["dtype"]) is not native
    assert isinstance(runtimes.cpu_has_native_bf16(), bool)


def test_start_applies_threads_and_seed() -> None:
    config = SystemConfig(device="cpu", threads=2, seed=5)
    start(resolve(config), config)
    assert torch.get_num_threads() == 2
    drawn = torch.rand(3)
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(5)))
    stop()  # without a process group there is nothing to leave


def test_ranks_start_from_different_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    drawn = []
    for rank in (0, 1):
        fake: Any = types.SimpleNamespace(device=CPU, world_size=2, rank=rank, backend="gloo", threads=None)
        start(fake, SystemConfig(seed=5))
        drawn.append(torch.rand(3))
    assert not torch.equal(*drawn)
