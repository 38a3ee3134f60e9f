"""The tour notebook: it runs, and is stored with its outputs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[4]
TOUR = ROOT / "notebooks" / "tour.ipynb"
pytestmark = pytest.mark.skipif(not TOUR.is_file(), reason="the notebook lies in a checkout")


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def printed(cell: dict[str, Any]) -> str:
    """What a cell printed; stored texts are lists of lines or strings."""
    texts = [output["text"] for output in cell["outputs"] if output["output_type"] == "stream"]
    return "".join("".join(text) for text in texts)


def test_outputs_are_stored() -> None:
    """Those of one run from top to bottom, without a path of the machine, a time or an error."""
    cells = code_cells(json.loads(TOUR.read_text(encoding="utf-8")))
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(cell["metadata"] for cell in cells)
    outputs = json.dumps([cell["outputs"] for cell in cells])
    assert not re.findall(r"/(?:tmp|home|root|work|Users|usr)/", outputs) and '"error"' not in outputs
    assert TOUR.stat().st_size < 300_000
    check([output for cell in cells for output in cell["outputs"]], "".join(map(printed, cells)))


def check(outputs: list[dict[str, Any]], text: str) -> None:
    assert re.search(r"step 250/250  train loss", text), "the loss is shown"
    assert "' yellow'" in text.partition("%")[2], "the colour is among the likely next tokens"
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2, "the loss curve and the attention"


@pytest.mark.slow  # starts a kernel
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
    cells = code_cells(notebook)
    check([output for cell in cells for output in cell["outputs"]], "".join(map(printed, cells)))
    stored = code_cells(json.loads(TOUR.read_text(encoding="utf-8")))
    assert [printed(cell) for cell in cells[:3]] == [printed(cell) for cell in stored[:3]], "the text and its tokens"
