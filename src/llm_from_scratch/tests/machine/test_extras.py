"""machine/extras.py: a missing package is named in one line."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llm_from_scratch.errors import UserError
from llm_from_scratch.machine.extras import OLDEST_TORCH, REQUIRED, install_command, require

ROOT = Path(__file__).resolve().parents[4]
HIDE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide())
"""


@pytest.mark.parametrize("script", ["train.py", "sample.py", "bench.py", "model.py"])
def test_a_script_of_the_checkout_names_the_missing_package(script: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("HIDDEN = {'tyro', 'rich', 'yaml'}\n" + HIDE)
    done = subprocess.run(
        [sys.executable, str(ROOT / script)], env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: packages are missing; install them with: pip install tyro rich pyyaml\n"


def test_the_required_packages_match_the_project() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert sorted(REQUIRED.values()) == sorted(re.split(r"[<>=!]", name)[0] for name in declared)
    assert "torch>={}.{}".format(*OLDEST_TORCH) in declared


@pytest.mark.parametrize("version, code", [("2.5.1+cpu", 2), ("2.10.0", 0)])
def test_a_torch_that_is_too_old_is_named(version: str, code: int, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").touch()
    (tmp_path / "torch/version.py").write_text(f"__version__ = '{version}'\n")
    program = "from llm_from_scratch.machine.extras import stop_without_required as stop; stop()"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT / 'src'}"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    error = f"error: torch {version} is older than 2.6; install a newer one with: pip install 'torch>=2.6'\n"
    assert (done.returncode, done.stderr) == (code, error if code else "")


def test_a_missing_extra_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as error:
        require("no_such_package", "hf", "this", "do that")
    assert str(error.value) == "this needs the package no_such_package: pip install -e '.[hf]', or do that"
    monkeypatch.chdir(tmp_path)
    assert install_command("hf") == f"pip install -e '{ROOT}[hf]'"


def test_an_installed_package_names_its_distribution(tmp_path: Path) -> None:
    for name in ("__init__.py", "errors.py", "machine/__init__.py", "machine/extras.py"):
        target = tmp_path / "llm_from_scratch" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "src" / "llm_from_scratch" / name, target)
    program = "from llm_from_scratch.machine.extras import install_command; print(install_command('hf'))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    declared = re.search(r'^name = "(.*)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert declared and done.stdout == f"pip install '{declared[1]}[hf]'\n", done.stderr
