"""Heatmaps over images, with the color scale that explains them.

Not here: the maps (models/inspect), attention overlays (engine/inference), rollouts (engine/vit).
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

from engine.figures.style import MUTED, PAPER, font_for

# Five colors of the viridis colormap, from dark to bright.
VIRIDIS = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]])
BAR, SMALL_TEXT = 12, 20  # height of a color scale's bar, size of its text
OPACITY = 0.85  # of the color over an image at the maximum; at the minimum, none


def to_unit(values: np.ndarray) -> np.ndarray:
    """Scale a map [h, w] to 0 (its minimum) to 1 (its maximum)."""
    low, high = float(values.min()), float(values.max())
    return ((values - low) / max(high - low, 1e-12)).astype(np.float32)


def enlarge(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map [h, w] as [height, width] of a size (width, height), in 0 to 1, interpolated."""
    smooth = Image.fromarray(to_unit(values)).resize(size, Image.Resampling.BICUBIC)
    return np.asarray(smooth).clip(0, 1)


def colorize(values: np.ndarray) -> np.ndarray:
    """Values in 0 to 1 [h, w] -> viridis colors [h, w, 3]."""
    at = values * (len(VIRIDIS) - 1)
    return np.stack([np.interp(at, range(len(VIRIDIS)), channel) for channel in VIRIDIS.T], -1)


def blend(gray: np.ndarray, values: np.ndarray) -> Image.Image:
    """Gray levels [h, w] with colors of values in 0 to 1 over them, opaque where they are high."""
    alpha = OPACITY * values[..., None]  # [h, w, 1]
    mixed = gray[..., None] * (1 - alpha) + colorize(values) * alpha
    return Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8))


def percent(share: float) -> str:
    """A share with two significant digits, for example 4.2 %."""
    value = 100 * share
    n_digits = min(4, max(0, 1 - math.floor(math.log10(value)))) if value > 0 else 0
    return f"{value:.{n_digits}f} %"


def to_backdrop(gray: np.ndarray) -> np.ndarray:
    """Darken gray levels, so that colors stand out."""
    return 0.75 * gray + 20


def overlay(image: Image.Image, values: np.ndarray) -> Image.Image:
    """The image in gray with a map [h, w] over it, scaled to its minimum and maximum."""
    gray = np.asarray(image.convert("L"), dtype=np.float32)
    return blend(to_backdrop(gray), enlarge(values, image.size))


def color_scale(low: float, high: float, width: int, is_overlay: bool) -> Image.Image:
    """A bar of all colors with the minimum and maximum of a map below."""
    values = np.tile(np.linspace(0, 1, width, dtype=np.float32), (BAR, 1))
    colors = colorize(values).round().astype(np.uint8)
    bar = (
        blend(to_backdrop(np.full_like(values, 200)), values)
        if is_overlay
        else Image.fromarray(colors)
    )
    scale = Image.new("RGB", (width, BAR + SMALL_TEXT + 10), PAPER)
    scale.paste(bar)
    pen, font = ImageDraw.Draw(scale), font_for("", SMALL_TEXT)
    pen.text((0, BAR + 3), percent(low), fill=MUTED, font=font)
    pen.text((width, BAR + 3), percent(high), fill=MUTED, font=font, anchor="ra")
    return scale
