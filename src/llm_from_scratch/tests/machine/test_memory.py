"""Reused memory: only of tensors that nobody holds."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from llm_from_scratch.machine.memory import LEAST_REUSED, ReusedMemory, empty, empty_like

SHAPE = (LEAST_REUSED // 32, 8)  # of float32


def test_memory_is_reused_when_nothing_holds_a_tensor_in_it() -> None:
    with ReusedMemory():
        first, second = empty(SHAPE, torch.float32), empty(SHAPE, torch.float32)
        places = [t.data_ptr() for t in (first, second)]
        assert places[0] != places[1]
        view = second[1:].t()
        del second
        assert empty(SHAPE, torch.float32).data_ptr() not in places  # a view holds it
        del view, first
        found = {empty((8, LEAST_REUSED // 64), torch.float64).data_ptr() for _ in range(3)}
        assert found == {places[0]}
        found = {empty_like(torch.ones(SHAPE)).data_ptr(), empty(SHAPE, torch.int32).data_ptr()}
        assert found == {places[0]}
        turned = torch.ones(SHAPE).t()
        assert empty_like(turned).stride() == turned.stride()
        small = empty((3,), torch.float32).data_ptr()
        assert small not in places and small % 4 == 0


def test_nothing_is_kept_outside_the_context_or_after_an_error() -> None:
    memory = ReusedMemory()
    first: Tensor = empty(SHAPE, torch.float32)
    assert not memory.blocks
    with memory, ThreadPoolExecutor(1) as other:
        first = empty(SHAPE, torch.float32)
        other.submit(empty, (2, *SHAPE), torch.float32).result()
    assert [len(same) for same in memory.blocks.values()] == [1]
    empty((3, *SHAPE), torch.float32)
    assert len(memory.blocks) == 1
    with pytest.raises(ZeroDivisionError), memory:
        1 / 0  # noqa: B018
    assert not memory.blocks
    first.fill_(1)
