"""cli/profiling.py: the kind that an operation is counted as, and the sums of a GPU's kernels."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from llm_from_scratch.cli.profiling import Spent, read
from llm_from_scratch.config import GPTConfig
from llm_from_scratch.core.model import GPT, NextTokenLoss
from llm_from_scratch.kernels.cross_entropy import ChunkedLoss
from llm_from_scratch.kernels.swap import swap


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["aten::mm", "aten::matmul", "aten::linear", "ProfilerStep*"], "matrix products"),
        (["aten::addmm"], "matrix products"),
        (["aten::_scaled_mm", "Float8Product"], "matrix products"),
        (["nvjet_sm90_tst_128x256_64x4_1x2_h_bz_coopA_NNT"], "matrix products"),
        (["void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>"], "matrix products"),
        (["triton_tem_fused_mm_7"], "matrix products"),
        (["aten::bmm", "CausalAttention"], "attention"),
        (["void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits>"], "attention"),
        (["cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7_64x128x64"], "attention"),
        (["aten::mm", "_LinearCrossEntropy"], "matrix products of head and loss"),
        (["aten::exp", "_LinearCrossEntropyBackward"], "loss"),
        (["triton_red_fused__log_softmax_nll_loss_forward_3"], "loss"),
        (["aten::bmm", "Optimizer.step#Muon.step", "ProfilerStep*"], "optimizer"),
        (["void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>"], "optimizer"),
        (["aten::linalg_vector_norm", "clipping"], "optimizer"),
        (["aten::copy_", "aten::to", "data"], "data"),
        (["Memcpy HtoD (Pinned -> Device)", "aten::copy_", "data"], "data"),
        (["aten::copy_", "aten::_to_copy"], "copies and casts"),
        (["Memset (Device)"], "copies and casts"),
        (["triton_poi_fused__to_copy_t_2"], "copies and casts"),
        (["triton_per_fused__to_copy_native_layer_norm_4"], "norms, activations, other"),
        (["aten::gelu"], "norms, activations, other"),
        (["aten::_fused_rms_norm"], "norms, activations, other"),
        (["ProfilerStep*"], "Python between operations"),
    ],
)
def test_the_kind_of_an_operation(names: list[str], kind: str) -> None:
    assert Spent(tuple(names), 1.0).kind == kind


def on_cpu(name: str, caller: Any = None, kernels: Any = ()) -> Any:
    seen = [types.SimpleNamespace(name=name, duration=float(duration)) for name, duration in kernels]
    kind = types.SimpleNamespace(name="CPU")
    return types.SimpleNamespace(name=name, cpu_parent=caller, kernels=seen, device_type=kind, is_user_annotation=False)


def on_gpu(name: str, start: float, end: float, annotation: bool = False) -> Any:
    span = types.SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    kind = types.SimpleNamespace(name="CUDA")
    return types.SimpleNamespace(name=name, time_range=span, device_type=kind, is_user_annotation=annotation)


def test_kernels_and_the_time_between_them() -> None:
    step = on_cpu("ProfilerStep#10")
    adamw = on_cpu("aten::_fused_adamw_", on_cpu("Optimizer.step#AdamW.step", step), [("apply", 30)])
    events = [
        step,
        on_cpu("aten::mm", step, [("nvjet_a", 40)]),
        adamw,
        on_gpu("ProfilerStep#10", 0, 200, annotation=True),
        on_gpu("nvjet_a", 100, 140),
        on_gpu("nvjet_a", 120, 160),  # on another stream, launched by a graph
        on_gpu("apply", 170, 200),
        on_gpu("gelu", 220, 230),
    ]
    found = read(events, 2)
    assert found.by_kind == {
        "matrix products": 80, "optimizer": 30, "norms, activations, other": 10, "idle": 130 - (60 + 30 + 10)
    }  # fmt: skip
    assert found.microseconds == 130
    lines = [line.split() for line in found.lines(largest=1)]
    assert ["matrix", "products", "53.3%", "0.040"] in lines and lines[-1] == ["nvjet_a", "53.3%", "0.040", "1"]


def test_a_step_on_a_cpu_is_profiled_by_kind() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=4096, n_layer=2, n_head=2, n_embd=128))
    assert swap(model, {NextTokenLoss: ChunkedLoss}, print) == 1
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x = torch.randint(4096, (4, 64))
    plan = schedule(wait=1, warmup=1, active=2, repeat=1)
    with profile(activities=[ProfilerActivity.CPU], schedule=plan) as profiler:
        for _ in range(4):
            with record_function("data"):
                y = x.clone()
            model(y, y)[1].backward()
            optimizer.step()
            optimizer.zero_grad()
            profiler.step()
    found = read(profiler.events() or (), 2)
    expected = {"matrix products", "matrix products of head and loss", "loss", "attention", "optimizer", "data"}
    assert expected | {"norms, activations, other", "copies and casts"} <= set(found.by_kind)
    assert sum(found.by_kind.values()) == pytest.approx(found.microseconds, rel=0.05)  # each operation once
    assert found.by_kind["matrix products"] > found.by_kind["data"] and len(found.lines(largest=3)) <= 15
