"""The commands of docs/own_data.md run on fifty real images, and its example rows are valid."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image

from config_tools import read_json
from configs import DataConfig
from data.sources.open import open_dataset

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "own_data.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)


@pytest.fixture
def run(python):
    """`run(line, place)` -> standard output of a documented command, run in folder `place`."""

    def run(line: str, place: Path) -> str:
        name, *words = shlex.split(re.sub(r"^python (?=\w+\.py)", f"python {ROOT}/", line))
        assert name == "python" and not set("|<>;&*$") & set(line), line
        done = python(words, place)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run


def make_place(run, place: Path, shared: Path, demo_steps: int) -> Path:
    """A folder with fifty flags named by country, and a demo trained for `demo_steps` steps."""
    folder, names = shared / "datasets" / "flags", []
    for line in (folder / "names.tsv").read_text(encoding="utf-8").splitlines()[1:]:
        file, country = line.split("\t")
        if len(names) < 50 and re.fullmatch("[A-Za-z ]+", country):
            names.append(country)
            (place / "flags").mkdir(exist_ok=True)
            shutil.copy(folder / "images" / file, place / "flags" / f"{country}.png")
    assert len(names) == 50 and {"Andorra", "United Arab Emirates"} <= set(names)
    short = "--train.eval-every 0 --train.eval-samples 10 --data.max-length 256"
    run(f"python train.py tiny --train.out runs/demo --train.steps {demo_steps} {short}", place)
    return place


def commands() -> list[str]:
    block, _prepare = blocks("bash")
    return block.splitlines()


def test_the_commands_run_on_fifty_images(run, shared, tmp_path):
    """With two training steps instead of 120."""
    place = make_place(run, tmp_path, shared, 2)
    preview, train, score, ask = commands()
    output = run(preview, place)
    for block in blocks("text")[0].split("...\n"):
        assert block.strip() in output, block
    assert (place / "preview.png").is_file()
    run(f"{train} --train.steps 2", place)
    run(score, place)
    assert read_json(place / "runs/flags/score.json")["n"] == 50
    assert run(ask, place).endswith("\n")


def test_prepare_keeps_the_rows(run, tmp_path):
    (tmp_path / "my.jsonl").write_text(blocks("json")[0].splitlines()[-1] + "\n")
    run(blocks("bash")[1].strip(), tmp_path)
    source = open_dataset(DataConfig(source=str(tmp_path / "runs/data/mine")), "test")
    assert [turn.text for turn in source[0].turns] == ["2 + 2?", "4"]


@pytest.mark.slow
def test_fifty_images_are_memorized(run, shared, tmp_path):
    """With all 120 steps, from a demo of only 20 steps."""
    place = make_place(run, tmp_path, shared, 20)
    outputs = [run(line, place) for line in commands()]
    assert read_json(place / "runs/flags/score.json")["accuracy"] >= 0.9
    assert outputs[-1] == "Andorra\n"


def test_example_rows_are_valid(tmp_path):
    for name in ("cat", "dog"):
        Image.new("RGB", (9, 9)).save(tmp_path / f"{name}.png")
    seen = []
    for i, block in enumerate(blocks("json")):
        (tmp_path / f"{i}.jsonl").write_text(block)
        rows = [json.loads(line) for line in block.splitlines()]
        source = open_dataset(DataConfig(source=str(tmp_path / f"{i}.jsonl")), "test")
        assert len(source) == len(rows) and source.skipped == ()
        seen.append([source[k] for k in range(len(rows))])
    columns, [llava], [cauldron], [trl] = seen
    assert [s.turns[-1].text for s in columns] == ["a cat", "a dog on a lawn", "B", "4"]
    assert llava.turns == (("user", "<image>What is this?"), ("assistant", "a cat"))
    assert cauldron.turns[0].text == "<image><image>Which is the cat?" and len(cauldron.images) == 2
    assert trl.turns[:2] == (("system", "Be brief."), ("user", "<image>What is this?"))
