"""The sheet shows right and wrong alike, whatever the pictures and texts."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from data.types import Sample, Turn
from engine.evaluation.answer_sheet import (
    COLUMNS,
    GAP,
    GREEN,
    RED,
    SIDE,
    TEXT_HEIGHT,
    draw_answer_sheet,
)
from engine.evaluation.evaluate import Answered, Item


def answered(answer: str, skill: str, picture=None, question: str = "What?") -> Answered:
    images = () if picture is None else (picture,)
    turns = (Turn("user", "<image>" * len(images) + question), Turn("assistant", "red"))
    return Answered(Item(Sample(turns, images), skill), answer, float(answer == "red"))


def drawn(tmp_path, answers: list[Answered]) -> np.ndarray:
    draw_answer_sheet(answers, tmp_path / "sheet.png")
    return np.asarray(Image.open(tmp_path / "sheet.png"))


def has(pixels: np.ndarray, color: tuple[int, int, int]) -> bool:
    return bool((pixels == color).all(-1).any())


@pytest.mark.parametrize(("answer", "ink", "other"), [("red", GREEN, RED), ("blue", RED, GREEN)])
def test_right_is_green_and_wrong_is_red(tmp_path, answer, ink, other):
    pixels = drawn(tmp_path, [answered(answer, "color")])
    assert has(pixels, ink) and not has(pixels, other)


def test_pictures_stand_in_their_cells(tmp_path):
    colors = [(10 * i, 90, 200) for i in range(7)]
    skills = [f"s{i}" for i in range(7)]
    answers = [answered("red", s, Image.new("RGB", (48, 48), c)) for s, c in zip(skills, colors)]
    pixels = drawn(tmp_path, answers)
    assert pixels.shape == (2 * (SIDE + TEXT_HEIGHT + GAP) + GAP, COLUMNS * (SIDE + GAP) + GAP, 3)
    for i, color in enumerate(colors):
        x, y = GAP + i % COLUMNS * (SIDE + GAP), GAP + i // COLUMNS * (SIDE + TEXT_HEIGHT + GAP)
        assert (pixels[y : y + SIDE, x : x + SIDE] == color).all()


def test_two_of_each_skill_or_ten_of_one(tmp_path):
    row = SIDE + TEXT_HEIGHT + GAP
    two = [answered("red", skill) for skill in "abc" for _ in range(5)]
    assert len(drawn(tmp_path, two)) == 2 * row + GAP  # six cells
    one = [answered("red", "all") for _ in range(30)]
    assert len(drawn(tmp_path, one)) == 2 * row + GAP  # ten cells


def test_odd_contents_are_drawn(tmp_path):
    long = answered("many words " * 50, "a", Image.new("RGB", (2000, 1)), "one " * 80)
    empty, other = answered("", "b", Image.new("L", (1, 300))), answered("Ωü😀\n\x00", "c")
    pixels = drawn(tmp_path, [long, empty, other])
    bottom = GAP + SIDE + TEXT_HEIGHT
    assert has(pixels[GAP + SIDE :], RED) and not has(pixels[bottom + 2 :], RED)
