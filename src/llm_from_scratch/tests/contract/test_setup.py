"""The set-up: the wrapper `just`, scripts/install.py and the justfile, with stubs in place of every tool they call.

Nothing here installs or downloads. The stubs write each call to a log, a line each, as `tool arg|arg|...`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[4]
pytestmark = [
    pytest.mark.skipif(not (ROOT / "justfile").is_file(), reason="needs a checkout"),
    pytest.mark.skipif(os.name == "nt", reason="the wrapper is for POSIX shells"),
]

RECIPES = {
    "setup", "install-dev", "format", "lint", "test", "test-all", "test-torch", "test-cov", "pre-commit",
    "prepare-data", "train", "train-quick", "train-full", "train-with-config", "generate", "serve", "tensorboard",
    "notebook", "check-gpu", "demo", "bench", "loc", "clean", "clean-all", "storm", "docs",
}  # fmt: skip

LOGGED = '{ printf "%s " "${0##*/}"; printf "%s|" "$@"; echo; } >>"$STUB_LOG"\n'

# The system's python3: makes an environment of stubs. STUB_LACKS names what it is asked to lack.
SYSTEM_PYTHON = f"""#!/bin/sh
{LOGGED}
case "$*" in
    *version_info*) [ "$STUB_LACKS" != version ] ;;
    *ensurepip*) [ "$STUB_LACKS" != ensurepip ] ;;
    --version) echo Python 3.12.0 ;;
    "-m venv --clear "*)
        rm -rf "$4" && mkdir -p "$4/bin" && : >"$4/pyvenv.cfg" && cp "$STUBS/venv-python" "$4/bin/python"
        ;;
    *) echo "unexpected: $*" >&2; exit 9 ;;
