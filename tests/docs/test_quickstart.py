"""The notebook runs from top to bottom, offline, and prints what it promises."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_the_notebook_runs(python):
    """Run its cells as one script, without a kernel; values at the end of a cell are not shown."""
    notebook = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 5 and not any(cell["outputs"] for cell in cells), "outputs are committed"
    code = "\n".join("".join(cell["source"]) for cell in cells)
    done = python(["-c", code], STEPS="2")
    assert done.returncode == 0, done.stderr
    for words in ("What is at the center? ", "saved ", "all  ", "report.html"):
        assert words in done.stdout, words
