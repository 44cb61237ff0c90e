"""Attention overlays: for each token of an answer, heatmaps of attention over the images.

Not here: the attention weights (models/inspect/attention_maps.py).

Letters: R answer tokens, N tiles, G tokens per tile side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from data.images import tile_grid
from data.types import Tokens
from engine.figures.heatmaps import color_scale, overlay
from engine.figures.sheet import SIDE, Cell, Text, draw_sheet, square
from engine.figures.style import MUTED
from engine.inference.chat import Chat
from models.inspect.attention_maps import attention_weights, tile_maps

MAX_SIDE = 480  # longest side of an overlay, in pixels
COLUMNS = 6  # of a sheet of overlays


@dataclass(frozen=True)
class AttentionOverlay:
    """For each token of an answer: the attention over all tiles that predicted it."""

    maps: np.ndarray  # [R, N, G, G], averaged over blocks and heads
    on_images: np.ndarray  # [R], share of the attention that is on images


def attention_overlay(chat: Chat, prompt: Tokens, answer: Sequence[int]) -> AttentionOverlay:
    """Run prompt and answer once; answer token t is predicted by the position before it."""
    ids = torch.tensor([*prompt.ids.tolist(), *answer[:-1]], device=chat.model.device)
    pixels = chat.pixel_values(prompt).to(chat.model.device)
    weights = attention_weights(chat.model, ids, pixels, len(prompt) - 1)
    maps = tile_maps(weights.mean((0, 1)), ids, chat.processor.cfg)  # [R, N, G, G]
    return AttentionOverlay(maps.cpu().numpy(), maps.sum((1, 2, 3)).cpu().numpy())


def merge_tile_maps(maps: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """Merge the maps of an image's tiles [n, G, G] into one map of the image.

    With `rows` x `cols` tiles, they are laid out as a grid and the global view, the last map, is
    added. With `rows` = 0 there is one tile.
    """
    if rows == 0:
        return maps[0]  # [G, G]
    side = maps.shape[-1]
    tiles = maps[:-1].reshape(rows, cols, side, side).swapaxes(1, 2)  # [rows, G, cols, G]
    tiles = tiles.reshape(rows * side, cols * side)  # [rows * G, cols * G]
    whole = Image.fromarray(maps[-1].astype(np.float32)).resize(tiles.shape[::-1], 2)
    # The global view has the whole image in as many tokens as a tile.
    return tiles + np.asarray(whole) / (rows * cols)


def split_tiles(chat: Chat, images: Sequence[Image.Image]) -> list[tuple[slice, tuple[int, int]]]:
    """(slice of its tiles, (rows, cols) of its grid) for each image."""
    spans, first = [], 0
    for image in images:
        rows, cols = tile_grid(*image.size, chat.processor.cfg)
        n = rows * cols + 1
        spans.append((slice(first, first + n), (rows, cols)))
        first += n
    return spans


def paint_heatmap(image: Image.Image, heat: np.ndarray) -> Image.Image:
    """The image in gray with a map [h, w] over it, scaled to its minimum and maximum."""
    scale = MAX_SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    smooth = Image.Resampling.NEAREST if scale > 3 else Image.Resampling.BICUBIC
    return overlay(image.resize(size, smooth), heat)


def draw_overlays(
    chat: Chat,
    prompt: Tokens,
    answer: Sequence[int],
    images: Sequence[Image.Image],
    name: str,
    title: str = "",
) -> Image.Image:
    """A sheet: the first image with its `name`, and its overlay for each token of an answer.

    Below each overlay are the token, the share of attention on all images, and the color scale.
    """
    found = attention_overlay(chat, prompt, answer)
    tiles, grid = split_tiles(chat, images)[0]
    cells = [Cell(square(images[0]), (Text(name, is_path=True),))]
    for token, maps, share in zip(answer, found.maps, found.on_images):
        heat = merge_tile_maps(maps[tiles], *grid)
        word = chat.processor.tokenizer.decode([token], skip_special_tokens=True).strip()
        texts = Text(word or "(end)"), Text(f"{100 * share:.0f} % on image", MUTED)
        scale = color_scale(float(heat.min()), float(heat.max()), SIDE, is_overlay=True)
        cells.append(Cell(square(paint_heatmap(images[0], heat)), texts, scale))
    rows = [cells[i : i + COLUMNS] for i in range(0, len(cells), COLUMNS)]
    what = Text("Attention on the image for each token of the answer", MUTED, max_lines=2)
    return draw_sheet(rows, title=[Text(title, max_lines=3), what] if title else [what])
