"""Pictures of what a ViT does: where it looks, which pictures it finds alike.

Not here: the figures behind them (models/inspect/rollout.py, engine/vit/embedding.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from config_tools import InputError
from data.classification.loader import normalise, whole_view
from data.images import open_image
from models.inspect.rollout import rollout
from models.vision_transformer import ViT

SIDE, GAP, LINE = 160, 10, 18
# Dark to bright through blue, green, yellow; equal steps look equal, in print too.
STOPS = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]])


def heat(values: np.ndarray) -> Image.Image:
    """A map [h, w] -> a square picture, its least value dark and its largest bright."""
    low, high = values.min(), values.max()
    scaled = (values - low) / max(high - low, 1e-12)
    small = Image.fromarray(scaled.astype(np.float32))
    smooth = small.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    at = np.asarray(smooth).clip(0, 1) * (len(STOPS) - 1)  # [SIDE, SIDE]
    colors = [np.interp(at, range(len(STOPS)), channel) for channel in STOPS.T]
    return Image.fromarray(np.stack(colors, -1).round().astype(np.uint8))


def draw_rollout(vit: ViT, images: Sequence[Image.Image], path: Path) -> None:
    """Write a sheet: each picture as the encoder sees it, and beside it where it looks."""
    views = [whole_view(image, vit.cfg) for image in images]
    maps = rollout(vit, normalise(views, vit.cfg)).numpy()  # [N, grid, grid]
    rows = []
    for view, values in zip(views, maps):
        seen = square(Image.fromarray(view))
        colors = heat(values)
        rows += [(seen, ""), (Image.blend(seen, colors, 0.6), ""), (colors, "")]
    draw_rows([rows[i : i + 6] for i in range(0, len(rows), 6)], path)  # two pictures a line


def square(image: Image.Image) -> Image.Image:
    """A picture of any shape inside a square, small ones enlarged without blur."""
    image = image.convert("RGB")
    scale = SIDE / max(image.size)
    size = tuple(max(1, round(edge * scale)) for edge in image.size)
    how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    sheet = Image.new("RGB", (SIDE, SIDE), "white")
    sheet.paste(image.resize(size, how))
    return sheet


def draw_files(lines: Sequence[Sequence[tuple[str, str]]], path: Path) -> None:
    """Write a sheet of lines of (file, words under it)."""
    draw_rows([[(square(open_image(name)), words) for name, words in line] for line in lines], path)


def draw_rows(lines: Sequence[Sequence[tuple[Image.Image, str]]], path: Path) -> None:
    """Write lines of squares with words under them; raises `InputError` where it cannot."""
    n_columns, step = max(map(len, lines)), SIDE + GAP
    height = SIDE + GAP + LINE * any(words for line in lines for _, words in line)
    sheet = Image.new("RGB", (n_columns * step + GAP, len(lines) * height + GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for row, line in enumerate(lines):
        for column, (picture, words) in enumerate(line):
            x, y = GAP + column * step, GAP + row * height
            sheet.paste(picture, (x, y))
            while words and pen.textlength(words, font) > SIDE:
                words = words[1:]  # the end of a path tells more than its start
            pen.text((x, y + SIDE + 2), words, fill="black", font=font)
    try:
        sheet.save(path)
    except (OSError, ValueError) as error:  # ValueError: a suffix Pillow does not write
        raise InputError(f"{path}: cannot be written ({error}).") from None
