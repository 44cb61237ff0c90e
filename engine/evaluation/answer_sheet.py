"""Answer sheets: an image of questions and answers, each with a tick or a cross."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from data.images import open_image
from engine.evaluation.evaluate import Answered, by_skill
from engine.figures.sheet import CROSS, TICK, Cell, Text, draw_sheet, square
from engine.figures.style import INK, MUTED, RIGHT, RULE, WRONG

COLUMNS, SIDE = 5, 298
MAX_LINES = 8  # of a question, of an answer and of an expected answer


def draw_answer_sheet(answered: Sequence[Answered], path: Path, per_skill: int = 2) -> None:
    """Write a grid of the first `per_skill` answers of each skill, right or wrong.

    With a single skill, the grid has ten answers.
    """
    groups = by_skill(answered)
    per_skill = per_skill if len(groups) > 1 else 2 * COLUMNS
    chosen = [group[i] for i in range(per_skill) for group in groups.values() if i < len(group)]
    cells = [_cell(a, shows_skill=len(groups) > 1) for a in chosen]
    draw_sheet([cells[i : i + COLUMNS] for i in range(0, len(cells), COLUMNS)], SIDE).save(path)


def try_draw_answer_sheet(answered: Sequence[Answered], path: Path) -> None:
    """`draw_answer_sheet` during training: if it cannot be written, print that and continue."""
    try:
        draw_answer_sheet(answered, path)
    except OSError as error:
        print(f"{path}: cannot be written ({error.strerror}); training continues.")


def _cell(a: Answered, shows_skill: bool) -> Cell:
    """An image, its question, the answer with its mark, and what was expected if it is wrong."""
    images = a.item.sample.images
    mark, color = (TICK, RIGHT) if a.score else (CROSS, WRONG)
    texts = [Text(a.item.skill, MUTED)] if shows_skill else []
    texts.append(Text(a.item.question.replace("<image>", ""), INK, MAX_LINES))
    texts.append(Text(a.answer or "(no answer)", color, MAX_LINES, mark=mark))
    if not a.score:
        texts.append(Text(f"expected: {a.item.expected}", MUTED, MAX_LINES))
    image = square(open_image(images[0]), SIDE) if images else Image.new("RGB", (SIDE, SIDE), RULE)
    return Cell(image, tuple(texts))
