"""What the pages print is what their code prints; where they point, something is.

A command stands in a block marked `bash` and is run here, in test_own_data.py or
test_readme.py, or it says itself what it needs that is not here: "# needs the Hub", "# needs GPUs".
"""

from __future__ import annotations

import importlib
import io
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cli import command

ROOT = Path(__file__).parent.parent.parent
PAGES = ("how_it_works.md", "add_a_backbone.md", "scoring.md", "faq.md", "answering.md",
         "speed.md", "speed_tables.md", "deploy.md")  # fmt: skip
# Their commands train: minutes in all.
LONG = ("quickstart.md", "fine_tuning.md", "recipes.md", "scaling.md", "vit.md")
# What keeps a command from taking minutes; everything else is run as written.
SHORT = {
    "score.py": "--n 20",
    "-m benchmarks.quality.answering": "20",
    "train.py": "--train.steps 2 --train.eval-samples 10 --data.max-length 256 --data.batch-size 1 "
    "--data.workers 0",
    "classify.py train": "--train.steps 2 --train.eval-every 0 --data.batch-size 4",
    "-m benchmarks.quality.digits": "--steps 2 --folds 1",
}
TOO_LARGE = ("python -m benchmarks.quality.answering int8 222m",)  # minutes, two gigabytes
NEEDS = {" coco_captions ": "pycocoevalcap"}
SCRIPTS = "|".join(path.stem for path in [*ROOT.glob("*.py"), *ROOT.glob("docs/*.py")])
COMMAND = re.compile(rf"(python (-m (data|engine|benchmarks)\.|(docs/)?({SCRIPTS})\.py)|torchrun )")


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
    (place / "photos.jsonl").write_text('{"image": "picture.png", "answer": ["a dog", "a cat"]}\n')
    return place


def commands(name: str) -> list[str]:
    """Every command of a page that needs nothing but what is here; one over two lines is one."""
    found = []
    for block in re.findall("```bash\n(.*?)```", text(name).replace("\\\n", ""), re.S):
        if not block.startswith("#!"):
            found += [line for line in block.splitlines() if "# needs " not in line]
    return found


def is_absent(library: str) -> bool:
    return importlib.util.find_spec(library) is None


@pytest.mark.parametrize("name", PAGES)
def test_commands_run_in_order(name, place, monkeypatch, capsys):
    """In this process, from a folder that holds a model of random weights."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)  # other tests keep their number
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is it?\nSure?\n"))
    left = []
    for line in filter(lambda line: line not in TOO_LARGE, commands(name)):
        if any(word in line and is_absent(library) for word, library in NEEDS.items()):
            left.append(line)
            continue
        what = re.match(r"python (-m \S+|\w+\.py)", line)[1]
        argv = shlex.split(f"{line[len('python ') + len(what) :]} {SHORT.get(what, '')}")
        if what == "-m pytest":  # these tests run by themselves
            assert all((ROOT / a).exists() for a in argv if a.startswith("tests/")), line
            continue
        module = importlib.import_module(what.removeprefix("-m ").removesuffix(".py"))
        command(module.main, argv)
        assert any(capsys.readouterr()), line
    if left:
        pytest.skip(f"a library is not installed: not run: {left}")


@pytest.fixture
def trainings(tmp_path) -> Path:
    """A folder with the data that the commands of LONG train on."""
    rng, names = np.random.default_rng(0), ("poppy", "tulip")
    for i in range(16):
        picture = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
        for folder in (f"flowers/{names[i % 2]}", "pictures", "train", "test"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            picture.save(tmp_path / folder / f"{i}.png")
    for name in ("cat.png", "photo.jpg"):
        picture.save(tmp_path / name)
    (tmp_path / "photos").mkdir()
    for name, folder in (("my.jsonl", "pictures"), ("photos/train.jsonl", "../pictures")):
        rows = [{"image": f"{folder}/{i}.png", "caption": f"number {i}"} for i in range(16)]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [f"pictures/{i}.png,{names[i % 2]}\n" for i in range(16)]
    (tmp_path / "rows.csv").write_text("image,kind\n" + "".join(lines))
    (tmp_path / "mnist").mkdir()
    for part in ("train", "t10k"):
        for what, shape in (("images-idx3", (16, 8, 8)), ("labels-idx1", (16,))):
            head = bytes((0, 0, 8, len(shape))) + np.array(shape, ">i4").tobytes()
            body = rng.integers(0, 2, shape, dtype=np.uint8).tobytes()
            (tmp_path / "mnist" / f"{part}-{what}-ubyte").write_bytes(head + body)
    for split in ("train", "test"):
        folder = tmp_path / "PATH/TO/easy_vqa/data" / split
        shutil.copytree(tmp_path / "pictures", folder / "images")
        asked = [[f"is it {i}?", "yes", i] for i in range(16)]
        (folder / "questions.json").write_text(json.dumps(asked))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_trainings_run_in_order(name, trainings, python):
    """Each in a process of its own, with two steps instead of all."""

    def run(line: str) -> None:
        what = re.match(r"python (-m \S+|classify\.py \w+|\S+\.py)", line)[1]
        if what == "classify.py train":  # alternatives, all into the same folder
            shutil.rmtree(trainings / "runs/classifier", ignore_errors=True)
        line = line.replace(f"python {what}", what if what[0] == "-" else f"{ROOT}/{what}")
        done = python(shlex.split(line, comments=True) + SHORT.get(what, "").split(), trainings)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        assert done.stdout or done.stderr, line

    before = []
    if name == "vit.md":  # two folders' indices, of a model that another command makes anew
        before = [f"python embed.py build {part} --model runs/classifier --out {part}-index"
                  for part in ("train", "test")]  # fmt: skip
        before.insert(0, "python classify.py train small --data.source flowers")
    if name in ("quickstart.md", "fine_tuning.md"):  # what `make demo` leaves
        before = ["python train.py tiny --train.out runs/demo",
                  "python -m data.world runs/demo/question.png"]  # fmt: skip
    for line in (*before, *commands(name)):
        run(line)
    for code in re.findall("```python\n(.*?)```", text(name), re.S):
        code = code.replace("step-000200", "step-000002")
        done = python(["-c", code], trainings)
        assert done.returncode == 0, done.stderr


def test_every_command_is_run_or_says_what_it_needs():
    pages = sorted((ROOT / "docs").glob("*.md"))
    elsewhere = {"own_data.md", "library.md", "reference.md"}  # have tests of their own
    assert {page.name for page in pages} == {*PAGES, *LONG, *elsewhere}
    for path in (ROOT / "README.md", *pages):
        page = path.read_text(encoding="utf-8").replace("\\\n", "")
        for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", page, re.S | re.M):
            for line in block.splitlines() if kind != "bash" else ():
                assert not COMMAND.match(line) or "# needs " in line, f"{path}: {line}"


@pytest.mark.parametrize("name", (*PAGES, *LONG))
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
