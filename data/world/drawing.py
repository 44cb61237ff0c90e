"""Scenes of the built-in dataset -> images of 48 x 48 pixels."""

from __future__ import annotations

import random
from functools import cache

import numpy as np
from PIL import Image

from data.world.scenes import BACKGROUNDS, COLORS, SHAPES, SIZES, Scene

CELL, SIDE, SUPERSAMPLE = 16, 48, 4  # pixels per cell and image side; samples per pixel and axis
SLOPE = np.linspace(-1, 1, SIDE, dtype=np.float32)  # from edge to edge of the image
# A font of 3 x 5 pixels; each digit is listed row by row.
DIGITS = ("111101101101111", "010110010010111", "111001111100111", "111001111001111",
          "101101111001001", "111100111001111", "111100111101111", "111001001001001",
          "111101111101111", "111101111001111")  # fmt: skip


def draw(scene: Scene) -> Image.Image:
    """RGB, 48 x 48. The background is drawn first, so its noise does not depend on the things."""
    rng = random.Random(scene.noise)
    image = _background(BACKGROUNDS[scene.background], rng)
    for thing in scene.things:
        tint = [channel + rng.randint(-12, 12) for channel in COLORS[thing.color]]
        _blend(image, thing.cell, _coverage(thing.shape, thing.size, thing.dx, thing.dy), tint)
    if scene.number is not None:
        ink = 0 if sum(BACKGROUNDS[scene.background]) > 3 * 128 else 255
        digits = _digits(scene.number, 3 + rng.randint(-1, 1), 1 + rng.randint(-1, 1))
        _blend(image, scene.number_cell, digits, [ink] * 3)
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


def _background(color: tuple[int, int, int], rng: random.Random) -> np.ndarray:
    gradient = rng.uniform(-6, 6) * SLOPE[:, None] + rng.uniform(-6, 6) * SLOPE  # [48, 48]
    grain = (np.frombuffer(rng.randbytes(SIDE * SIDE), np.uint8) % 7 - 3.0).reshape(SIDE, SIDE)
    return np.array(color, np.float32) + (gradient + grain)[..., None]  # [48, 48, 3]


@cache  # at most 1,090 results: positions are multiples of a quarter pixel
def _coverage(shape: str, size: str, dx: float, dy: float) -> np.ndarray:
    """The fraction of each pixel of the cell that a thing covers: [16, 16] in 0..1."""
    radius, _ = SIZES[size]
    at = (np.arange(CELL * SUPERSAMPLE, dtype=np.float32) + 0.5) / SUPERSAMPLE - CELL / 2
    inside = SHAPES[shape]((at - dx) / radius, (at[:, None] - dy) / radius)  # [64, 64]
    return inside.reshape(CELL, SUPERSAMPLE, CELL, SUPERSAMPLE).mean((1, 3))


@cache
def _digits(number: str, top: int, left: int) -> np.ndarray:
    """Two digits at twice the font's size: [16, 16], 0 or 1."""
    rows = [np.array(list(DIGITS[int(digit)]), np.float32).reshape(5, 3) for digit in number]
    ink = np.hstack([rows[0], np.zeros((5, 1), np.float32), rows[1]])
    ink = ink.repeat(2, 0).repeat(2, 1)  # [10, 14]
    return np.pad(ink, ((top, 6 - top), (left, 2 - left)))


def _blend(image: np.ndarray, cell: int, alpha: np.ndarray, color: list[int]) -> None:
    row, column = cell // 3 * CELL, cell % 3 * CELL
    block = image[row : row + CELL, column : column + CELL]  # a view, [16, 16, 3]
    block += alpha[..., None] * (np.array(color, np.float32) - block)
