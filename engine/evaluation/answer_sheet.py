"""Answer sheets: an image of questions and answers, each with a tick or a cross."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from data.images import open_image
from engine.evaluation.evaluate import Answered, by_skill
from engine.vit.figures import square

COLUMNS, SIDE, TEXT_HEIGHT, GAP = 5, 240, 84, 14
# Pillow's built-in font has neither sign; points are relative to the start of the line.
TICK = (((1, 9), (5, 14), (12, 4)),)
CROSS = (((2, 5), (11, 14)), ((11, 5), (2, 14)))
GREEN, RED, INK = (20, 140, 60), (200, 30, 30), (30, 30, 30)


def draw_answer_sheet(answered: Sequence[Answered], path: Path, per_skill: int = 2) -> None:
    """Write a grid of the first `per_skill` answers of each skill, right or wrong.

    With a single skill, the grid has ten answers.
    """
    groups = by_skill(answered)
    per_skill = per_skill if len(groups) > 1 else 2 * COLUMNS
    chosen = [group[i] for i in range(per_skill) for group in groups.values() if i < len(group)]
    n_rows = -(-len(chosen) // COLUMNS)
    width, height = SIDE + GAP, SIDE + TEXT_HEIGHT + GAP
    sheet = Image.new("RGB", (COLUMNS * width + GAP, n_rows * height + GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for i, a in enumerate(chosen):
        x, y = GAP + i % COLUMNS * width, GAP + i // COLUMNS * height
        if a.item.sample.images:
            sheet.paste(square(open_image(a.item.sample.images[0]), SIDE), (x, y))
        question = a.item.question.replace("<image>", "")
        line = _write(pen, font, x, y + SIDE + 4, question, INK)
        color = GREEN if a.score else RED
        for stroke in TICK if a.score else CROSS:
            pen.line([(x + dx, line + dy) for dx, dy in stroke], fill=color, width=2)
        line = _write(pen, font, x + 16, line, a.answer or "(nothing)", color)
        if not a.score:
            _write(pen, font, x, line, f"expected: {a.item.expected}", INK)
    sheet.save(path)


def try_draw_answer_sheet(answered: Sequence[Answered], path: Path) -> None:
    """`draw_answer_sheet` during training: if it cannot be written, print that and continue."""
    try:
        draw_answer_sheet(answered, path)
    except OSError as error:
        print(f"{path}: cannot be written ({error.strerror}); training continues.")


def _write(pen: ImageDraw.ImageDraw, font, x: int, y: int, text: str, color) -> int:
    """Write at most two lines, as wide as an image; return the y of the next line."""
    lines = [""]
    for word in text.split():
        if pen.textlength(f"{lines[-1]} {word}".strip(), font) > SIDE - 16 and lines[-1]:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    for i, line in enumerate(lines[:2]):
        more = " ..." if i == 1 and len(lines) > 2 else ""
        pen.text((x, y), line + more, fill=color, font=font)
        y += 18
    return y
