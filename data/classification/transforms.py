"""Data augmentation: random resized crop, flip, RandAugment, random erasing, mixup, CutMix.

Pure functions: equal generator states give equal images. Not here: seeds (loader.py).

Letters: N images, C channels, K classes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from configs_classify import ClassifyDataConfig

RESAMPLE = Image.Resampling.BILINEAR


def augment(
    image: Image.Image, size: int, cfg: ClassifyDataConfig, rng: random.Random
) -> np.ndarray:
    """An image of any size -> [size, size] or [size, size, 3] uint8, augmented by `cfg`."""
    image = random_resized_crop(image, size, cfg.crop_min_scale, cfg.crop_max_ratio, rng)
    if rng.random() < cfg.horizontal_flip:
        image = ImageOps.mirror(image)
    for name in rng.choices(list(OPERATIONS), k=cfg.randaugment):
        image = OPERATIONS[name](image, cfg.randaugment_magnitude / 10, rng)
    pixels = np.array(image)
    return random_erasing(pixels, rng) if rng.random() < cfg.random_erasing else pixels


def random_resized_crop(
    image: Image.Image, size: int, min_scale: float, max_ratio: float, rng: random.Random
) -> Image.Image:
    """A random part of the image, resized to a square (Szegedy et al. 2015).

    Its fraction of the area is uniform in `min_scale`..1; its aspect ratio is log-uniform in
    1/`max_ratio`..`max_ratio`. `min_scale` = 1 keeps the whole image.
    """
    width, height = image.size
    box = (0.0, 0.0, float(width), float(height))
    if min_scale < 1:
        area = width * height * rng.uniform(min_scale, 1)
        ratio = math.exp(rng.uniform(-math.log(max_ratio), math.log(max_ratio)))
        w, h = min(width, math.sqrt(area * ratio)), min(height, math.sqrt(area / ratio))
        left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
        box = (left, top, min(left + w, width), min(top + h, height))
    return image.resize((size, size), RESAMPLE, box=box)


def random_erasing(pixels: np.ndarray, rng: random.Random) -> np.ndarray:
    """Replace a rectangle of 2 to 33 % of the area with noise (Zhong et al. 2017)."""
    height, width = pixels.shape[:2]
    area = width * height * rng.uniform(0.02, 0.33)
    ratio = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
    h = min(height, max(1, round(math.sqrt(area * ratio))))
    w = min(width, max(1, round(math.sqrt(area / ratio))))
    top, left = rng.randint(0, height - h), rng.randint(0, width - w)
    noise = np.frombuffer(rng.randbytes(h * w * pixels[0, 0].size), np.uint8)
    pixels = pixels.copy()
    pixels[top : top + h, left : left + w] = noise.reshape(h, w, *pixels.shape[2:])
    return pixels


# --- RandAugment (Cubuk et al. 2019): strength 0..1, with a random sign if it has a sign --------

Operation = Callable[[Image.Image, float, random.Random], Image.Image]


def _random_sign(strength: float, rng: random.Random) -> float:
    return strength if rng.random() < 0.5 else -strength


def _affine(matrix: Callable[[float, int, int], tuple]) -> Operation:
    def change(image: Image.Image, strength: float, rng: random.Random) -> Image.Image:
        data = matrix(_random_sign(strength, rng), *image.size)
        return image.transform(image.size, Image.Transform.AFFINE, data, RESAMPLE)

    return change


def _enhance(kind: type) -> Operation:
    return lambda image, strength, rng: kind(image).enhance(1 + _random_sign(0.9 * strength, rng))


OPERATIONS: dict[str, Operation] = {
    "identity": lambda image, strength, rng: image,
    "autocontrast": lambda image, strength, rng: ImageOps.autocontrast(image),
    "equalize": lambda image, strength, rng: ImageOps.equalize(image),
    "rotate": lambda image, strength, rng: image.rotate(30 * _random_sign(strength, rng), RESAMPLE),
    "solarize": lambda image, strength, rng: ImageOps.solarize(image, 256 - int(256 * strength)),
    "posterize": lambda image, strength, rng: ImageOps.posterize(image, 8 - int(4 * strength)),
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": _affine(lambda s, w, h: (1, 0.3 * s, -0.15 * s * h, 0, 1, 0)),
    "shear_y": _affine(lambda s, w, h: (1, 0, 0, 0.3 * s, 1, -0.15 * s * w)),
    "translate_x": _affine(lambda s, w, h: (1, 0, 0.3 * s * w, 0, 1, 0)),
    "translate_y": _affine(lambda s, w, h: (1, 0, 0, 0, 1, 0.3 * s * h)),
}


def smooth_labels(classes: Tensor, n_classes: int, smoothing: float) -> Tensor:
    """Class indices [N] -> label-smoothed probabilities [N, K] (Szegedy et al. 2015)."""
    one_hot = torch.nn.functional.one_hot(classes, n_classes).float()
    return one_hot * (1 - smoothing) + smoothing / n_classes


def mixup_or_cutmix(
    images: Tensor, targets: Tensor, cfg: ClassifyDataConfig, rng: random.Random
) -> tuple[Tensor, Tensor]:
    """Mix images [N, C, H, W] with the reversed batch, and targets [N, K] in proportion.

    Mixup (Zhang et al. 2017) blends two images; CutMix (Yun et al. 2019) pastes a rectangle of one
    into the other. If `cfg` enables both, each batch uses one at random.
    """
    methods = [(f, alpha) for f, alpha in ((mixup, cfg.mixup), (cutmix, cfg.cutmix)) if alpha]
    if not methods:
        return images, targets
    method, alpha = rng.choice(methods)
    images, share = method(images, rng.betavariate(alpha, alpha), rng)
    return images, share * targets + (1 - share) * targets.flip(0)


def mixup(images: Tensor, share: float, rng: random.Random) -> tuple[Tensor, float]:
    """(share * images + (1 - share) * reversed batch, share)."""
    return share * images + (1 - share) * images.flip(0), share


def cutmix(images: Tensor, share: float, rng: random.Random) -> tuple[Tensor, float]:
    """(images with a rectangle of the reversed batch, the unchanged fraction of the area)."""
    height, width = images.shape[-2:]
    h, w = round(height * math.sqrt(1 - share)), round(width * math.sqrt(1 - share))
    top, left = rng.randint(0, height - h), rng.randint(0, width - w)
    mixed = images.clone()
    rows, columns = slice(top, top + h), slice(left, left + w)
    mixed[:, :, rows, columns] = images.flip(0)[:, :, rows, columns]
    return mixed, 1 - h * w / (height * width)
