"""The notebook runs from top to bottom, offline, and says what it promises."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def test_the_notebook_runs(monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="no nbclient: the notebook is not run")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel", reason="no ipykernel: the notebook is not run")
    for name, value in (("STEPS", "2"), ("OMP_NUM_THREADS", "1"), ("HF_HUB_OFFLINE", "1"),
                        ("PYTHONPATH", f"{ROOT}:{os.environ.get('PYTHONPATH', '')}")):  # fmt: skip
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(ROOT / "docs" / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs are not committed"
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}
    )
    client.execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    text = "".join(out.get("text", "") for out in outputs)
    assert "saved" in text and "accuracy" in text and "report.html" in text
    assert sum("image/png" in out.get("data", {}) for out in outputs) == 2
