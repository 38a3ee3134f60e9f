"""Runs the quick tests with another torch: `./just test-torch 2.15.0`. More arguments go to pytest.

The environment is temporary. It holds that torch and takes all other packages from .venv.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from install import ROOT, Uv, install_torch, pip_listing, pip_settings, say, uv_environment


def main(version: str, *words: str) -> int:
    with tempfile.TemporaryDirectory(prefix="test-torch-") as folder:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        paths = {"base": folder, "platbase": folder}
        python = Path(sysconfig.get_path("scripts", vars=paths)) / Path(sys.executable).name
        site = Path(sysconfig.get_path("purelib", vars=paths))
        uv = Uv(uv_environment(dict(os.environ), pip_settings(pip_listing())), str(python))
        torch = f"torch=={version}"
        if not install_torch(uv, torch) and uv.install(torch).returncode:
            say(f"error: uv could not install {torch} (its message is above)")
            return 2
        # after the packages of this environment
        others = [str(ROOT / "src"), *(path for path in sys.path if path.endswith("-packages"))]
        (site / "others.pth").write_text("\n".join(others), encoding="utf-8")
        return subprocess.run([python, "-m", "pytest", *words], cwd=ROOT).returncode


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
