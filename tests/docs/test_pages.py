"""What the pages print is what their code prints; where they point, something is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGES = ("how_it_works.md", "add_a_backbone.md", "scoring.md", "faq.md", "answering.md")


@pytest.mark.parametrize("name", PAGES)
def test_links(name):
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", page):
        assert (ROOT / "docs" / link).exists(), link


def test_how_it_works_prints_its_shapes():
    page = (ROOT / "docs" / "how_it_works.md").read_text(encoding="utf-8")
    (code,) = re.findall("```python\n(.*?)```", page, re.S)
    (said,) = re.findall("```text\n(.*?)```", page, re.S)
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == (said, 0), done.stderr


def test_every_task_is_on_the_page():
    page = (ROOT / "docs" / "scoring.md").read_text(encoding="utf-8")
    for path in (ROOT / "tasks").glob("*.py"):
        assert f"| {path.stem} |" in page, path
        found = re.search(r'"(hf:[^"]+)"', path.read_text(encoding="utf-8"))
        assert found is None or found[1] in page
