"""Figures of a ViT: attention rollout, and contact sheets of search results.

Not here: the rollout (models/inspect/rollout.py), the search (embedding.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from config_tools import InputError
from data.classification.loader import normalise, resize_square
from data.images import open_image
from models.inspect.rollout import rollout
from models.vision_transformer import ViT

SIDE, GAP, LINE = 160, 10, 18
# Five colors of the viridis colormap, from dark to bright.
VIRIDIS = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]])


def heatmap(values: np.ndarray) -> Image.Image:
    """A map [h, w] as a square image; the minimum is dark, the maximum bright."""
    low, high = values.min(), values.max()
    scaled = (values - low) / max(high - low, 1e-12)
    small = Image.fromarray(scaled.astype(np.float32))
    smooth = small.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    at = np.asarray(smooth).clip(0, 1) * (len(VIRIDIS) - 1)  # [SIDE, SIDE]
    colors = [np.interp(at, range(len(VIRIDIS)), channel) for channel in VIRIDIS.T]
    return Image.fromarray(np.stack(colors, -1).round().astype(np.uint8))


def draw_rollout(vit: ViT, images: Sequence[Image.Image], path: Path) -> None:
    """Write a contact sheet: each image, the rollout map over it, and the map alone."""
    views = [resize_square(image, vit.cfg) for image in images]
    maps = rollout(vit, normalise(views, vit.cfg)).numpy()  # [N, grid, grid]
    rows = []
    for view, values in zip(views, maps):
        image = square(Image.fromarray(view))
        colors = heatmap(values)
        rows += [(image, ""), (Image.blend(image, colors, 0.6), ""), (colors, "")]
    draw_rows([rows[i : i + 6] for i in range(0, len(rows), 6)], path)  # two images per line


def square(image: Image.Image, side: int = SIDE) -> Image.Image:
    """Fit an image into a white square; small ones are enlarged without blur."""
    scale = side / max(image.size)
    width, height = (max(1, round(edge * scale)) for edge in image.size)
    how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    sheet = Image.new("RGB", (side, side), "white")
    sheet.paste(image.convert("RGB").resize((width, height), how))
    return sheet


def draw_files(lines: Sequence[Sequence[tuple[str, str]]], path: Path) -> None:
    """Write a contact sheet from lines of (image file, caption)."""
    draw_rows([[(square(open_image(name)), words) for name, words in line] for line in lines], path)


def draw_rows(lines: Sequence[Sequence[tuple[Image.Image, str]]], path: Path) -> None:
    """Write a contact sheet from lines of (square image, caption); raises `InputError`."""
    n_columns, step = max(map(len, lines)), SIDE + GAP
    height = SIDE + GAP + LINE * any(words for line in lines for _, words in line)
    sheet = Image.new("RGB", (n_columns * step + GAP, len(lines) * height + GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for row, line in enumerate(lines):
        for column, (image, words) in enumerate(line):
            x, y = GAP + column * step, GAP + row * height
            sheet.paste(image, (x, y))
            while words and pen.textlength(words, font) > SIDE:
                words = words[1:]  # keep the end of a path
            pen.text((x, y + SIDE + 2), words, fill="black", font=font)
    try:
        sheet.save(path)
    except (OSError, ValueError) as error:  # ValueError: a suffix that Pillow does not write
        raise InputError(f"{path}: cannot be written ({error}).") from None
