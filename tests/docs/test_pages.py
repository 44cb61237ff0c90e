"""What the pages print is what their code prints; where they point, something is."""

from __future__ import annotations

import importlib
import io
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from configs import command

ROOT = Path(__file__).parent.parent.parent
PAGES = ("how_it_works.md", "add_a_backbone.md", "scoring.md", "faq.md", "answering.md",
         "benchmarks.md")  # fmt: skip
# What keeps a command from taking minutes; everything else is run as written.
SHORT = {"score.py": "--n 20", "-m benchmarks.answering": "20"}
TOO_LARGE = ("python -m benchmarks.answering int8 222m",)  # minutes, two gigabytes


def text(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def place(tmp_path_factory, small_checkpoint) -> Path:
    """A folder with what the commands expect: a model, a picture, questions."""
    place = tmp_path_factory.mktemp("pages")
    shutil.copytree(small_checkpoint, place / "runs" / "demo")
    Image.effect_noise((60, 40), 90).convert("RGB").save(place / "picture.png")
    rows = [{"image": "picture.png", "question": "What?", "choices": c} for c in ([], ["a", "b"])]
    (place / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


@pytest.mark.parametrize("name", PAGES)
def test_commands_run_in_order(name, place, monkeypatch, capsys):
    """In this process, from a folder that holds a model of random weights."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)  # the other tests keep theirs
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is it?\nSure?\n"))
    for block in re.findall("```bash\n(.*?)```", text(name), re.S):
        for line in filter(lambda line: line not in TOO_LARGE, block.splitlines()):
            if " int8 " in line:
                pytest.importorskip("torchao", reason=f"torchao is not installed: not run: {line}")
            what = re.match(r"python (-m \S+|\w+\.py)", line)[1]
            argv = shlex.split(f"{line[len('python ') + len(what):]} {SHORT.get(what, '')}")
            if what == "-m pytest":  # these tests run by themselves
                assert all((ROOT / a).exists() for a in argv if a.startswith("tests/")), line
                continue
            module = importlib.import_module(what.removeprefix("-m ").removesuffix(".py"))
            command(module.main, argv)
            assert any(capsys.readouterr()), line


@pytest.mark.parametrize("name", PAGES)
def test_links(name):
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text(name)):
        assert (ROOT / "docs" / link).exists(), link


def test_how_it_works_prints_its_shapes(python):
    page = text("how_it_works.md")
    (code,) = re.findall("```python\n(.*?)```", page, re.S)
    (said,) = re.findall("```text\n(.*?)```", page, re.S)
    done = python(["-c", code])
    assert (done.stdout, done.returncode) == (said, 0), done.stderr


def test_every_task_is_on_the_page():
    page = text("scoring.md")
    for path in (ROOT / "tasks").glob("*.py"):
        assert f"| {path.stem} |" in page, path
        found = re.search(r'"(hf:[^"]+)"', path.read_text(encoding="utf-8"))
        assert found is None or found[1] in page
