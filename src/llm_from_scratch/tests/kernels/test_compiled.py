"""The compiled kernels of few rows: against float64, on every instruction set here, and when they cannot be had."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import itertools
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llm_from_scratch.config import GenerationConfig
from llm_from_scratch.errors import UserError
from llm_from_scratch.generation.generator import Generator
from llm_from_scratch.kernels import compiled
from llm_from_scratch.kernels.compiled import Kernel, find_kernel, to_int8

from ..memorised import TOKENIZER, memorised

N = 192  # inputs
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8]


def none(line: str) -> None:
    raise AssertionError(line)


def levels(kernel: Kernel) -> list[Kernel]:
    return [kernel] + [dataclasses.replace(kernel, has_avx512=False)] * kernel.has_avx512


def held(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    return to_int8(weight) if dtype == torch.int8 else (weight.to(dtype), None)


def by_hand(x: Tensor, weight: Tensor, scales: Tensor | None) -> Tensor:
    """In float64; of int8 with rows rounded to 127 steps of their largest number."""
    x, weight = x.double(), weight.double()
    if scales is not None:
        step = x.abs().amax(1, keepdim=True) / 127
        x, weight = torch.where(step > 0, (x / step).round() * step, 0), weight * scales.double()[:, None]
    return x @ weight.T


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_equal_float64(kernel: Kernel, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for here in levels(kernel):
        for rows, outputs in ((1, 1), (1, 70), (2, 5), (3, 16), (5, 131), (65, 7)):
            x, bias = torch.randn(rows, N) * torch.logspace(-3, 3, rows)[:, None], torch.randn(outputs)
            weight, scales = held(torch.randn(outputs, N), dtype)
            for b, rounds in itertools.product((bias, None), (True, False)[: 1 + (scales is not None)]):
                product = here.rows(weight, b, scales)
                assert product is not None
                product.round_rows(rounds)
                exact = weight.double() if scales is None else weight * scales.double()[:, None]
                expected = by_hand(x, weight, scales) if rounds else x.double() @ exact.T
                error = (product(x) - (expected if b is None else expected + b)).norm(dim=1)
                assert (error <= 1e-6 * (expected.norm(dim=1) + bias.norm())).all(), (here, rows, outputs, rounds)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_neighbours(kernel: Kernel, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(67 if dtype == torch.int8 else compiled.FEW, N)
    x[3, 5], x[9, 7], x[20] = torch.nan, torch.inf, 0
    weight, scales = held(torch.randn(37, N), dtype)
    for here in levels(kernel):
        product = here.rows(weight, torch.ones(37), scales)
        assert product is not None
        together = product(x)
        alone = torch.cat([product(row[None]) for row in x])
        torch.testing.assert_close(together, alone, rtol=0, atol=0, equal_nan=True)
        assert not together[[3, 9]].isfinite().any() and together[[2, 4, 8, 10]].isfinite().all()
        assert (together[20] == 1).all()


def test_threads_do_not_change_a_result(kernel: Kernel) -> None:
    torch.manual_seed(0)
    x, weight, before = torch.randn(1, N), torch.randn(1500, N), torch.get_num_threads()
    product = kernel.rows(weight, None)
    assert product is not None
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(product(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_edited_model_may_cast_its_rows(kernel: Kernel, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(256, N).to(dtype), torch.randn(256).to(dtype)
    product = kernel.rows(weight, bias)
    assert product is not None
    for rows in (1, 3, compiled.FEW + 1):
        x = torch.randn(rows, N).to(dtype)
        found = product(x)
        assert found.dtype == dtype
        torch.testing.assert_close(found, torch.nn.functional.linear(x, weight, bias), rtol=0.02, atol=0.1)


def test_a_matrix_that_does_not_fit_is_refused(kernel: Kernel) -> None:
    assert kernel.rows(torch.randn(8, 65), None) is None
    assert kernel.rows(torch.randn(64, 8).t(), None) is None
    assert kernel.rows(torch.randn(8, 64).double(), None) is None


@pytest.mark.parametrize("how", ["float32", "float16", "int8"])
def test_a_model_continues_its_text_as_with_torch(
    kernel: Kernel, how: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for wanted in ("torch", "compiled"):
        monkeypatch.setenv(compiled.VARIABLE, wanted)
        model = copy.deepcopy(memorised("gpt2"))
        dtype = torch.float16 if how == "float16" else None
        generator = Generator(model, TOKENIZER, dtype=dtype, quantize="int8" if how == "int8" else "none")
        assert (generator.decoder.linears.kernel is not None) == (wanted == "compiled")
        prompts = [[1, 2, 3], [4], [5, 6]]
        texts.append(
            [s.tokens for s in generator.generate(prompts, GenerationConfig(max_new_tokens=12, temperature=0.0))]
        )
        assert generator.decoder.recorded.records and generator.decoder.recorded.failure is None
    assert texts[0] == texts[1] and capsys.readouterr().err == ""


def test_a_small_model_does_not_compile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(compiled.VARIABLE, "auto")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "load_kernel", lambda: pytest.fail("compiled"))
        assert Generator(memorised("modern"), TOKENIZER).decoder.linears.kernel is None
    if not compiled.lacking():
        place = compiled.library_path()
        place.parent.mkdir()
        place.touch()
        monkeypatch.setattr(compiled, "load_kernel", lambda: "damaged")
        assert Generator(memorised("modern"), TOKENIZER).decoder.linears.kernel is None
        assert "decoding with torch: damaged" in capsys.readouterr().err  # it uses a library that is there


@pytest.mark.skipif(bool(compiled.lacking()), reason="no kernel here")
def test_a_small_model_needs_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compiled.VARIABLE, "auto")
    for place in ("x" * 5000, str(tmp_path / "file")):
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", place)
        assert find_kernel(none, large=False) is None
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert find_kernel(none, large=False) is None


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        (None, "there is no C compiler (CC, cc, gcc or clang)"),
        ("echo 'rows.c:1: fatal error: no header' >&2; exit 1", "rows.c:1: fatal error: no header)"),
        ("exit 0", "No such file or directory"),
        ("while [ $1 != -o ]; do shift; done; echo no library > $2", "file too short"),
    ],
)
def test_failures_are_one_line(
    compiler: str | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", script(tmp_path / "cc", compiler) if compiler else str(tmp_path / "none"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for wanted in ("auto", "compiled"):
        compiled.load_kernel.cache_clear()
        monkeypatch.setenv(compiled.VARIABLE, wanted)
        said: list[str] = []
        assert find_kernel(said.append) is None
        if wanted == "auto" and compiler is None:  # most machines without a compiler do not miss it
            assert said == []
        else:
            assert len(said) == 1 and said[0].startswith("decoding with torch: ") and reason in said[0]
    compiled.load_kernel.cache_clear()
    assert not list(tmp_path.glob("cache/*/.*"))


def test_a_file_that_fails_ends_the_other_compilers(tmp_path: Path) -> None:
    compiler = script(tmp_path / "cc", 'case "$*" in *rows.c) echo "error: here" >&2; exit 1;; esac; exec sleep 60')
    begin = time.monotonic()
    with pytest.raises(OSError, match="error: here"):
        compiled.compile_library([compiler], tmp_path / "cache" / "made.so")
    assert time.monotonic() - begin < 30


def test_the_compiler_may_have_several_words(kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (made,) = (Path(os.environ["XDG_CACHE_HOME"]) / "gptsmith").iterdir()
    wrapper, commands = script(tmp_path / "my wrapper", 'exec "$@"'), []

    def build(compiler: list[str], path: Path) -> None:
        commands.append(compiler)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.write_bytes(made.read_bytes())

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiled, "compile_library", build)
    for words in ([wrapper, "gcc"], [wrapper, "gcc", "-DA"]):
        monkeypatch.setenv("CC", shlex.join(words))
        compiled.load_kernel.cache_clear()
        assert find_kernel(none) is not None and commands[-1] == words
    assert len(list((tmp_path / "gptsmith").iterdir())) == 2  # a library for each command
    monkeypatch.setenv("CC", "gcc '")
    assert compiled.compiler_here() is None
    monkeypatch.setenv("CC", "")
    assert compiled.compiler_here() is not None


def test_another_value_of_the_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compiled.VARIABLE, "fast")
    with pytest.raises(UserError, match="LLM_KERNEL=fast: expected auto, compiled or torch"):
        find_kernel(none)


def test_a_kernel_with_other_results_is_not_used(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiled.is_right(kernel)

    def wrong(address: int, x: int, y: int, rows: int, threads: int) -> int:
        done = kernel.multiply(address, x, y, rows, threads)
        torch.frombuffer((ctypes.c_float * 4).from_address(y), dtype=torch.float32)[3] += 0.1
        return done

    assert not compiled.is_right(dataclasses.replace(kernel, multiply=wrong))


def test_the_library_is_kept_whole_and_private(kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (made,) = (Path(os.environ["XDG_CACHE_HOME"]) / "gptsmith").iterdir()
    folder = tmp_path / "gptsmith"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def build(compiler: list[str], path: Path) -> None:  # a new file, as the compiler makes
        path.unlink()
        path.write_bytes(made.read_bytes())

    monkeypatch.setattr(compiled, "compile_library", build)
    (folder / made.name).write_bytes(made.read_bytes()[:40])  # damaged: built again
    compiled.load_kernel.cache_clear()
    assert find_kernel(none) is not None
    folder.chmod(0o777)
    compiled.load_kernel.cache_clear()
    said: list[str] = []
    assert find_kernel(said.append) is None and "can be written by other users" in said[0]


@pytest.mark.slow
def test_processes_that_compile_at_once(tmp_path: Path) -> None:
    program = (
        "from llm_from_scratch.kernels.compiled import find_kernel\n" "import sys; sys.exit(find_kernel(print) is None)"
    )
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path), compiled.VARIABLE: "compiled"}
    if compiled.lacking():
        pytest.skip(str(compiled.lacking()))
    runs = [subprocess.Popen([sys.executable, "-c", program], env=env, stdout=subprocess.PIPE) for _ in range(3)]
    assert [(run.communicate()[0], run.returncode) for run in runs] == [(b"", 0)] * 3
    assert [path.suffix for path in (tmp_path / "gptsmith").iterdir()] == [".so"]
