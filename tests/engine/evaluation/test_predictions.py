"""The predictions file: resuming, comparing, and checks of checkpoint, settings and questions."""

from __future__ import annotations

import json
import shutil

import pytest
from PIL import Image

from config_tools import InputError
from data.types import Sample, Turn
from engine.evaluation.answer_sheet import draw_answer_sheet
from engine.evaluation.evaluate import Answered, Item
from engine.evaluation.predictions import (
    fingerprint,
    hash_questions,
    part_files,
    read_answers,
    read_scores,
    record_answers,
    write_predictions,
)

FOUND = [(i, {"answer": f"a{i}", "blind": "b"}) for i in range(5)]


def answered(i: int, score: float = 1.0) -> Answered:
    turns = (Turn("user", f"What is {i}?"), Turn("assistant", "red"))
    return Answered(Item(Sample(turns, row=f"row {i}"), "color"), f"a{i}", score)


def test_the_hash_of_questions_covers_text_and_images():
    def item(text="What?", image=None, **fields) -> Item:
        images = () if image is None else (image,)
        return Item(Sample((Turn("user", text), Turn("assistant", "a")), images), "all", **fields)

    red, blue = (Image.new("RGB", (30, 30), color) for color in ("red", "blue"))
    corner = red.copy()
    corner.putpixel((0, 0), (0, 0, 0))
    others = [[item()], [item("Who?")], [item(image="a.png")], [item(image="b.png")],
              [item(image=red)], [item(image=blue)], [item(image=corner)],
              [item(image=b"1" * 99)], [item(image=b"2" + b"1" * 98)], [item()] * 2,
              [item(references=("b",))], [item(choices=("a", "b"))], [item("\ud83d")]]  # fmt: skip
    assert len({hash_questions(questions) for questions in others}) == len(others)
    assert hash_questions([item(image=red)]) == hash_questions([item(image=red.copy())])


def test_a_sample_without_a_question(tmp_path):
    """A text sample is a conversation with a single assistant turn."""
    one = Answered(Item(Sample((Turn("assistant", "A cat."),), row="row 1"), "all"), "a", 0.0)
    write_predictions(tmp_path / "p.jsonl", "one", {"answer": [one]})
    assert read_scores(tmp_path / "p.jsonl", [one.item]) == [0.0]
    draw_answer_sheet([one], tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").width > 100


def test_recorded_answers_are_read_again(tmp_path):
    path = tmp_path / "p.jsonl"
    assert read_answers(path, "one") == {} == read_answers(None, "one")
    assert list(record_answers(None, 0, "one", iter(FOUND))) == FOUND
    done = record_answers(path, 0, "one", iter(FOUND))
    assert [next(done) for _ in range(3)] == FOUND[:3]
    done.close()  # interrupted, while another process has its own part file
    list(record_answers(path, 1, "one", iter(FOUND[4:])))
    assert read_answers(path, "one") == dict([*FOUND[:3], FOUND[4]]) and not path.exists()
    with open(f"{path}.part1", "a") as file:
        file.write('{"run": "one", "num')
    assert len(read_answers(path, "one")) == 4, "an incomplete line is ignored"
    with pytest.raises(InputError, match="of another checkpoint or other settings"):
        read_answers(path, "two")
    path.write_text("some text")
    with pytest.raises(InputError, match="of another checkpoint or other settings"):
        read_answers(path, "one")


def test_the_final_file(tmp_path):
    path = tmp_path / "p.jsonl"
    list(record_answers(path, 0, "one", iter(FOUND)))
    views = {"answer": [answered(i, i / 4) for i in range(5)],
             "blind": [answered(i) for i in range(5)]}  # fmt: skip
    write_predictions(path, "one", views)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["number"] for r in rows] == list(range(5)) and part_files(path) == []
    assert rows[2]["question"] == "What is 2?" and rows[2]["views"] == {"answer": "a2",
                                                                       "blind": "a2"}  # fmt: skip
    assert rows[3]["score"] == 0.75 and rows[3]["expected"] == "red"
    assert len(read_answers(path, "one")) == 5, "a finished file has all answers"
    assert read_scores(path, [a.item for a in views["answer"]]) == [0, 0.25, 0.5, 0.75, 1]


def test_scores_of_other_questions_are_refused(tmp_path):
    path = tmp_path / "p.jsonl"
    write_predictions(path, "one", {"answer": [answered(i) for i in range(5)]})
    for others in ([answered(i).item for i in range(4)], [answered(i + 1).item for i in range(5)]):
        with pytest.raises(InputError, match="its 5 questions differ"):
            read_scores(path, others)
    with pytest.raises(
        InputError, match=r"no such file; expected a file that score\.py --predictions"
    ):
        read_scores(tmp_path / "no", [])
    path.write_text('{"number": 0}\n')
    with pytest.raises(InputError, match="not a complete file"):
        read_scores(path, [])


def test_the_fingerprint_covers_weights_and_settings(small_checkpoint, tmp_path):
    shutil.copytree(small_checkpoint, tmp_path / "copy")
    one = fingerprint(small_checkpoint, ("world", 3))
    assert len(one) == 12 and one == fingerprint(tmp_path / "copy", ("world", 3))
    assert one != fingerprint(small_checkpoint, ("world", 4))
    weights = tmp_path / "copy" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    assert one != fingerprint(tmp_path / "copy", ("world", 3))
