"""The tour notebook: it runs from top to bottom, and is kept without outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[4]
TOUR = ROOT / "notebooks" / "tour.ipynb"
pytestmark = pytest.mark.skipif(not TOUR.is_file(), reason="the notebook lies in a checkout")


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_outputs_are_stripped() -> None:
    for cell in code_cells(json.loads(TOUR.read_text(encoding="utf-8"))):
        assert cell["outputs"] == [] and cell["execution_count"] is None and not cell["metadata"], cell["source"]


def test_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))  # the kernel is a process of its own
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("MPLBACKEND", raising=False)
    notebook = nbformat.read(TOUR, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [output for cell in code_cells(notebook) for output in cell["outputs"]]
    printed = "".join(output["text"] for output in outputs if output["output_type"] == "stream")
    assert "step 250/250  train loss" in printed, "the loss is shown"
    assert "' yellow'" in printed.partition("%")[2], "the colour is among the likely next tokens"
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2, "the loss curve and the attention"
