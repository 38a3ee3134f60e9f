"""scripts/housekeeping.py: what clean and clean-all delete, and what they must keep."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[4]
SCRIPT = ROOT / "scripts" / "housekeeping.py"
pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="needs a checkout")

TRACKED = (
    "src/pkg/module.py",
    "data/shakespeare/prepare.py",
    "data/shakespeare/kept.bin",
    "data/processed/kept/README.md",
    "out-kept/step-00000001/notes.md",
    "build/kept.txt",
)
RAW = (
    "data/raw/book.txt",
    "data/raw/old/book.bin",
    "data/shakespeare/input.txt",
    "data/mine/notes.txt",
    "thesis/out.md",
)
PRODUCTS = (
    "out/metrics.jsonl",
    "out-demo/step-00000010/model.safetensors",
    "out-nano/ckpt.pt",
    "outs/first/.tmp-step-00000003/model.safetensors",
    "runs/one/metrics.jsonl",
    "data/processed/kept/train.bin",
    "data/processed/book/manifest.json",
    "data/cache/tokens.bin",
    "data/shakespeare/train.bin",
    "data/shakespeare/manifest.json",
    "data/mine/val.bin",
    "data/mine/meta.pkl",
    "out-kept/metrics.jsonl",
)
CACHES = (
    "src/pkg/__pycache__/module.pyc",
    "scripts/deep/down/.ipynb_checkpoints/tour.ipynb",
    ".pytest_cache/x",
    ".mypy_cache/3.12/y",
    ".coverage",
    "build/lib/module.py",
    "dist/pkg.whl",
    "src/pkg.egg-info/PKG-INFO",
)
# Not a run, though its name begins like one; environments; metadata without its .bin files.
OTHERS = ("outline/chapter.txt", ".venv/lib/x/__pycache__/y.pyc", "data/bare/manifest.json", "my.bin")


@pytest.fixture
def house() -> ModuleType:
    spec = importlib.util.spec_from_file_location("housekeeping_under_test", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "my checkout"
    for name in TRACKED + RAW + PRODUCTS + CACHES + OTHERS:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name, encoding="utf-8")
    git = ["git", "-C", str(root)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "-f", "--", *TRACKED], check=True)
    return root


def left(root: Path) -> set[str]:
    files = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    return {name for name in files if not name.startswith(".git/")}


def test_clean_deletes_caches_and_build_files_only(house: ModuleType, checkout: Path) -> None:
    assert house.main(["clean"], checkout) == 0
    assert left(checkout) == set(TRACKED + RAW + PRODUCTS + OTHERS)


def test_clean_all_deletes_only_reproducible_files(
    house: ModuleType, checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert house.main(["clean-all", "--yes"], checkout) == 0
    assert left(checkout) == set(TRACKED + RAW + OTHERS)
    listed = capsys.readouterr().out
    for name in ("out-demo", "out-nano", "outs/first", "runs/one", "data/cache", "data/mine/val.bin"):
        assert f"  {name}  (" in listed
    assert "out-kept  (" not in listed and "out-kept/metrics.jsonl  (" in listed

    assert house.main(["clean-all", "--yes"], checkout) == 0
    assert "no runs and no prepared data" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("answer", "deleted"), [("y", True), ("YES", True), ("n", False), ("", False), ("yolo", False)]
)
def test_clean_all_asks(
    house: ModuleType, checkout: Path, monkeypatch: pytest.MonkeyPatch, answer: str, deleted: bool
) -> None:
    before = left(checkout)
    monkeypatch.setattr("builtins.input", lambda prompt: answer)
    assert house.main(["clean-all"], checkout) == (0 if deleted else 1)
    assert (left(checkout) != before) is deleted


def test_clean_all_deletes_nothing_without_a_terminal(checkout: Path) -> None:
    (checkout / "scripts" / "housekeeping.py").write_bytes(SCRIPT.read_bytes())
    before = left(checkout)
    result = subprocess.run(
        [sys.executable, "scripts/housekeeping.py", "clean-all"],
        cwd=checkout,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: nothing was deleted") and result.stderr.count("\n") == 1
    assert left(checkout) == before


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_clean_all_does_not_follow_links(house: ModuleType, checkout: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "big disk"
    for name in ("run/step-00000001/x", "run/metrics.jsonl", "set/train.bin", "processed/book/train.bin"):
        (elsewhere / name).parent.mkdir(parents=True, exist_ok=True)
        (elsewhere / name).touch()
    before = left(elsewhere)
    (checkout / "out-linked").symlink_to(elsewhere / "run")
    (checkout / "data" / "linked").symlink_to(elsewhere / "set")
    (checkout / "runs" / "linked").symlink_to(elsewhere / "run")
    (checkout / "data" / "cache" / "to-raw").symlink_to(checkout / "data" / "raw")
    assert house.main(["clean-all", "--yes"], checkout) == 0
    assert left(elsewhere) == before
    assert not (checkout / "out-linked").is_symlink()
    assert (checkout / "data" / "raw" / "book.txt").exists()


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_clean_all_keeps_linked_raw_texts(house: ModuleType, checkout: Path) -> None:
    (checkout / "data" / "raw").rename(checkout / "data" / "processed" / "raw")
    (checkout / "data" / "raw").symlink_to(checkout / "data" / "processed" / "raw")
    assert house.main(["clean-all", "--yes"], checkout) == 0
    assert (checkout / "data" / "processed" / "raw" / "book.txt").exists()


def test_without_git_only_ignored_names_go(house: ModuleType, tmp_path: Path) -> None:
    for name in ("src/pkg/module.py", "data/shakespeare/prepare.py", "out/metrics.jsonl", "data/raw/book.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert house.main(["clean-all", "--yes"], tmp_path) == 0
    assert left(tmp_path) == {"src/pkg/module.py", "data/shakespeare/prepare.py", "data/raw/book.txt"}


def test_logs_names_every_run_with_a_log(house: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert house.main(["logs"], tmp_path) == 2
    assert "./just demo" in capsys.readouterr().err
    for name in ("out-demo", "runs/b"):
        (tmp_path / name / "tensorboard").mkdir(parents=True)
        (tmp_path / name / "metrics.jsonl").touch()
    assert house.main(["logs"], tmp_path) == 0
    spec = dict(entry.split(":", 1) for entry in capsys.readouterr().out.strip().split(","))
    assert spec == {name: str(tmp_path / name / "tensorboard") for name in ("out-demo", "runs/b")}


def test_loc_counts_the_path_and_fails_over_the_budget(
    house: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index, name in enumerate(house.ONE_HOUR_PATH):
        path = tmp_path / "src" / "llm_from_scratch" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x\n" * (200 + index), encoding="utf-8")
    assert house.main(["loc"], tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["200", "config.py"] and lines[-1].split() == ["1628", "of", "2000"]
    (tmp_path / "src" / "llm_from_scratch" / "config.py").write_text("x\n" * 573, encoding="utf-8")
    assert house.main(["loc"], tmp_path) == 1
    assert "2001" in capsys.readouterr().out
    (tmp_path / "src" / "llm_from_scratch" / "config.py").unlink()
    assert house.main(["loc"], tmp_path) == 1


@pytest.mark.parametrize("argv", [[], ["sweep"], ["clean", "--yes"], ["clean-all", "--force"]])
def test_other_words_are_refused(
    house: ModuleType, checkout: Path, argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = left(checkout)
    assert house.main(argv, checkout) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert left(checkout) == before
