"""The README is true: its commands run, its files exist, its tree names every folder."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# What keeps a documented command from taking minutes; everything else is run as written.
SHORT = {
    "train.py": "--train.steps 2 --train.eval-samples 10 --data.max-length 256 --data.batch-size 1 "
    "--data.workers 0",
    "score.py": "--n 20",
    "classify.py train": "--train.steps 2 --train.eval-every 0 --data.batch-size 8",
}
# make and pip install things; the page serves for ever: tests/test_demo.py starts it.
NOT_RUN = ("make ", "pip install ", "python demo.py ")
SCRIPTS = ("train.py", "score.py", "generate.py", "export.py", "classify.py", "embed.py")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def commands() -> list[str]:
    return [line for block in blocks("bash") for line in block.splitlines() if line.strip()]


def as_run(line: str) -> str:
    """The command with the scripts' full paths and the shortening flags."""
    if line.startswith("python -m "):
        return line
    script = next((name for name in SCRIPTS if name in line), None)
    assert script, f"no script in {line!r}"
    line = line.replace(f"python {script}", f"python {ROOT / script}")
    extra = next((flags for words, flags in SHORT.items() if f"/{words}" in line), "")
    if "--help" in line or "--train.resume auto" in line:
        extra = ""
    return f"{line} {extra}"


@pytest.fixture(scope="module")
def run(python):
    """`run(line, cwd)`; what needs a shell goes through one, the rest starts sooner."""

    def run(line: str, cwd: Path) -> subprocess.CompletedProcess:
        words = shlex.split(line)
        if words[0] == "python" and not set("|<>;&*$") & set(line):
            return python(words[1:], cwd)
        line = re.sub(r"\bpython (?=-|/)", f"{shlex.quote(sys.executable)} ", line)
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            ["bash", "-c", line], cwd=cwd, env=env, capture_output=True, text=True
        )

    return run


@pytest.fixture(scope="module")
def place(tmp_path_factory, run) -> Path:
    """A folder with what the commands expect: a short demo, its picture, own rows, questions."""
    place = tmp_path_factory.mktemp("readme")
    made = run(as_run("python train.py tiny --train.out runs/demo"), place)
    assert made.returncode == 0, made.stderr
    drawn = run("python -m data.world runs/demo/question.png", place)
    assert drawn.returncode == 0, drawn.stderr
    rows = [json.loads(line) for line in blocks("json")[0].splitlines()]
    (place / "my.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for row in rows:
        Image.effect_noise((70, 50), 90).convert("RGB").save(place / row["image"])
    asked = [{"image": "cat.png", "question": "What is this?"}, {"question": "What is a cat?"}]
    (place / "questions.jsonl").write_text("\n".join(map(json.dumps, asked)))
    return place


def test_commands_run_in_order(place, run):
    lines = [line for line in commands() if not line.startswith(NOT_RUN)]
    assert len(lines) >= 8
    for line in lines:
        done = run(as_run(line), place)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    for written in ("runs/mine/config.json", "runs/demo/score.json", "runs/demo/report.html",
                    "runs/demo-bf16/model.safetensors", "runs/demo-upload/README.md"):  # fmt: skip
        assert (place / written).is_file(), written
    assert len((place / "answers.jsonl").read_text().splitlines()) == 2


def test_python_runs(place, python):
    for code in blocks("python"):
        done = python(["-c", code], place)
        assert done.returncode == 0, done.stderr


def test_make_targets_exist():
    for line in commands():
        if line.startswith("make "):
            done = subprocess.run(line.split() + ["-n"], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr


def test_links_and_tree():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
    tree = README.split("## Where things are")[1].split("```")[1]
    folders = {f.name for f in ROOT.iterdir() if f.is_dir() and list(f.rglob("*.py"))}
    folders |= {f.name for top in ("models", "data", "engine") for f in (ROOT / top).iterdir()
                if f.is_dir() and list(f.glob("*.py"))}  # fmt: skip
    for folder in folders - {".venv", "__pycache__"}:
        assert f"{folder}/" in tree, f"{folder} is not in the README's tree"
    for script in ROOT.glob("*.py"):
        assert script.name in tree, f"{script.name} is not in the README's tree"
