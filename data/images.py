"""Open images as upright RGB, and split them into the same tiles as Idefics3's PIL processor.

Not here: where an image comes from (sources/), augmentation (classification/transforms.py).
"""

from __future__ import annotations

import io
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from config_tools import InputError
from configs import VLMConfig

MAX_PIXELS = 89_478_485  # Pillow's own warning threshold: a quarter GiB of RGB
# Pillow supports more formats; some start external programs or are very slow on broken files.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO")
MAX_EDGE = 4096  # maximum edge after resizing in Idefics3


def open_image(source: str | Path | bytes | Image.Image, name: str = "image") -> Image.Image:
    """A path, the bytes of a file or a PIL image of any mode -> upright RGB.

    Transparency is blended with white; only the first frame of an animation is used.
    Raises `InputError` naming the file (or `name` if there is none) and the problem.
    """
    name = str(source) if isinstance(source, (str, Path)) else name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # serious problems raise an exception
            image: Any = io.BytesIO(source) if isinstance(source, bytes) else source
            if not isinstance(image, Image.Image):
                image = Image.open(image, "r", FORMATS)
            width, height = image.size
            if width * height > MAX_PIXELS:
                size = f"{width} x {height} pixels exceed the limit of {MAX_PIXELS:,}"
                raise InputError(f"{name}: {size}; resize the image first.")
            return _to_rgb(ImageOps.exif_transpose(image))
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{name}: no such file.") from None
    except Image.DecompressionBombError:
        size = f"more than {MAX_PIXELS:,} pixels"
        raise InputError(f"{name}: {size}; resize the image first.") from None
    except Exception as error:  # Pillow's plug-ins raise many types on broken files
        reason = (str(error) or type(error).__name__).split("\n")[0][:120]
        if isinstance(error, UnidentifiedImageError):
            reason = f"supported formats: {', '.join(FORMATS)}"
        raise InputError(f"{name}: not a readable image ({reason}).") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8bit(image)
    if image.mode in ("CMYK", "YCbCr", "LAB", "HSV", "1", "L") and "transparency" not in image.info:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255)), rgba).convert("RGB")


def _to_8bit(image: Image.Image) -> Image.Image:
    """Greyscale with more than 8 bits -> 8 bits; `convert` would clip at 255.

    16-bit values are divided by 257. Float and 32-bit values have no fixed scale: their range is
    mapped to 0..255 unless it already lies within.
    """
    values = np.asarray(image).astype(np.float64)
    values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    low, high = values.min(), values.max()
    # Pillow opens some 16-bit files in mode "I".
    is_16bit = image.mode == "I" and low >= 0 and 255 < high <= 65535
    if image.mode.startswith("I;16") or is_16bit:
        scaled = values / 257
    elif low >= 0 and high <= 255:
        scaled = values
    else:
        scaled = (values - low) / max(high - low, 1e-12) * 255
    return Image.fromarray(scaled.round().astype(np.uint8))


def fit_longest(width: int, height: int, longest: int) -> tuple[int, int]:
    """The size whose longer edge is `longest`; the shorter is rounded down, then up to even."""
    aspect = width / height
    other = int(longest / aspect) if width >= height else int(longest * aspect)
    other = max(1, other + other % 2)
    size = (longest, other) if width >= height else (other, longest)
    if max(size) > MAX_EDGE:
        aspect = size[0] / size[1]
        if size[0] >= size[1]:
            return MAX_EDGE, max(1, int(MAX_EDGE / aspect))
        return max(1, int(MAX_EDGE * aspect)), MAX_EDGE
    return size


def fit_tiles(width: int, height: int, tile: int) -> tuple[int, int]:
    """Both edges rounded up to multiples of `tile`: first the longer, then the scaled shorter."""
    aspect = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        height = math.ceil(int(width / aspect) / tile) * tile
    else:
        height = math.ceil(height / tile) * tile
        width = math.ceil(int(height * aspect) / tile) * tile
    return width, height


def tile_grid(width: int, height: int, cfg: VLMConfig) -> tuple[int, int]:
    """Rows and columns of tiles of an image; (0, 0) if it is a single tile."""
    width, height = fit_tiles(*fit_longest(width, height, cfg.max_img_size), cfg.vit_img_size)
    rows, cols = height // cfg.vit_img_size, width // cfg.vit_img_size
    return (0, 0) if rows * cols == 1 else (rows, cols)


def tile(image: Image.Image, cfg: VLMConfig) -> tuple[np.ndarray, tuple[int, int]]:
    """RGB image -> tiles [N, size, size, 3] uint8 and their grid (rows, cols).

    Tiles are in row-major order; the global view is last.
    Mirrors transformers' Idefics3ImageProcessorPil with image splitting on.
    """
    size = cfg.vit_img_size
    image = _resize(image, fit_longest(*image.size, cfg.max_img_size))
    image = _resize(image, fit_tiles(*image.size, size))
    rows, cols = tile_grid(*image.size, cfg)
    if rows == 0:
        return np.array(image)[None], (0, 0)  # [1, size, size, 3]
    pixels = np.array(image).reshape(rows, size, cols, size, 3)
    pixels = pixels.swapaxes(1, 2)  # [rows, cols, size, size, 3]
    whole = np.asarray(_resize(image, (size, size)))[None]  # [1, size, size, 3]
    return np.concatenate((pixels.reshape(-1, size, size, 3), whole)), (rows, cols)


def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def normalise(tiles: np.ndarray, cfg: VLMConfig) -> torch.Tensor:
    """[N, H, W, 3] uint8 -> [N, 3, H, W] float32, scaled to [0, 1], minus mean, over std."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (cfg.vit_image_mean, cfg.vit_image_std))
    x = torch.from_numpy(tiles).permute(0, 3, 1, 2).contiguous().float()  # [N, 3, H, W]
    return x.div_(255).sub_(mean).div_(std)  # in place: this takes most of the time of a batch
