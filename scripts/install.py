"""Installs this checkout and the extras that a recipe needs into .venv, unless they are installed.

Run by the justfile with .venv's own Python: `.venv/bin/python scripts/install.py dev`. Standard library only. On
Linux the index's default torch is the CUDA build of several GB; without an NVIDIA GPU this looks for a CPU build of
the pinned version first: in the folders of extra wheels that pip knows, then on PyTorch's own CPU index.
"""

from __future__ import annotations

import ast
import compileall
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.prefix) / ("Scripts" if os.name == "nt" else "bin")
STAMP = Path(sys.prefix) / "llm-from-scratch.json"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PROBE_SECONDS = 5


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def wanted_state(root: Path, extras: list[str]) -> dict[str, Any]:
    """The content of the stamp after a successful installation of these extras."""
    digest = hashlib.sha256()
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update((root / name).read_bytes())
    return {"root": str(root), "python": sys.version, "inputs": digest.hexdigest(), "extras": sorted(set(extras))}


def read_stamp(path: Path) -> dict[str, Any]:
    try:
        stamp = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def is_done(stamp: dict[str, Any], wanted: dict[str, Any]) -> bool:
    same = all(stamp.get(key) == wanted[key] for key in ("root", "python", "inputs"))
    return same and set(wanted["extras"]) <= set(stamp.get("extras", []))


def pip_listing() -> str:
    """The output of `pip config list`: a line `section.name='value'` for each setting of files and environment."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    return subprocess.run(command, capture_output=True, text=True).stdout


def pip_settings(listing: str) -> dict[str, str]:
    """Setting name -> value, from the lines of `pip config list`; the environment over [install] over [global]."""
    rank = {"global": 0, "install": 1, ":env:": 2}
    found: dict[str, tuple[int, str]] = {}
    for line in listing.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.rpartition(".")
        if section in rank and rank[section] >= found.get(name, (-1, ""))[0]:
            try:
                found[name] = (rank[section], str(ast.literal_eval(value)))
            except (SyntaxError, ValueError):
                continue
    return {name: value for name, (_, value) in found.items()}


def uv_environment(environ: dict[str, str], pip: dict[str, str]) -> dict[str, str]:
    """The environment for uv, which does not read pip's settings. pip separates folders by spaces, uv by commas."""
    env = {k: v for k, v in environ.items() if k not in ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONHOME")}
    links = [link for link in env.get("UV_FIND_LINKS", "").split(",") if link.strip()]
    links += [link for link in pip.get("find-links", "").split() if link not in links]
    if links:
        env["UV_FIND_LINKS"] = ",".join(links)
    if "index-url" in pip and not ({"UV_DEFAULT_INDEX", "UV_INDEX_URL"} & env.keys()):
        env["UV_DEFAULT_INDEX"] = pip["index-url"]
    return env


def has_nvidia_gpu() -> bool:
    command = shutil.which("nvidia-smi")
    if command is None:
        return False
    try:
        listing = subprocess.run([command, "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listing.returncode == 0 and "GPU" in listing.stdout


def pinned_torch(constraints: str) -> str:
    """The requirement `torch==X` of constraints.txt."""
    match = re.search(r"(?m)^torch==[^\s;#]+", constraints)
    if match is None:
        raise SystemExit("error: constraints.txt does not pin torch: add a line such as torch==2.13.0")
    return match.group()


class Uv:
    """uv pip on this environment or another one, with or without the folders of extra wheels."""

    def __init__(self, env: dict[str, str], python: str = sys.executable) -> None:
        self.env, self.python = env, python

    def install(self, *args: str, quiet: bool = False, links: bool = True) -> subprocess.CompletedProcess[str]:
        command = [str(BIN / "uv"), "pip", "install", "--python", self.python, *args]
        env = self.env if links else {k: v for k, v in self.env.items() if k != "UV_FIND_LINKS"}
        # Without bytecode, importing torch takes twice as long; PYTHONDONTWRITEBYTECODE keeps Python from writing it.
        env = {"UV_COMPILE_BYTECODE": "1", **env}
        return subprocess.run(command, env=env, cwd=ROOT, text=True, capture_output=quiet)

    def local_torch(self, torch: str) -> str | None:
        """The version of the pinned torch in the extra wheels for this Python, such as 2.13.0+cpu."""
        if "UV_FIND_LINKS" not in self.env:
            return None
        plan = self.install("--dry-run", "--no-deps", "--no-index", torch, quiet=True)
        match = re.search(r"\+ torch==(\S+)", plan.stdout + plan.stderr)
        return match.group(1) if plan.returncode == 0 and match else None


def cpu_index_has(torch: str) -> bool:
    """Whether PyTorch's CPU index responds within a few seconds and lists the pinned version."""
    version = torch.partition("==")[2]
    try:
        with urllib.request.urlopen(f"{CPU_INDEX}/torch/", timeout=PROBE_SECONDS) as page:
            return f"torch-{version}%2Bcpu-" in page.read().decode("utf-8", "replace").replace("+", "%2B")
    except (OSError, ValueError):
        return False


def install_torch(uv: Uv, torch: str) -> bool:
    """Installs the right build of torch for this machine into .venv, without its dependencies, which come later.

    False leaves the choice to the installation of the rest, that is to the default index.
    """
    if not sys.platform.startswith("linux") or already_there(torch):
        return False
    local = uv.local_torch(torch)
    if has_nvidia_gpu():
        # A CPU wheel among the extra ones would win over the index's CUDA build: its version sorts higher.
        if local is not None and "+cpu" in local:
            if uv.install("--no-deps", torch, links=False).returncode == 0:
                return True
            say(f"warning: the index has no CUDA build of {torch}; the extra wheels have only a CPU build")
        return False
    if local is not None and "+cu" not in local.replace("+cpu", ""):
        return uv.install("--no-deps", "--no-index", torch).returncode == 0
    if cpu_index_has(torch) and uv.install("--no-deps", "--index", CPU_INDEX, f"{torch}+cpu").returncode == 0:
        return True
    say(
        f"warning: no CPU build of {torch} was found in the folders of extra wheels, and {CPU_INDEX} does not respond: "
        "the default build downloads NVIDIA's CUDA packages, about 3 GB"
    )
    return False


def already_there(torch: str) -> bool:
    from importlib import metadata

    try:
        return metadata.version("torch").partition("+")[0] == torch.partition("==")[2]
    except metadata.PackageNotFoundError:
        return False


def main(argv: list[str]) -> int:
    stamp, wanted = read_stamp(STAMP), wanted_state(ROOT, argv)
    if is_done(stamp, wanted):
        return 0
    # Include the extras that were installed before, so that a changed pyproject.toml updates all of them.
    wanted = wanted_state(ROOT, argv + stamp.get("extras", []))
    extras = ",".join(wanted["extras"])
    say(f"installing llm-from-scratch{f' with {extras}' if extras else ''} into .venv")
    uv = Uv(uv_environment(dict(os.environ), pip_settings(pip_listing())))
    install_torch(uv, pinned_torch((ROOT / "constraints.txt").read_text(encoding="utf-8")))
    target = f".[{extras}]" if extras else "."
    if uv.install("-c", "constraints.txt", "-e", target).returncode:
        say("error: uv could not install the packages (its message is above): check the network, then try again")
        return 2
    # uv compiles no editable package; without bytecode, importing this one takes twice as long
    compileall.compile_dir(ROOT / "src" / "llm_from_scratch", rx=re.compile(r"[/\\]tests[/\\]"), quiet=2)
    STAMP.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
