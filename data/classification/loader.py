"""Images with classes -> batches for a classifier, augmented differently in every epoch.

Order, resume and skipping of unusable rows are inherited from batches/loader.py.
Not here: the augmentations (transforms.py), which image has which class (dataset.py).

Letters: N images, C channels, K classes.
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
from configs_classify import ClassifyDataConfig
from data.batches.loader import EncodedDataset, Loader
from data.classification.dataset import ClassificationDataset, label_of
from data.classification.transforms import RESAMPLE, augment, mixup_or_cutmix, smooth_labels
from data.images import open_image
from data.types import Sample, copy_to


@dataclass
class ClassificationBatch:
    """N images and their classes: indices [N], or probabilities [N, K] after mixup or smoothing."""

    images: Tensor  # [N, C, H, W] float32, normalised
    targets: Tensor  # [N] int64 or [N, K] float32
    n_tokens: int = 0  # tokens in the encoder
    state: dict = field(default_factory=dict)  # state of the loader after this batch

    @property
    def n_targets(self) -> int:
        return len(self.images)

    def tensors(self) -> dict[str, Tensor]:
        """The arguments of `Classifier.forward`."""
        return {"images": self.images, "targets": self.targets}

    def to(self, device: torch.device | str) -> ClassificationBatch:
        """A copy on `device`, transferred asynchronously."""
        images, targets = (copy_to(x, device) for x in (self.images, self.targets))
        return ClassificationBatch(images, targets, self.n_tokens, self.state)


class LabeledImage(NamedTuple):
    pixels: np.ndarray  # [H, W] or [H, W, 3] uint8
    label: int


def open_for_vit(source: Any, cfg: ViTConfig, name: str = "image") -> Image.Image:
    """Like `open_image`, but greyscale if the model has one channel."""
    image = open_image(source, name)
    return image.convert("L") if cfg.vit_n_channels == 1 else image


def resize_square(image: Image.Image, cfg: ViTConfig) -> np.ndarray:
    """Resize the whole image, like transformers' ViTImageProcessor; no augmentation."""
    size = (cfg.vit_img_size, cfg.vit_img_size)
    return np.array(image if image.size == size else image.resize(size, RESAMPLE))


def open_and_resize(images: Iterable, cfg: ViTConfig) -> tuple[list[np.ndarray], list[str]]:
    """(pixels of the readable images, an error message or "" for every image)."""
    pixels, errors = [], []
    for image in images:
        try:
            pixels.append(resize_square(open_for_vit(image, cfg), cfg))
            errors.append("")
        except InputError as error:
            errors.append(str(error))
    return pixels, errors


def normalise(pixels: Sequence[np.ndarray], cfg: ViTConfig) -> Tensor:
    """N images [H, W] or [H, W, 3] uint8 -> [N, C, H, W] float32, minus mean, over std."""
    x = torch.from_numpy(np.stack(pixels)).float() / 255
    x = x.unflatten(2, (-1, 1)) if x.ndim == 3 else x  # [N, H, W, C]
    n = cfg.vit_n_channels
    mean, std = torch.tensor(cfg.vit_image_mean[:n]), torch.tensor(cfg.vit_image_std[:n])
    return ((x - mean) / std).permute(0, 3, 1, 2).contiguous()  # [N, C, H, W]


@dataclass(frozen=True)
class EpochDataset:
    """Index epoch * len + i -> (sample i, index); the index seeds the augmentation."""

    dataset: ClassificationDataset

    def __getitem__(self, index: int) -> tuple[Sample, int]:
        return self.dataset[index % len(self.dataset)], index

    def row_number(self, index: int) -> int:
        return self.dataset.row_number(index % len(self.dataset))


@dataclass(frozen=True)
class ClassificationProcessor:
    """Samples -> augmented images -> batches; replaces a VLM's Processor in the loader."""

    model: ViTConfig
    data: ClassifyDataConfig
    numbers: dict[str, int]  # index of each class

    def encode(self, item: tuple[Sample, int], *_budget: int) -> LabeledImage:
        """Augment an item of `EpochDataset`; raises `InputError` naming the row."""
        sample, index = item
        image = open_for_vit(sample.images[0], self.model, sample.row)
        rng = random.Random(f"{self.data.seed}/view/{index}")
        pixels = augment(image, self.model.vit_img_size, self.data, rng)
        return LabeledImage(pixels, self.numbers[label_of(sample)])

    def collate(self, images: Sequence[LabeledImage], seed: str) -> ClassificationBatch:
        cfg, rng = self.data, random.Random(f"{self.data.seed}/mix/{seed}")
        pixels = normalise([image.pixels for image in images], self.model)
        targets = torch.tensor([image.label for image in images])
        if cfg.mixup or cfg.cutmix or cfg.label_smoothing:
            soft = smooth_labels(targets, len(self.numbers), cfg.label_smoothing)
            pixels, targets = mixup_or_cutmix(pixels, soft, cfg, rng)
        n_tokens = len(images) * (self.model.vit_n_patches + self.model.vit_n_prefix)
        return ClassificationBatch(pixels, targets, n_tokens)


@dataclass
class ClassificationLoader(Loader):
    """Infinite batches: `ClassificationLoader(dataset, processor, loader_config(...))`."""

    dataset: ClassificationDataset
    processor: ClassificationProcessor

    def _chunks(self) -> Iterator[list[int]]:
        n = len(self.dataset)
        n_read = self.epoch * n + self.position
        for indices in super()._chunks():
            yield [n_read // n * n + i for i in indices]  # a chunk never crosses epochs
            n_read += len(indices)

    def _encoded(self) -> EncodedDataset:
        return EncodedDataset(EpochDataset(self.dataset), self.processor, self.cfg)

    def _collate(self, groups: list[list[LabeledImage]]) -> ClassificationBatch:
        seed = f"{self.epoch}/{self.position}"
        return self.processor.collate([image for group in groups for image in group], seed)

    def _skip(self, i: int, reason: str) -> None:
        super()._skip(i % len(self.dataset), reason)


def loader_config(cfg: ClassifyDataConfig) -> DataConfig:
    """The settings of the loader: one image per row, no packing."""
    return DataConfig(
        source=cfg.source, seed=cfg.seed, batch_size=cfg.batch_size, packing=False,
        workers=cfg.workers,
    )  # fmt: skip


def evaluation_batches(
    dataset: ClassificationDataset, cfg: ViTConfig, names: Sequence[str], batch_size: int = 128
) -> Iterator[tuple[ClassificationBatch, list[str]]]:
    """Batches over the dataset: (images without augmentation, maybe none; errors of the others)."""
    numbers = {name: i for i, name in enumerate(names)}
    for start in range(0, len(dataset), batch_size):
        pixels, labels, errors = [], [], []
        for i in range(start, min(start + batch_size, len(dataset))):
            sample = dataset[i]
            try:
                pixels.append(resize_square(open_for_vit(sample.images[0], cfg, sample.row), cfg))
                labels.append(numbers[label_of(sample)])
            except InputError as error:
                errors.append(str(error))
        empty = torch.zeros(0, cfg.vit_n_channels, cfg.vit_img_size, cfg.vit_img_size)
        images = normalise(pixels, cfg) if pixels else empty
        yield ClassificationBatch(images, torch.tensor(labels, dtype=torch.int64)), errors
