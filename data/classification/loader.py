"""Labelled pictures -> batches a classifier eats; in training each sight of one is another view.

The loader is the one of loader.py: same order, same resume, same skipping of rows that fail. Not
here: what a view may change (augment.py), which picture has which class (classes.py).

Letters: N pictures, C channels, K classes.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from config_tools import InputError
from configs import DataConfig, ViTConfig
from configs_classify import ClassesConfig
from data.batches.loader import Encoded, Loader
from data.classification.dataset import Classes, label_of
from data.classification.transforms import SMOOTH, augment, mix, soften
from data.images import open_image
from data.types import Sample, copied


@dataclass
class ViewBatch:
    """N pictures and their classes: numbers [N], or probabilities [N, K] where views are mixed."""

    images: Tensor  # [N, C, H, W] float32, normalised
    targets: Tensor  # [N] int64 or [N, K] float32
    n_tokens: int = 0  # that the encoder sees
    state: dict = field(default_factory=dict)  # the loader's, after this batch

    @property
    def n_targets(self) -> int:
        return len(self.images)

    def tensors(self) -> dict[str, Tensor]:
        """The arguments of `Classifier.forward`."""
        return {"images": self.images, "targets": self.targets}

    def to(self, device: torch.device | str) -> ViewBatch:
        images, targets = (copied(x, device) for x in (self.images, self.targets))
        return ViewBatch(images, targets, self.n_tokens, self.state)


class View(NamedTuple):
    pixels: np.ndarray  # [H, W] or [H, W, 3] uint8
    label: int


def open_picture(source: Any, cfg: ViTConfig, name: str = "image") -> Image.Image:
    """Anything `open_image` opens -> upright, in colour or grey as the model has channels."""
    image = open_image(source, name)
    return image.convert("L") if cfg.vit_n_channels == 1 else image


def whole_view(image: Image.Image, cfg: ViTConfig) -> np.ndarray:
    """The whole picture, made square: what transformers' ViTImageProcessor does, and evaluation."""
    size = (cfg.vit_img_size, cfg.vit_img_size)
    return np.array(image if image.size == size else image.resize(size, SMOOTH))


def whole_views(pictures: Iterable, cfg: ViTConfig) -> tuple[list[np.ndarray], list[str]]:
    """Views of those pictures that open, and for each picture what is wrong; "" if nothing is."""
    views, problems = [], []
    for picture in pictures:
        try:
            views.append(whole_view(open_picture(picture, cfg), cfg))
            problems.append("")
        except InputError as error:
            problems.append(str(error))
    return views, problems


def normalise(pixels: Sequence[np.ndarray], cfg: ViTConfig) -> Tensor:
    """N views [H, W] or [H, W, 3] uint8 -> [N, C, H, W] float32, minus mean, over deviation."""
    x = torch.from_numpy(np.stack(pixels)).float() / 255
    x = x.unflatten(2, (-1, 1)) if x.ndim == 3 else x  # [N, H, W, C]
    n = cfg.vit_n_channels
    mean, std = torch.tensor(cfg.vit_image_mean[:n]), torch.tensor(cfg.vit_image_std[:n])
    return ((x - mean) / std).permute(0, 3, 1, 2).contiguous()  # [N, C, H, W]


@dataclass(frozen=True)
class Sights:
    """Row i of a source at its e-th sight is number e * len + i."""

    source: Classes

    def __getitem__(self, sight: int) -> tuple[Sample, int]:
        return self.source[sight % len(self.source)], sight


@dataclass(frozen=True)
class Viewer:
    """(Sample, which sight) -> View; the place of a processor in the loader."""

    model: ViTConfig
    data: ClassesConfig
    numbers: dict[str, int]  # of the classes

    def encode(self, sight: tuple[Sample, int], *_budget: int) -> View:
        """Raises `InputError` naming the row where its picture cannot be opened."""
        sample, number = sight
        image = open_picture(sample.images[0], self.model, sample.row)
        rng = random.Random(f"{self.data.seed}/view/{number}")
        pixels = augment(image, self.model.vit_img_size, self.data, rng)
        return View(pixels, self.numbers[label_of(sample)])

    def batch(self, views: Sequence[View], seed: str) -> ViewBatch:
        cfg, rng = self.data, random.Random(f"{self.data.seed}/mix/{seed}")
        images = normalise([view.pixels for view in views], self.model)
        targets = torch.tensor([view.label for view in views])
        if cfg.mixup or cfg.cutmix or cfg.label_smoothing:
            soft = soften(targets, len(self.numbers), cfg.label_smoothing)
            images, targets = mix(images, soft, cfg, rng)
        return ViewBatch(images, targets, len(views) * n_tokens(self.model))


def n_tokens(cfg: ViTConfig) -> int:
    return cfg.vit_n_patches + cfg.vit_n_prefix


@dataclass
class ViewLoader(Loader):
    """Endless batches of views: `ViewLoader(source, viewer, loader_config(...))`."""

    def _chunks(self) -> Iterator[list[int]]:
        n = len(self.source)
        seen = self.epoch * n + self.position
        for rows in super()._chunks():
            yield [seen // n * n + i for i in rows]  # a chunk never crosses epochs
            seen += len(rows)

    def _encoded(self) -> Encoded:
        return Encoded(Sights(self.source), self.processor, self.cfg)

    def _collate(self, groups: list[list[View]]) -> ViewBatch:
        last = f"{self.epoch}/{self.position}"
        return self.processor.batch([view for group in groups for view in group], last)

    def _skip(self, i: int, reason: str) -> None:
        super()._skip(i % len(self.source), reason)


def loader_config(cfg: ClassesConfig) -> DataConfig:
    """What the loader reads of a config: a row is one picture, nothing is packed."""
    return DataConfig(
        source=cfg.source, seed=cfg.seed, batch_size=cfg.batch_size, packing=False,
        workers=cfg.workers,
    )  # fmt: skip


def evaluation_batches(
    source: Classes, cfg: ViTConfig, names: Sequence[str], batch_size: int = 128
) -> Iterator[tuple[ViewBatch, list[str]]]:
    """(batch of whole views, what is wrong with pictures left out of it), once over a source.

    Where no picture can be opened, the batch is empty.
    """
    numbers = {name: i for i, name in enumerate(names)}
    for start in range(0, len(source), batch_size):
        views, labels, failed = [], [], []
        for i in range(start, min(start + batch_size, len(source))):
            sample = source[i]
            try:
                views.append(whole_view(open_picture(sample.images[0], cfg, sample.row), cfg))
                labels.append(numbers[label_of(sample)])
            except InputError as error:
                failed.append(str(error))
        empty = torch.zeros(0, cfg.vit_n_channels, cfg.vit_img_size, cfg.vit_img_size)
        images = normalise(views, cfg) if views else empty
        yield ViewBatch(images, torch.tensor(labels, dtype=torch.int64)), failed
