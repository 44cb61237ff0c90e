"""An answer sheet shows right and wrong answers, whatever the images and texts are."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageColor

from data.types import Sample, Turn
from engine.evaluation.answer_sheet import COLUMNS, SIDE, draw_answer_sheet
from engine.evaluation.evaluate import Answered, Item
from engine.figures.sheet import GAP, LINE
from engine.figures.style import RIGHT, WRONG


def answered(answer: str, skill: str, image=None, question: str = "What?") -> Answered:
    images = () if image is None else (image,)
    turns = (Turn("user", "<image>" * len(images) + question), Turn("assistant", "red"))
    return Answered(Item(Sample(turns, images), skill), answer, float(answer == "red"))


def drawn(tmp_path, answers: list[Answered]) -> np.ndarray:
    draw_answer_sheet(answers, tmp_path / "sheet.png")
    return np.asarray(Image.open(tmp_path / "sheet.png"))


def has(pixels: np.ndarray, color: str) -> bool:
    return bool((pixels == ImageColor.getrgb(color)).all(-1).any())


@pytest.mark.parametrize(
    ("answer", "color", "other"), [("red", RIGHT, WRONG), ("blue", WRONG, RIGHT)]
)
def test_right_is_green_and_wrong_is_orange(tmp_path, answer, color, other):
    pixels = drawn(tmp_path, [answered(answer, "color")])
    assert has(pixels, color) and not has(pixels, other)


def test_images_are_in_their_cells(tmp_path):
    colors = [(10 * i, 90, 200) for i in range(7)]
    skills = [f"s{i}" for i in range(7)]
    answers = [answered("red", s, Image.new("RGB", (48, 48), c)) for s, c in zip(skills, colors)]
    pixels = drawn(tmp_path, answers)
    row = SIDE + 8 + 3 * LINE + GAP  # skill, question and answer
    assert pixels.shape == (2 * row + GAP, COLUMNS * (SIDE + GAP) + GAP, 3)
    for i, color in enumerate(colors):
        x, y = GAP + i % COLUMNS * (SIDE + GAP), GAP + i // COLUMNS * row
        assert (pixels[y : y + SIDE, x : x + SIDE] == color).all()


def test_two_of_each_skill_or_ten_of_one(tmp_path):
    row = SIDE + 8 + 3 * LINE + GAP
    two = [answered("red", skill) for skill in "abc" for _ in range(5)]
    assert len(drawn(tmp_path, two)) == 2 * row + GAP  # six cells
    one = [answered("red", "all") for _ in range(30)]
    assert len(drawn(tmp_path, one)) == 2 * (row - LINE) + GAP  # ten cells without the skill


def test_unusual_contents_are_drawn(tmp_path):
    long = answered("many words " * 50, "a", Image.new("RGB", (2000, 1)), "one " * 80)
    empty, other = answered("", "b", Image.new("L", (1, 300))), answered("Ωü😀\n\x00", "c")
    pixels = drawn(tmp_path, [long, empty, other])
    assert has(pixels[GAP + SIDE :], WRONG)
    n_lines = 1 + 3 * 8  # of the first cell: at most 8 each, of which "expected: red" is one
    assert len(pixels) == GAP + SIDE + 8 + (n_lines - 7) * LINE + GAP


def test_no_text_is_cut_off(tmp_path):
    """The margin to the right of each cell stays white."""
    texts = ("a verylongword" + "x" * 200, "W" * 300, "word " * 100)
    pixels = drawn(tmp_path, [answered(text, f"s{i}", None, text) for i, text in enumerate(texts)])
    for i in range(len(texts)):
        right = (i + 1) * (SIDE + GAP)
        assert (pixels[GAP + SIDE + 2 :, right + 1 : right + GAP] == 255).all()
