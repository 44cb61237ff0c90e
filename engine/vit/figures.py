"""Figures of a ViT: attention rollout, and contact sheets of search results.

Not here: the rollout (models/inspect/rollout.py), the search (embedding.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data.classification.loader import normalise, resize_square
from data.images import open_image
from engine.figures.heatmaps import color_scale, colorize, enlarge, overlay
from engine.figures.sheet import SIDE, Cell, Text, draw_sheet, save_sheet, square
from engine.figures.style import MUTED
from models.inspect.rollout import rollout
from models.vision_transformer import ViT

COLUMNS = 6


def heatmap(values: np.ndarray) -> Image.Image:
    """A map [h, w] as a square image; the minimum is dark, the maximum bright."""
    return Image.fromarray(colorize(enlarge(values, (SIDE, SIDE))).round().astype(np.uint8))


def draw_rollout(
    vit: ViT, images: Sequence[Image.Image], path: Path, names: Sequence[str] = ()
) -> None:
    """Write a sheet: each image with its file name, the rollout map over it, and the map alone."""
    views = [resize_square(image, vit.cfg) for image in images]
    maps = rollout(vit, normalise(views, vit.cfg)).numpy()  # [N, grid, grid]
    names = names or [f"image {i + 1}" for i in range(len(images))]
    cells = []
    for view, values, name in zip(views, maps, names, strict=True):
        image = square(Image.fromarray(view))
        low, high = float(values.min()), float(values.max())
        over, alone = (color_scale(low, high, SIDE, is_over) for is_over in (True, False))
        cells.append(Cell(image, (Text(name, is_path=True),)))
        cells.append(Cell(overlay(image, values), (Text("over the image", MUTED),), over))
        cells.append(Cell(heatmap(values), (Text("map alone", MUTED),), alone))
    rows = [cells[i : i + COLUMNS] for i in range(0, len(cells), COLUMNS)]  # two images per row
    title = Text("Attention rollout: share of each patch in the output", max_lines=2)
    save_sheet(draw_sheet(rows, title=[title]), path)


def draw_files(lines: Sequence[Sequence[tuple[str, str]]], path: Path) -> None:
    """Write a contact sheet from lines of (image file, caption), with each file's name.

    A file name at the end of a caption is not repeated. A long line continues in a further row,
    below its second image.
    """
    rows: list[list[Cell]] = []
    for line in lines:
        cells = [file_cell(name, caption) for name, caption in line]
        rows.append(cells[:COLUMNS])
        rest = cells[COLUMNS:]
        for i in range(0, len(rest), COLUMNS - 1):
            rows.append([Cell(), *rest[i : i + COLUMNS - 1]])
    save_sheet(draw_sheet(rows), path)


def file_cell(name: str, caption: str) -> Cell:
    """An image file with its name and its caption."""
    texts = (Text(name, is_path=True), Text(caption.removesuffix(name).strip(), MUTED))
    return Cell(square(open_image(name)), texts)
