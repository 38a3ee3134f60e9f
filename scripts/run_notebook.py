"""Runs the tour notebook and stores its outputs in it, without times or paths of this machine.

    .venv/bin/python scripts/run_notebook.py

Needs the extra dev.
"""

from __future__ import annotations

import os
from pathlib import Path

import nbclient
import nbformat

ROOT = Path(__file__).resolve().parent.parent
TOUR = ROOT / "notebooks" / "tour.ipynb"


def main() -> None:
    os.environ |= {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    notebook = nbformat.read(TOUR, as_version=4)
    # coalesce_streams: one output per cell, not one per line
    nbclient.NotebookClient(notebook, kernel_name="python3", record_timing=False, coalesce_streams=True).execute()
    notebook.metadata["language_info"] = {"name": "python"}
    nbformat.write(notebook, TOUR)


if __name__ == "__main__":
    main()
