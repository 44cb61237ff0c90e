"""The conversion in docs/ writes rows that a source opens."""

import json
import subprocess
import sys
from pathlib import Path

from PIL import Image

from configs import DataConfig
from data.sources.open import open_dataset

SCRIPT = Path(__file__).parent.parent.parent / "docs" / "easy_vqa.py"


def test_rows_open_as_questions_about_pictures(tmp_path):
    for split in ("train", "test"):
        (tmp_path / "data" / split / "images").mkdir(parents=True)
        Image.new("RGB", (64, 64), "red").save(tmp_path / "data" / split / "images" / "7.png")
        questions = [["what color is the shape?", "red", 7], ["is there a circle?", "no", 7]]
        (tmp_path / "data" / split / "questions.json").write_text(json.dumps(questions))
    command = [sys.executable, str(SCRIPT), str(tmp_path / "data"), str(tmp_path / "out")]
    subprocess.run(command, check=True, capture_output=True)
    cfg = DataConfig(source=str(tmp_path / "out" / "test.jsonl"))
    source = open_dataset(cfg, "test")
    assert len(source) == 2 and not source.skipped
    seen = {source[i].turns for i in range(2)}
    assert (("user", "<image>what color is the shape?"), ("assistant", "red")) in seen
    assert (("user", "<image>is there a circle?"), ("assistant", "no")) in seen
    assert Image.open(source[1].images[0]).size == (64, 64)
    [row] = map(json.loads, (tmp_path / "out" / "train.jsonl").read_text().splitlines())
    assert len(row["images"]) == 1 and len(row["texts"]) == 2
