"""Sheets: a grid of images with texts below, drawn by Pillow.

Answer sheets, contact sheets, rollouts and attention overlays are sheets. Sizes are for a sheet
that is shown at half its width. Not here: colors and the font (style.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from config_tools import InputError
from engine.figures.style import INK, PAPER, RULE, font_for, shorten_path, wrap

SIDE, GAP = 240, 18  # edge of an image, and the space around it, in pixels
TEXT, LINE, INDENT = 24, 30, 28  # font size, line height, space for a mark
Strokes = tuple[tuple[tuple[int, int], ...], ...]
# Drawn, as the font has neither sign; points are relative to the start of the line.
TICK: Strokes = (((2, 16), (8, 23), (20, 7)),)
CROSS: Strokes = (((4, 9), (18, 23)), ((18, 9), (4, 23)))


@dataclass(frozen=True)
class Text:
    """A text below an image; wrapped, and shortened with an ellipsis if it is longer."""

    text: str
    color: str = INK
    max_lines: int = 1
    is_path: bool = False  # one line that keeps its end
    mark: Strokes = ()

    def lines(self, width: int) -> list[str]:
        """Its lines in `width` pixels."""
        if self.is_path:
            return [shorten_path(self.text, width, TEXT)]
        return wrap(self.text, width - (INDENT if self.mark else 0), TEXT, self.max_lines)


@dataclass(frozen=True)
class Cell:
    """An image, texts below it, and a color scale below them."""

    image: Image.Image | None = None
    texts: tuple[Text, ...] = ()
    scale: Image.Image | None = None

    def text_height(self, side: int) -> int:
        """Height of everything below the image."""
        n_lines = sum(len(text.lines(side)) for text in self.texts)
        return n_lines * LINE + (self.scale.height + 6 if self.scale else 0)


def square(image: Image.Image, side: int = SIDE) -> Image.Image:
    """Fit an image into a white square; small ones are enlarged without blur."""
    scale = side / max(image.size)
    width, height = (max(1, round(edge * scale)) for edge in image.size)
    how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    sheet = Image.new("RGB", (side, side), PAPER)
    sheet.paste(image.convert("RGB").resize((width, height), how))
    return sheet


def draw_sheet(
    rows: Sequence[Sequence[Cell]], side: int = SIDE, title: Sequence[Text] = ()
) -> Image.Image:
    """Draw rows of cells whose images are `side` wide; each row is as high as its texts."""
    width = max(map(len, rows)) * (side + GAP) + GAP
    image_heights = [max(cell.image.height if cell.image else 0 for cell in row) for row in rows]
    heights = [
        height + 8 + max(cell.text_height(side) for cell in row) + GAP
        for height, row in zip(image_heights, rows)
    ]
    top = GAP + sum(len(text.lines(width - 2 * GAP)) for text in title) * LINE
    top += 12 if title else 0
    sheet = Image.new("RGB", (width, top + sum(heights)), PAPER)
    pen, y = ImageDraw.Draw(sheet), GAP
    for text in title:
        y = _write(pen, text, GAP, y, width - 2 * GAP)
    for row, image_height, height in zip(rows, image_heights, heights):
        for column, cell in enumerate(row):
            x = GAP + column * (side + GAP)
            if cell.image:
                sheet.paste(cell.image, (x, top))
                corner = x + cell.image.width, top + cell.image.height
                pen.rectangle((x - 1, top - 1, *corner), outline=RULE)
            y = top + image_height + 8
            for text in cell.texts:
                y = _write(pen, text, x, y, side)
            if cell.scale:
                sheet.paste(cell.scale, (x, y + 6))
        top += height
    return sheet


def _write(pen: ImageDraw.ImageDraw, text: Text, x: int, y: int, width: int) -> int:
    """Write a text with its mark; returns the y of the next line."""
    for stroke in text.mark:
        pen.line([(x + dx, y + dy) for dx, dy in stroke], fill=text.color, width=3)
    for line in text.lines(width):
        at = (x + (INDENT if text.mark else 0), y)
        pen.text(at, line, fill=text.color, font=font_for(line, TEXT))
        y += LINE
    return y


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """Write a sheet; raises `InputError`."""
    try:
        sheet.save(path)
    except (OSError, ValueError) as error:  # ValueError: a suffix that Pillow does not write
        raise InputError(f"{path}: cannot be written ({error}).") from None
