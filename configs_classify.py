"""Configs of image classifiers, their data and training, and the presets.

Not here: ViTConfig and shared training settings (configs.py), the augmentation itself
(data/classification/transforms.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from config_tools import Validated, check, require_positive, require_rate, require_seed
from configs import LoopConfig, ViTConfig, require_freeze


@dataclass(frozen=True, kw_only=True)
class ClassifyDataConfig(Validated):
    """Labelled images and their augmentation."""

    source: str = "world"
    """world, a folder of class folders, a .jsonl .csv .parquet file, hf:owner/name or IDX files."""
    val: str = ""
    """Source of the validation images; empty: val_fraction of the training source."""
    val_fraction: float = 0.1
    """Fraction of rows held out for validation, chosen by a hash of image and class."""
    label: str = "label"
    """Name of the column with the class."""
    fetch_images: bool = False
    """Download images given as URLs; without it, rows with URLs are unusable."""
    limit: int = 0
    """Maximum number of training rows, balanced over classes; 0: all."""
    seed: int = 0
    """Seed of the order of rows, of augmentation and of the built-in scenes."""
    batch_size: int = 64
    """Images per batch and process."""
    workers: int = 0
    """Worker processes that load and augment images; 0: the training process does."""
    crop_min_scale: float = 1.0
    """Random resized crop: minimum fraction of the area; 1: no cropping."""
    crop_max_ratio: float = 1.333
    """Random resized crop: maximum ratio of the longer to the shorter side."""
    horizontal_flip: float = 0.0
    """Probability of a horizontal flip."""
    randaugment: int = 0
    """RandAugment: number of operations per image; 0: none."""
    randaugment_magnitude: float = 9.0
    """RandAugment: strength of the operations, from 0 to 10."""
    random_erasing: float = 0.0
    """Random erasing: probability of replacing a rectangle of the image with noise."""
    mixup: float = 0.0
    """Mixup: alpha of the beta distribution; 0: none."""
    cutmix: float = 0.0
    """CutMix: alpha of the beta distribution; 0: none. With mixup, each batch uses one of both."""
    label_smoothing: float = 0.0
    """Label smoothing: fraction of the target that is spread over all classes."""

    def validate(self):
        require_positive(self, "batch_size")
        require_rate(self, "val_fraction label_smoothing")
        for name in ("limit", "workers", "randaugment", "mixup", "cutmix"):
            check(getattr(self, name) >= 0, self, name, "must not be negative")
        for name in ("horizontal_flip", "random_erasing"):
            check(0 <= getattr(self, name) <= 1, self, name, "must be between 0 and 1")
        check(0 < self.crop_min_scale <= 1, self, "crop_min_scale", "must be above 0 and at most 1")
        require_seed(self)
        check(self.crop_max_ratio >= 1, self, "crop_max_ratio", "must be at least 1")
        fix = "must be between 0 and 10"
        check(0 <= self.randaugment_magnitude <= 10, self, "randaugment_magnitude", fix)


@dataclass(frozen=True, kw_only=True)
class ClassifyTrainConfig(LoopConfig):
    """Training settings of a classifier."""

    out: str = "runs/classifier"
    """Run folder: config, log, curves, confusion matrix, checkpoints."""
    lr_trunk: float = 0.002
    """Peak learning rate of the trunk, which is the model without its head (AdamW)."""
    lr_head: float = 0.002
    """Peak learning rate of the head (AdamW)."""
    freeze: tuple[Literal["trunk", "head"], ...] = ()
    """Parts that are not trained; trunk: linear probing."""

    def validate(self):
        for name in ("lr_trunk", "lr_head"):
            check(getattr(self, name) >= 0, self, name, "must not be negative")
        require_freeze(self, "trunk head")


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig(Validated):
    """A training run of a classifier: model, data, training."""

    model: ViTConfig = field(default_factory=ViTConfig)
    data: ClassifyDataConfig = field(default_factory=ClassifyDataConfig)
    train: ClassifyTrainConfig = field(default_factory=ClassifyTrainConfig)

    def validate(self):
        fix = "must be 1 (grayscale) or 3 (RGB)"
        check(self.model.vit_n_channels in (1, 3), self.model, "vit_n_channels", fix)


# fmt: off
# Dosovitskiy et al. 2020, table 1; Ti and S by Touvron et al. 2020.
SIZES = {"ti": (192, 3, 12), "s": (384, 6, 12), "b": (768, 12, 12), "l": (1024, 16, 24)}
PATCHES = (8, 16, 32)
# The augmentation of DeiT (Touvron et al. 2020, table 9), without repeated augmentation.
FROM_SCRATCH = ClassifyDataConfig(
    batch_size=128, workers=4, crop_min_scale=0.08, horizontal_flip=0.5, randaugment=2,
    random_erasing=0.25, mixup=0.8, cutmix=1.0, label_smoothing=0.1)


def paper_vit(width: int, n_heads: int, n_blocks: int, patch: int) -> ViTConfig:
    """A ViT in one of the paper's sizes, for images of 224 pixels."""
    return ViTConfig(
        vit_img_size=224, vit_patch_size=patch, vit_hidden_dim=width, vit_inter_dim=4 * width,
        vit_n_heads=n_heads, vit_n_blocks=n_blocks, vit_hidden_act="gelu", vit_cls_flag=True,
        vit_drop_path=0.1)


def paper_run(name: str, model: ViTConfig) -> ClassifyConfig:
    """A preset that trains `model` from scratch on ImageNet-like data."""
    train = ClassifyTrainConfig(out=f"runs/{name}", optimizer="adamw", lr_trunk=5e-4, lr_head=5e-4,
                      weight_decay=0.05, beta2=0.999, warmup=5000, schedule="cosine",
                      steps=300_000, accumulate=4, eval_every=5000, save_every=5000)
    return ClassifyConfig(model=model, data=FROM_SCRATCH, train=train)


PRESETS: dict[str, ClassifyConfig] = {
    # 0.6 M parameters: trains on two CPU cores in minutes.
    "small": ClassifyConfig(
        model=ViTConfig(vit_cls_flag=True, vit_hidden_act="gelu", vit_n_blocks=4),
        data=ClassifyDataConfig(crop_min_scale=0.6),
        train=ClassifyTrainConfig(steps=1000, lr_muon=0.015, warmup=100, eval_every=200)),
} | {
    f"{size}{patch}": paper_run(f"{size}{patch}", paper_vit(*shape, patch))
    for size, shape in SIZES.items() for patch in PATCHES
}
