"""Fixtures of the tests of kernels/."""

from __future__ import annotations

import dataclasses

import pytest

from llm_from_scratch.kernels import layers
from llm_from_scratch.kernels.compiled import Kernel


@pytest.fixture(params=["AVX2", "AVX-512"])
def level(kernel: Kernel, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    if request.param == "AVX-512" and not kernel.has_avx512:
        pytest.skip("this processor has no AVX-512")
    found = dataclasses.replace(kernel, has_avx512=request.param == "AVX-512")
    monkeypatch.setattr(layers, "load_kernel", lambda: found)
    return found
