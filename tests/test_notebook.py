"""The notebook for newcomers, run whole as they would."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
NotebookClient = pytest.importorskip("nbclient").NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "deploy" / "notebook" / "first_steps.ipynb"

# Warnings of Jupyter's libraries about themselves.
pytestmark = pytest.mark.filterwarnings("ignore")


def read_stream(cell, name: str) -> str:
    found = (o for o in cell.outputs if o.output_type == "stream" and o.name == name)
    return "".join(output.text for output in found)


@pytest.mark.cluster
@pytest.mark.slow
def test_notebook_leads_from_a_catalogue_to_a_spectrum(tmp_path, monkeypatch):
    # As on a machine without ipywidgets.
    stub = tmp_path / "stub"
    stub.mkdir()
    (stub / "ipywidgets.py").write_text("raise ImportError('not installed', name='ipywidgets')\n")
    monkeypatch.setenv("PYTHONPATH", str(stub), prepend=os.pathsep)
    monkeypatch.delenv("MPLBACKEND", raising=False)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(notebook, timeout=150, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    [measuring] = [cell for cell in cells if "run_batch(" in cell.source]
    shown = read_stream(measuring, "stderr")
    # Links are there as soon as there is a cluster, and bars of text are drawn over again.
    links = shown.index("dashboard   http://127.0.0.1:")
    assert re.search(r"\nframes      http://127.0.0.1:\d+/spxdask\n", shown)
    drawn = [match.start() for match in re.finditer(r"\rframes    : .*?\b(\d+)/18 ", shown)]
    assert drawn[0] < links < drawn[-1]
    assert re.search(r"\raggregate : 100%", shown)
    for text in ("Warning", "Traceback", "INFO", "ERROR", "IProgress", "huffle"):
        assert text not in shown
    assert "18 of 18 frames" in read_stream(measuring, "stdout")
    for cell in cells:
        assert cell is measuring or read_stream(cell, "stderr") == ""
    results = {cell.source: cell.outputs for cell in cells}
    [opened] = [o for source, o in results.items() if "open_run" in source]
    assert "18 frames" in opened[0].data["text/html"]
    [plotted] = [o for source, o in results.items() if "plot_spectrum" in source]
    assert any("image/png" in output.get("data", {}) for output in plotted)
