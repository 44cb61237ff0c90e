"""Changes to a picture that leave its class: crop, mirror, RandAugment, erasing, mixup, CutMix.

Pure: the same generator state gives the same picture. Not here: when which is asked for (views.py).

Letters: N pictures, C channels, K classes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from configs_classify import ClassesConfig

SMOOTH = Image.Resampling.BILINEAR


def augment(image: Image.Image, size: int, cfg: ClassesConfig, rng: random.Random) -> np.ndarray:
    """A picture of any size -> [size, size] or [size, size, 3] uint8, changed as `cfg` says."""
    image = random_crop(image, size, cfg.crop, cfg.stretch, rng)
    if rng.random() < cfg.flip:
        image = ImageOps.mirror(image)
    for name in rng.choices(list(OPERATIONS), k=cfg.randaugment):
        image = OPERATIONS[name](image, cfg.magnitude / 10, rng)
    pixels = np.array(image)
    return random_erase(pixels, rng) if rng.random() < cfg.erase else pixels


def random_crop(
    image: Image.Image, size: int, smallest: float, stretch: float, rng: random.Random
) -> Image.Image:
    """Part of a picture, made square: its area a share of at least `smallest`, its sides' ratio
    within `stretch`, drawn evenly on a log scale (Szegedy et al. 2015). The whole for 1."""
    width, height = image.size
    box = (0.0, 0.0, float(width), float(height))
    if smallest < 1:
        area = width * height * rng.uniform(smallest, 1)
        ratio = math.exp(rng.uniform(-math.log(stretch), math.log(stretch)))
        w, h = min(width, math.sqrt(area * ratio)), min(height, math.sqrt(area / ratio))
        left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
        box = (left, top, min(left + w, width), min(top + h, height))
    return image.resize((size, size), SMOOTH, box=box)


def random_erase(pixels: np.ndarray, rng: random.Random) -> np.ndarray:
    """A rectangle of 2 to 33 per cent of the area becomes noise (Zhong et al. 2017)."""
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


# --- RandAugment (Cubuk et al. 2019): strength 0..1, either way where there are two -------------

Operation = Callable[[Image.Image, float, random.Random], Image.Image]


def _either(strength: float, rng: random.Random) -> float:
    return strength if rng.random() < 0.5 else -strength


def _affine(matrix: Callable[[float, int, int], tuple]) -> Operation:
    def change(image: Image.Image, strength: float, rng: random.Random) -> Image.Image:
        data = matrix(_either(strength, rng), *image.size)
        return image.transform(image.size, Image.Transform.AFFINE, data, SMOOTH)

    return change


def _enhance(kind: type) -> Operation:
    return lambda image, strength, rng: kind(image).enhance(1 + _either(0.9 * strength, rng))


OPERATIONS: dict[str, Operation] = {
    "identity": lambda image, strength, rng: image,
    "autocontrast": lambda image, strength, rng: ImageOps.autocontrast(image),
    "equalize": lambda image, strength, rng: ImageOps.equalize(image),
    "rotate": lambda image, strength, rng: image.rotate(30 * _either(strength, rng), SMOOTH),
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


# --- Whole batches ------------------------------------------------------------------------------


def soften(classes: Tensor, n_classes: int, smoothing: float) -> Tensor:
    """Class numbers [N] -> probabilities [N, K], a share spread evenly (Szegedy et al. 2015)."""
    sharp = torch.nn.functional.one_hot(classes, n_classes).float()
    return sharp * (1 - smoothing) + smoothing / n_classes


def mix(
    images: Tensor, targets: Tensor, cfg: ClassesConfig, rng: random.Random
) -> tuple[Tensor, Tensor]:
    """Each picture [N, C, H, W] with that opposite it in the batch, targets [N, K] in proportion.

    Mixup (Zhang et al. 2017) blends the pictures, CutMix (Yun et al. 2019) puts a rectangle of one
    into the other; of two that are asked for, one is drawn.
    """
    ways = [(way, alpha) for way, alpha in ((mixup, cfg.mixup), (cutmix, cfg.cutmix)) if alpha]
    if not ways:
        return images, targets
    way, alpha = rng.choice(ways)
    images, share = way(images, rng.betavariate(alpha, alpha), rng)
    return images, share * targets + (1 - share) * targets.flip(0)


def mixup(images: Tensor, share: float, rng: random.Random) -> tuple[Tensor, float]:
    """(share of each picture and the rest of the opposite one, share)."""
    return share * images + (1 - share) * images.flip(0), share


def cutmix(images: Tensor, share: float, rng: random.Random) -> tuple[Tensor, float]:
    """(pictures with a rectangle of the opposite ones, the share that is still their own)."""
    height, width = images.shape[-2:]
    h, w = round(height * math.sqrt(1 - share)), round(width * math.sqrt(1 - share))
    top, left = rng.randint(0, height - h), rng.randint(0, width - w)
    mixed = images.clone()
    rows, columns = slice(top, top + h), slice(left, left + w)
    mixed[:, :, rows, columns] = images.flip(0)[:, :, rows, columns]
    return mixed, 1 - h * w / (height * width)