esac
"""

VENV_PYTHON = f"""#!/bin/sh
{LOGGED}
here=${{0%/*}}
case "$*" in
    *version_info*) ;;
    "-m pip --version") [ ! -e "$here/no-pip" ] ;;
    "-m ensurepip") [ -e "$here/ensurepip-works" ] && rm "$here/no-pip" ;;
    "-m pip install"*) [ "$STUB_LACKS" != network ] && cp "$STUBS/tool" "$here/uv" && cp "$STUBS/tool" "$here/just" ;;
    scripts/housekeeping.py*) exec "$REAL_PYTHON" "$@" ;;
    scripts/install.py*) ;;
    -m*) ;;
    *) echo "unexpected: $*" >&2; exit 9 ;;
esac
"""

TOOL = f"""#!/bin/sh
{LOGGED}
echo "VIRTUAL_ENV=${{VIRTUAL_ENV-unset}}" >>"$STUB_LOG"
"""


def write_script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


class Checkout:
    """A copy of the set-up's files in a folder with a space in its name, next to a folder of stubs."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "my checkout"
        self.venv = self.root / ".venv"
        self.stubs = folder / "stubs"
        self.log = folder / "log"
        self.root.mkdir()
        for name in ("just", "justfile", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.root / name)
        shutil.copytree(ROOT / "scripts", self.root / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
        write_script(self.stubs / "python3", SYSTEM_PYTHON)
        write_script(self.stubs / "venv-python", VENV_PYTHON)
        write_script(self.stubs / "tool", TOOL)
        # The tools that the wrapper may count on, and no other: in particular no other python3.
        for name in ("sh", "dirname", "ln", "readlink", "rm", "sleep", "mkdir", "cp", "git"):
            found = shutil.which(name)
            if found:
                (self.stubs / name).symlink_to(found)
        self.environment = {
            "PATH": str(self.stubs),
            "STUBS": str(self.stubs),
            "STUB_LOG": str(self.log),
            "STUB_LACKS": "",
            "REAL_PYTHON": sys.executable,
            "HOME": str(folder),
        }

    def run(self, *args: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["/bin/sh", str(self.root / "just"), *args],
            cwd=cwd or self.root,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
        )

    def calls(self) -> list[str]:
        """What was called since the last look, without the wrapper's checks of Python's version."""
        lines = self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return [line for line in lines if "version_info" not in line]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


MADE = "python3 -m|venv|--clear|{venv}|"
TOOLS = "python -m|pip|install|-qq|--disable-pip-version-check|--force-reinstall|uv|rust-just|"


def test_wrapper_is_an_executable_posix_script() -> None:
    assert os.access(ROOT / "just", os.X_OK)
    for shell in ("sh", "dash"):
        if shutil.which(shell):
            assert subprocess.run([shell, "-n", str(ROOT / "just")]).returncode == 0


def test_wrapper_makes_the_environment_once_and_hands_over(checkout: Checkout, tmp_path: Path) -> None:
    first = checkout.run("demo", "--start=two words", "*", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    calls = checkout.calls()
    assert MADE.format(venv=checkout.venv) in calls
    assert TOOLS in calls
    handed = f"just --justfile|{checkout.root}/justfile|demo|--start=two words|*|"
    assert calls[-2] == handed
    assert not (checkout.root / ".venv.lock").is_symlink()

    second = checkout.run("demo", "--start=two words", "*")
    assert checkout.calls() == [handed, "VIRTUAL_ENV=unset"]
    assert second.stderr == ""


def test_wrapper_ignores_a_foreign_environment(checkout: Checkout, tmp_path: Path) -> None:
    result = checkout.run("test", VIRTUAL_ENV=str(tmp_path / "theirs"), PYTHONHOME=str(tmp_path), PIP_TARGET="/nowhere")
    assert result.returncode == 0, result.stderr
    assert checkout.calls()[-1] == "VIRTUAL_ENV=unset"
    assert not (tmp_path / "theirs").exists()


def test_bootstrap_stops_before_just(checkout: Checkout) -> None:
    assert checkout.run("--bootstrap").returncode == 0
    assert (checkout.venv / "bin" / "just").exists()
    assert not any(call.startswith("just ") for call in checkout.calls())


def empty(venv: Path) -> None:
    shutil.rmtree(venv)
    venv.mkdir()


def broken_link(venv: Path) -> None:
    (venv / "bin" / "python").unlink()
    (venv / "bin" / "python").symlink_to(venv / "gone")


def no_configuration(venv: Path) -> None:
    (venv / "pyvenv.cfg").unlink()


def no_pip_at_all(venv: Path) -> None:
    (venv / "bin" / "uv").unlink()
    (venv / "bin" / "no-pip").touch()


def moved(venv: Path) -> None:
    (venv / "made-in").write_text("/where/it/was\n", encoding="utf-8")


@pytest.mark.parametrize("damage", [empty, broken_link, no_configuration, no_pip_at_all, moved])
def test_wrapper_replaces_a_broken_environment(checkout: Checkout, damage: Callable[[Path], None]) -> None:
    checkout.run("--bootstrap")
    damage(checkout.venv)
    checkout.calls()
    result = checkout.run("loc")
    assert result.returncode == 0, result.stderr
    calls = checkout.calls()
    assert MADE.format(venv=checkout.venv) in calls and TOOLS in calls
    assert calls[-2].startswith("just ")


def test_wrapper_does_not_clear_the_environment_behind_a_link(checkout: Checkout, tmp_path: Path) -> None:
    checkout.run("--bootstrap")
    other = checkout.venv.rename(tmp_path / "other")
    moved(other)
    checkout.venv.symlink_to(other)
    result = checkout.run("loc")
    assert result.returncode == 2 and "remove the link" in result.stderr
    assert (other / "bin" / "just").exists()


@pytest.mark.parametrize("lost", ["uv", "just"])
def test_wrapper_installs_a_missing_tool(checkout: Checkout, lost: str) -> None:
    """Packages that were installed with care stay: neither a lost tool nor a lost pip costs the environment."""
    checkout.run("--bootstrap")
    for name in ("no-pip", "ensurepip-works"):
        (checkout.venv / "bin" / name).touch()
    (checkout.venv / "bin" / lost).unlink()
    checkout.calls()
    assert checkout.run("loc").returncode == 0
    calls = checkout.calls()
    assert "python -m|ensurepip|" in calls and TOOLS in calls
    assert MADE.format(venv=checkout.venv) not in calls


@pytest.mark.parametrize(
    ("lacks", "words"),
    [("ensurepip", "apt install python3-venv"), ("version", "older than 3.10"), ("network", "check the network")],
)
def test_wrapper_names_the_missing_tool(checkout: Checkout, lacks: str, words: str) -> None:
    result = checkout.run("demo", STUB_LACKS=lacks)
    assert result.returncode == 2
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ") and words in last
    assert not (checkout.root / ".venv.lock").is_symlink()
    assert checkout.venv.exists() == (lacks == "network")
    assert checkout.run("demo").returncode == 0  # the next try finds nothing in its way


def test_wrapper_without_python(checkout: Checkout) -> None:
    (checkout.stubs / "python3").unlink()
    result = checkout.run("demo")
    assert (result.returncode, result.stderr) == (2, "error: python3 was not found: install Python 3.10 or newer\n")


def test_wrapper_takes_over_the_lock_of_a_dead_process(checkout: Checkout) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (checkout.root / ".venv.lock").symlink_to(str(dead.pid))
    assert checkout.run("--bootstrap").returncode == 0
    assert not (checkout.root / ".venv.lock").is_symlink()


def test_wrapper_waits_for_another_one(checkout: Checkout) -> None:
    holder = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    (checkout.root / ".venv.lock").symlink_to(str(holder.pid))
    waiting = subprocess.Popen(
        ["/bin/sh", str(checkout.root / "just"), "--bootstrap"],
        env=checkout.environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert waiting.stderr is not None
        assert f"process {holder.pid}" in waiting.stderr.readline()
        assert not checkout.venv.exists()
        holder.communicate(b"\n")
        assert waiting.wait(timeout=20) == 0
        assert (checkout.venv / "bin" / "uv").exists()
    finally:
        for process in (holder, waiting):
            if process.poll() is None:
                process.kill()
                process.wait()
        waiting.communicate()


# --- scripts/install.py ---


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The installer of a checkout without GPU, folders of wheels or network, whose uv is a stub."""
    spec = importlib.util.spec_from_file_location("install_under_test", ROOT / "scripts" / "install.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "pyproject.toml").write_text("[project]\n", encoding="utf-8")
    (tmp_path / "constraints.txt").write_text("# pins\ntorch==9.8.7\n", encoding="utf-8")
    # The stub plans the wheel that STUB_WHEEL names, and fails if a call contains STUB_FAILS.
    write_script(
        tmp_path / "uv",
        f"""#!/bin/sh
{LOGGED}
echo "links=${{UV_FIND_LINKS-unset}}" >>"$STUB_LOG"
case "$*" in
    *"$STUB_FAILS"*) exit 1 ;;
    *--dry-run*) [ -n "$STUB_WHEEL" ] && echo " + torch==$STUB_WHEEL" >&2 ;;
esac
""",
    )
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "BIN", tmp_path)
    monkeypatch.setattr(module, "STAMP", tmp_path / "stamp.json")
    monkeypatch.setattr(module, "already_there", lambda torch: False)
    monkeypatch.setattr(module, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(module, "cpu_index_has", lambda torch: False)
    monkeypatch.setattr(module, "pip_listing", lambda: "")
    monkeypatch.setattr(module.sys, "platform", "linux")
    for name, value in {"STUB_LOG": str(tmp_path / "log"), "STUB_FAILS": "never", "STUB_WHEEL": ""}.items():
        monkeypatch.setenv(name, value)
    for name in ("UV_FIND_LINKS", "UV_DEFAULT_INDEX", "UV_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    return module


def uv_calls(folder: Path) -> list[str]:
    """The arguments of each call of uv after `pip install --python X`, with its folders of wheels."""
    log = folder / "log"
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    prefix = f"uv pip|install|--python|{sys.executable}|"
    assert all(line.startswith(prefix) for line in lines[::2])
    return [f"{line[len(prefix):-1]} {links}" for line, links in zip(lines[::2], lines[1::2], strict=True)]


REST = "-c|constraints.txt|-e|.[dev] links=unset"


def test_folders_of_wheels_reach_uv(install: ModuleType) -> None:
    listing = (
        "global.find-links='/global'\n:env:.find-links='/a /b'\ninstall.find-links='/c\\n/d'\nglobal.odd=nothing\n"
    )
    assert install.pip_settings(listing) == {"find-links": "/a /b"}
    assert install.uv_environment({}, {"find-links": "/a /b"}) == {"UV_FIND_LINKS": "/a,/b"}
    assert (
        install.uv_environment({}, install.pip_settings("install.find-links='\\n/c\\n/d'\n"))["UV_FIND_LINKS"]
        == "/c,/d"
    )
    own = {"UV_FIND_LINKS": "/own,/b", "VIRTUAL_ENV": "/theirs"}
    assert install.uv_environment(own, {"find-links": "/a /b"}) == {"UV_FIND_LINKS": "/own,/b,/a"}
    assert install.uv_environment({}, {}) == {}


def test_the_index_of_pip_reaches_uv_unless_uv_has_its_own(install: ModuleType) -> None:
    pip = {"index-url": "https://one.example/simple"}
    assert install.uv_environment({}, pip) == {"UV_DEFAULT_INDEX": "https://one.example/simple"}
    assert install.uv_environment({"UV_INDEX_URL": "x"}, pip) == {"UV_INDEX_URL": "x"}


@pytest.mark.slow
def test_pip_config_is_read_as_pip_prints_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("install_listing", ROOT / "scripts" / "install.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    pytest.importorskip("pip")
    monkeypatch.setenv("PIP_FIND_LINKS", "/first/folder /second")
    assert (
        module.uv_environment({}, module.pip_settings(module.pip_listing()))["UV_FIND_LINKS"] == "/first/folder,/second"
    )


def test_a_local_cpu_wheel_comes_first(
    install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install, "pip_listing", lambda: ":env:.find-links='/a /b'")
    monkeypatch.setattr(install, "cpu_index_has", lambda torch: pytest.fail("the index was asked"))
    monkeypatch.setenv("STUB_WHEEL", "9.8.7+cpu")
    assert install.main(["dev"]) == 0
    assert uv_calls(tmp_path) == [
        "--dry-run|--no-deps|--no-index|torch==9.8.7 links=/a,/b",
        "--no-deps|--no-index|torch==9.8.7 links=/a,/b",
        "-c|constraints.txt|-e|.[dev] links=/a,/b",
    ]
    assert "warning" not in capsys.readouterr().err


def test_then_the_cpu_index(
    install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install, "cpu_index_has", lambda torch: torch == "torch==9.8.7")
    assert install.main(["dev"]) == 0
    assert uv_calls(tmp_path) == [f"--no-deps|--index|{install.CPU_INDEX}|torch==9.8.7+cpu links=unset", REST]
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("index_lists_it", [False, True])
def test_without_a_choice_the_default_with_a_warning_of_its_size(
    install: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    index_lists_it: bool,
) -> None:
    monkeypatch.setattr(install, "cpu_index_has", lambda torch: index_lists_it)
    monkeypatch.setenv("STUB_FAILS", "+cpu")
    assert install.main(["dev"]) == 0
    assert uv_calls(tmp_path)[-1] == REST
    warning = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warning) == 1 and "GB" in warning[0]


def test_a_gpu_gets_the_cuda_build(install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "has_nvidia_gpu", lambda: True)
    monkeypatch.setattr(install, "cpu_index_has", lambda torch: pytest.fail("the CPU index was asked"))
    assert install.main(["dev"]) == 0
    assert uv_calls(tmp_path) == [REST]

    # Among the extra wheels a CPU build lies, whose version sorts above the index's plain one.
    (tmp_path / "stamp.json").unlink()
    monkeypatch.setattr(install, "pip_listing", lambda: ":env:.find-links='/a'")
    monkeypatch.setenv("STUB_WHEEL", "9.8.7+cpu")
    assert install.main(["dev"]) == 0
    assert uv_calls(tmp_path)[1] == "--no-deps|torch==9.8.7 links=unset"


def test_elsewhere_than_on_linux_the_default_is_small(
    install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install.sys, "platform", "darwin")
    assert install.main(["dev"]) == 0
    assert uv_calls(tmp_path) == [REST]


def test_installed_packages_are_not_installed_again(install: ModuleType, tmp_path: Path) -> None:
    assert install.main(["dev"]) == 0
    uv_calls(tmp_path)
    assert install.main(["dev"]) == 0 and install.main([]) == 0
    assert uv_calls(tmp_path) == []
    assert install.main(["plots"]) == 0
    assert uv_calls(tmp_path)[-1].startswith("-c|constraints.txt|-e|.[dev,plots]")
    assert install.main(["plots", "dev"]) == 0
    assert uv_calls(tmp_path) == []
    (tmp_path / "constraints.txt").write_text("torch==9.8.8\n", encoding="utf-8")
    assert install.main([]) == 0
    assert uv_calls(tmp_path)[-1].startswith("-c|constraints.txt|-e|.[dev,plots]")


def test_the_source_has_bytecode_but_its_tests_have_none(install: ModuleType, tmp_path: Path) -> None:
    source = tmp_path / "src" / "llm_from_scratch"
    for folder in (source, source / "tests"):
        folder.mkdir(parents=True)
        (folder / "one.py").touch()
    assert install.main([]) == 0
    assert [path.parent.parent.name for path in source.rglob("*.pyc")] == ["llm_from_scratch"]


def test_a_failed_installation_is_tried_again(
    install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STUB_FAILS", "constraints.txt")
    assert install.main(["dev"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: uv could not install")
    monkeypatch.setenv("STUB_FAILS", "never")
    uv_calls(tmp_path)
    assert install.main(["dev"]) == 0
    assert uv_calls(tmp_path)[-1] == REST


@pytest.mark.parametrize(("script", "found"), [("echo 'GPU 0: H200'", True), ("exit 9", False), ("echo none", False)])
def test_gpus_are_listed_by_nvidia_smi(
    install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, found: bool
) -> None:
    monkeypatch.undo()  # the real has_nvidia_gpu
    write_script(tmp_path / "stub" / "nvidia-smi", f"#!/bin/sh\n{script}\n")
    monkeypatch.setenv("PATH", str(tmp_path / "stub"))
    assert install.has_nvidia_gpu() is found
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not install.has_nvidia_gpu()


def test_the_cpu_index_must_list_the_pinned_version(
    install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(install, "CPU_INDEX", (tmp_path / "index").as_uri())
    assert not install.cpu_index_has("torch==9.8.7")  # no answer
    page = tmp_path / "index" / "torch"
    page.mkdir(parents=True)
    listing = '<a href="/whl/cpu/torch-9.8.7%2Bcpu-cp312-cp312-linux_x86_64.whl">torch-9.8.7+cpu-cp312...</a>'
    # urllib answers a file:// folder with an error, so the page stands in as the opened address.
    (page / "index.html").write_text(listing, encoding="utf-8")
    monkeypatch.setattr(install.urllib.request, "urlopen", lambda url, timeout: (page / "index.html").open("rb"))
    assert install.cpu_index_has("torch==9.8.7")
    assert not install.cpu_index_has("torch==9.8.70") and not install.cpu_index_has("torch==9.8")


# --- the justfile ---


def real_just() -> str:
    beside = Path(sys.executable).parent / "just"
    found = str(beside) if beside.exists() else shutil.which("just")
    if found is None:
        pytest.skip("needs just")
    return found


def test_all_recipes_are_there_and_explained() -> None:
    listing = subprocess.run(
        [real_just(), "--justfile", str(ROOT / "justfile"), "--list"], capture_output=True, text=True, check=True
    ).stdout.splitlines()[1:]
    assert {line.split()[0] for line in listing} == RECIPES
    assert all(" # " in line for line in listing)


class Recipes(Checkout):
    """A checkout whose environment is all stubs, and the real just."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        super().run("--bootstrap")
        for name in ("llm-prepare", "llm-train", "llm-generate", "llm-bench"):
            write_script(self.venv / "bin" / name, TOOL)
        self.calls()

    def run(self, *args: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [real_just(), "--justfile", str(self.root / "justfile"), *args],
            cwd=cwd or self.root,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
        )

    def commands(self) -> list[str]:
        """The calls of this project's own commands."""
        return [call for call in self.calls() if call.startswith("llm-")]


@pytest.fixture
def recipes(tmp_path: Path) -> Recipes:
    return Recipes(tmp_path)


def test_train_recipes_choose_a_preset(recipes: Recipes) -> None:
    """llm-train itself chooses the data."""
    recipes.run("train", "--max_iters=3", "--start=two words")
    recipes.run("train-quick")
    recipes.run("train-full")
    plain, quick, full = recipes.commands()
    assert plain == "llm-train default|--max_iters=3|--start=two words|"
    assert quick.startswith("llm-train quick|--epochs=5|") and full.startswith("llm-train default|--epochs=20|")


def test_file_names_are_relative_to_the_users_directory(recipes: Recipes) -> None:
    below = recipes.root / "texts"
    below.mkdir()
    (below / "my book.txt").touch()
    recipes.run("prepare-data", "my book.txt", "--tokenizer=byte", cwd=below)
    assert recipes.commands() == [f"llm-prepare {below}/my book.txt|--tokenizer=byte|"]
    recipes.run("prepare-data", "texts/my book.txt")
    recipes.run("prepare-data", "shakespeare_char", cwd=below)
    recipes.run("train-with-config", "configs/quick.yaml", "--max_iters=2")
    recipes.run("generate", "out-demo", "--top_k=5")
    assert recipes.commands() == [
        "llm-prepare texts/my book.txt|",
        "llm-prepare shakespeare_char|",
        "llm-train configs/quick.yaml|--max_iters=2|",
        "llm-generate --interactive|--checkpoint=out-demo|--top_k=5|",
    ]


@pytest.mark.parametrize(
    ("recipe", "calls"),
    [
        ("demo", ["scripts/install.py|tensorboard|plots|", "-m|llm_from_scratch.cli.demo|--max_iters=5|"]),
        ("test", ["scripts/install.py|dev|", "-m|pytest|-n|3|--dist=loadfile|--no-loadscope-reorder|--max_iters=5|"]),
        ("test-all", ["scripts/install.py|dev|", "-m|pytest|-n|3|"]),
        ("test-all", ["scripts/install.py|dev|", "-m|pytest|-n|3|"]),
        ("test-cov", ["scripts/install.py|dev|", "-m|pytest|--cov=llm_from_scratch|"]),
        ("notebook", ["scripts/install.py|notebook|", "-m|notebook|"]),
    ],
)
def test_recipes_first_install_their_packages(recipes: Recipes, recipe: str, calls: list[str]) -> None:
    result = recipes.run(recipe, "--max_iters=5")
    assert result.returncode == 0, result.stderr
    made = [line.removeprefix("python ") for line in recipes.calls() if line.startswith("python ")]
    assert [line[: len(start)] for line, start in zip(made, calls, strict=True)] == calls


def test_lint_and_format_call_the_three_tools(recipes: Recipes) -> None:
    for recipe, expected in (
        ("lint", ["-m|black|--check|.|", "-m|ruff|check|.|", "-m|mypy|"]),
        ("format", ["-m|black|.|", "-m|ruff|check|--fix|.|"]),
    ):
        assert recipes.run(recipe).returncode == 0
        made = [line.removeprefix("python ") for line in recipes.calls() if line.startswith("python ")]
        assert made == ["scripts/install.py|dev|", *expected]


# --- the wheel ---


def test_the_wheel_carries_the_presets_and_no_tests(tmp_path: Path) -> None:
    """`llm-train quick` finds its preset if only the wheel is installed."""
    pytest.importorskip("hatchling")
    program = (
        "import sys; from hatchling.builders.wheel import WheelBuilder; "
        "print(*WheelBuilder('.').build(directory=sys.argv[1]))"
    )
    built = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    names = set(zipfile.ZipFile(built.stdout.strip()).namelist())
    presets = {f"configs/{path.name}" for path in ROOT.glob("configs/*.yaml")}
    presets |= {f"config/{path.name}" for path in ROOT.glob("config/*.py")}
    assert "configs/quick.yaml" in presets and "config/train_shakespeare_char.py" in presets
    assert presets == {
        name.removeprefix("llm_from_scratch/_presets/")
        for name in names
        if name.startswith("llm_from_scratch/_presets/")
    }
    assert "llm_from_scratch/core/model.py" in names
    assert not any("/tests/" in name for name in names)
    assert all(name.startswith(("llm_from_scratch/", "gptsmith-")) for name in names)


def test_every_command_is_declared() -> None:
    """The console scripts name functions that are there."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    scripts = dict(re.findall(r'^(llm-[a-z]+) = "([\w.]+):main"$', text, flags=re.MULTILINE))
    assert set(scripts) == {
        "llm-prepare", "llm-train", "llm-plan", "llm-generate", "llm-chat", "llm-serve", "llm-eval", "llm-bench",
        "llm-export", "llm-sweep", "llm-scale", "llm-inspect",
    }  # fmt: skip
    for module in scripts.values():
        assert callable(importlib.import_module(module).main)
