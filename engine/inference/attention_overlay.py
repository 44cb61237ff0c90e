"""Where an answer looked, painted onto its pictures; and the pictures as the model sees them.

Not here: the attention itself (models/inspect/attention_maps.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from data.images import grid
from data.types import Tokens
from engine.inference.chat import Chat
from models.inspect.attention_maps import attention_weights, tile_maps

WIDEST = 480  # pixels of a painted picture


@dataclass(frozen=True)
class AttentionOverlay:
    """For each token of an answer: where on the tiles the model looked when it chose it."""

    maps: np.ndarray  # [R, N, G, G], attention averaged over blocks and heads
    on_pictures: np.ndarray  # [R] how much of all attention that is


def attention_overlay(chat: Chat, prompt: Tokens, answer: Sequence[int]) -> AttentionOverlay:
    """Run prompt and answer once; token t was chosen by the position before it."""
    ids = torch.tensor([*prompt.ids.tolist(), *answer[:-1]], device=chat.model.device)
    pixels = chat.pixels(prompt).to(chat.model.device)
    weights = attention_weights(chat.model, ids, pixels, len(prompt) - 1)
    maps = tile_maps(weights.mean((0, 1)), ids, chat.processor.cfg)  # [R, N, G, G]
    return AttentionOverlay(maps.cpu().numpy(), maps.sum((1, 2, 3)).cpu().numpy())


def over_picture(maps: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """Maps of one picture's tiles [n, G, G] -> one map of the whole picture.

    A cut picture's tiles are laid side by side, and its global view, the last, over them.
    """
    if rows == 0:
        return maps[0]  # [G, G]
    side = maps.shape[-1]
    tiles = maps[:-1].reshape(rows, cols, side, side).swapaxes(1, 2)  # [rows, G, cols, G]
    tiles = tiles.reshape(rows * side, cols * side)  # [rows * G, cols * G]
    whole = Image.fromarray(maps[-1].astype(np.float32)).resize(tiles.shape[::-1], 2)
    # The global view holds all of the picture in as many tokens as one tile.
    return tiles + np.asarray(whole) / (rows * cols)


def split_pictures(
    chat: Chat, pictures: Sequence[Image.Image]
) -> list[tuple[slice, tuple[int, int]]]:
    """For each picture which tiles are its own, and their grid."""
    found, first = [], 0
    for picture in pictures:
        rows, cols = grid(*picture.size, chat.processor.cfg)
        n = rows * cols + 1
        found.append((slice(first, first + n), (rows, cols)))
        first += n
    return found


def paint(picture: Image.Image, heat: np.ndarray) -> Image.Image:
    """The picture in grey with the map over it, dark to bright; the brightest spot is 1."""
    scale = WIDEST / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    smooth = Image.Resampling.NEAREST if scale > 3 else Image.Resampling.BICUBIC
    grey = np.asarray(picture.convert("L").resize(size, smooth), dtype=np.float32)[..., None]
    heat = (heat - heat.min()) / max(float(heat.max() - heat.min()), 1e-12)
    glow = np.asarray(
        Image.fromarray(heat.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
    ).clip(0, 1)[..., None]  # [H, W, 1]
    warm = np.concatenate((np.full_like(glow, 255), 230 * glow, 60 * (1 - glow)), axis=-1)
    alpha = 0.75 * glow
    mixed = (0.45 * grey + 90) * (1 - alpha) + warm * alpha
    return Image.fromarray(mixed.clip(0, 255).astype(np.uint8))
