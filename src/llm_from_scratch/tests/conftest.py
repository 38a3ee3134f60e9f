"""Fixtures of all tests: one thread per process, tiny datasets, and a working directory per test."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

# before torch is imported, and inherited by every process that a test starts
FOLDER = "LLM_TEST_SHARED"
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ.setdefault("LLM_KERNEL", "torch")  # a library that some test builds must not change the others
for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(name, None)  # the tests say themselves when they run under torchrun
os.environ.pop("LLM_ACTIVATE", None)  # or under ./just
gc.disable()  # until all tests are collected: what is imported stays

# Files that take longest, so that workers begin with them and none is left with one of these at the end.
LONGEST = (
    *("contract/test_readme.py", "training/test_distributed.py", "contract/test_llm_serve.py", "faults/test_storm.py"),
    *("contract/test_notebook.py", "contract/test_llm_prepare.py", "contract/test_train_command.py"),
    *("data/test_prepare.py", "parity/test_generation.py", "serving/test_life.py", "parity/test_hf.py"),
)
# One worker runs all of a folder whose tests import large packages (transformers, openai, optuna), the files that parse
# all sources, and those that need a browser.
TOGETHER = {"parity": "parity", "serving": "serving", "sweep": "sweep"}
TOGETHER |= {"test_architecture.py": "sources", "test_house.py": "sources"}
TOGETHER |= {"test_page.py": "page", "test_page_views.py": "page"}


def pytest_configure(config: pytest.Config) -> None:
    """Makes the folder that the workers share."""
    if FOLDER not in os.environ:
        os.environ[FOLDER] = tempfile.mkdtemp(prefix="llm-tests-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ.pop(FOLDER)))


def pytest_sessionstart(session: pytest.Session) -> None:
    """Each worker begins to import the tests at another place: pytest rewrites each file once, for all of them."""
    worker, count = os.environ.get("PYTEST_XDIST_WORKER", "gw0"), os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")
    tests = Path(__file__).parent
    if [(session.config.invocation_params.dir / argument).resolve() for argument in session.config.args] == [tests]:
        files = sorted(tests.rglob("test_*.py"))
        for path in files[len(files) * int(worker[2:]) // int(count) :] if worker != "gw0" else ():
            with contextlib.suppress(Exception, pytest.skip.Exception):  # reported when it is collected
                importlib.import_module(".".join([__package__, *path.relative_to(tests).with_suffix("").parts]))


@pytest.hookimpl(optionalhook=True)  # of xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadFileScheduling

    class Together(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return TOGETHER.get(Path(file).parent.name) or TOGETHER.get(Path(file).name, file)

    return Together(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.hookimpl(tryfirst=True)  # before tests are deselected
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, the others as they were. Cases after the first ones of `cases` are slow."""
    seen = Counter[tuple[Path, str]]()
    for item in items:
        if (few := item.get_closest_marker("cases")) and not item.get_closest_marker("slow"):
            seen[kind := (item.path, getattr(item, "originalname", item.name))] += 1
            if seen[kind] > few.args[0]:
                item.add_marker(pytest.mark.slow)
    here = Path(__file__).parent
    order = {here / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


def pytest_collection_finish() -> None:
    gc.enable()
    gc.freeze()  # the garbage collector need not look through torch and all tests again and again


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Back to one thread if a test (or --threads) chose another number."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def corpus() -> str:
    """Real English text: tiny Shakespeare of LLM_TEST_DATA_DIR, else the documentation that CPython carries."""
    path = Path(os.environ.get("LLM_TEST_DATA_DIR", "")) / "tinyshakespeare.txt"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    from pydoc_data import topics

    return "\n".join(text for _, text in sorted(topics.topics.items()))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared dataset: 2,000 training and 205 validation tokens of 20 characters, with the tokenizer."""
    from .tiny import write_data

    return write_data(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in which the test stands."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def kernel(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The compiled kernels, built once for all workers unless a training run has built it before. LLM_KERNEL is the
    module's KERNEL, or auto."""
    from llm_from_scratch.kernels import compiled

    if compiled.lacking():
        pytest.skip(str(compiled.lacking()))
    before = compiled.library_path() if compiled.is_built() else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(Path(os.environ[FOLDER]) / "kernel"))
        patch.setenv(compiled.VARIABLE, getattr(request.module, "KERNEL", "auto"))
        compiled.load_kernel.cache_clear()
        with FileLock(Path(os.environ[FOLDER]) / "kernel.lock"):
            if before is not None and not compiled.is_built():
                compiled.library_path().parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                shutil.copy(before, compiled.library_path())
            found = compiled.find_kernel(pytest.fail)
        assert found is not None
        yield found
        compiled.load_kernel.cache_clear()
