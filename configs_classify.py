"""The blueprint of a classifier's run: the ViT of configs.py, pictures of one class each, training.

Not here: fields every run has (configs.py), what augmentation does (data/classification/transforms.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from config_tools import Checked, need, require_positive, require_rate, require_seed
from configs import LoopConfig, ViTConfig, require_freeze


@dataclass(frozen=True, kw_only=True)
class ClassesConfig(Checked):
    """Which pictures, and what is done to them in training."""

    source: str = "world"
    """world, a folder with one folder a class, .jsonl .csv .parquet, hf:owner/name, IDX files."""
    val: str = ""
    """Another source to validate on; empty: val_fraction of the first."""
    val_fraction: float = 0.1
    """Share of the rows kept for validation, chosen by a hash of picture and class."""
    label: str = "label"
    """Column that names a row's class."""
    fetch_images: bool = False
    """Download pictures that rows name by web address; otherwise such rows are refused."""
    limit: int = 0
    """Use so many training rows, as evenly over the classes as they allow; 0: all."""
    seed: int = 0
    """Seed of the order of the rows, of augmentation, of the world's scenes."""
    batch_size: int = 64
    """Pictures per batch and process."""
    workers: int = 0
    """Processes that open and augment pictures; 0: the training process does."""
    crop: float = 1.0
    """Random resized crop: smallest share of the area that is kept; 1: whole pictures."""
    stretch: float = 1.333
    """Random resized crop: largest ratio of width to height, and of height to width."""
    flip: float = 0.0
    """Share of pictures mirrored left to right."""
    randaugment: int = 0
    """RandAugment: operations on each picture."""
    magnitude: float = 9.0
    """RandAugment: their strength, at most 10."""
    erase: float = 0.0
    """Random erasing: share of pictures in which a rectangle becomes noise."""
    mixup: float = 0.0
    """Mixup: both parameters of the beta distribution of the share of two pictures; 0: none."""
    cutmix: float = 0.0
    """CutMix: the same, of the area; with mixup, one of the two is drawn for each batch."""
    label_smoothing: float = 0.0
    """Share of the target that is spread evenly over all classes."""

    def validate(self):
        require_positive(self, "batch_size")
        require_rate(self, "val_fraction label_smoothing")
        for name in ("limit", "workers", "randaugment", "mixup", "cutmix"):
            need(getattr(self, name) >= 0, self, name, "must not be negative")
        for name in ("flip", "erase"):
            need(0 <= getattr(self, name) <= 1, self, name, "must be between 0 and 1")
        need(0 < self.crop <= 1, self, "crop", "must be above 0 and at most 1")
        for name in ("mixup", "cutmix", "stretch"):
            need(getattr(self, name) < math.inf, self, name, "must be finite")
        require_seed(self)
        need(self.stretch >= 1, self, "stretch", "must be at least 1")
        need(0 <= self.magnitude <= 10, self, "magnitude", "must be between 0 and 10")


@dataclass(frozen=True, kw_only=True)
class FitConfig(LoopConfig):
    """How a classifier is trained."""

    out: str = "runs/classifier"
    """Run folder: configuration, log, curves, confusion matrix, checkpoints."""
    lr_trunk: float = 0.002
    """Peak learning rate of everything but the head (AdamW)."""
    lr_head: float = 0.002
    """Peak learning rate of the head (AdamW)."""
    freeze: tuple[Literal["trunk", "head"], ...] = ()
    """Parts that do not train; trunk: a linear probe."""

    def validate(self):
        for name in ("lr_trunk", "lr_head"):
            need(getattr(self, name) >= 0, self, name, "must not be negative")
        require_freeze(self, "trunk head")


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig(Checked):
    """A classifier's training run."""

    model: ViTConfig = field(default_factory=ViTConfig)
    data: ClassesConfig = field(default_factory=ClassesConfig)
    train: FitConfig = field(default_factory=FitConfig)

    def validate(self):
        fix = "must be 1 (grey) or 3 (colour): pictures have no others"
        need(self.model.vit_n_channels in (1, 3), self.model, "vit_n_channels", fix)


# fmt: off
# Dosovitskiy et al. 2020, table 1; Ti and S by Touvron et al. 2020.
SIZES = {"ti": (192, 3, 12), "s": (384, 6, 12), "b": (768, 12, 12), "l": (1024, 16, 24)}
PATCHES = (8, 16, 32)
# What DeiT (Touvron et al. 2020, table 9) trains them with, without repeated augmentation.
FROM_SCRATCH = ClassesConfig(
    batch_size=128, workers=4, crop=0.08, flip=0.5, randaugment=2, erase=0.25, mixup=0.8,
    cutmix=1.0, label_smoothing=0.1)


def paper_vit(width: int, n_heads: int, n_blocks: int, patch: int) -> ViTConfig:
    """A ViT of the paper, at 224 pixels."""
    return ViTConfig(
        vit_img_size=224, vit_patch_size=patch, vit_hidden_dim=width, vit_inter_dim=4 * width,
        vit_n_heads=n_heads, vit_n_blocks=n_blocks, vit_hidden_act="gelu", vit_cls_flag=True,
        vit_drop_path=0.1)


def paper_run(name: str, model: ViTConfig) -> ClassifyConfig:
    train = FitConfig(out=f"runs/{name}", optimizer="adamw", lr_trunk=5e-4, lr_head=5e-4,
                      weight_decay=0.05, beta2=0.999, warmup=5000, schedule="cosine",
                      steps=300_000, accumulate=4, eval_every=5000, save_every=5000)
    return ClassifyConfig(model=model, data=FROM_SCRATCH, train=train)


PRESETS: dict[str, ClassifyConfig] = {
    # 0.6 M parameters: trains on two CPU cores in minutes.
    "small": ClassifyConfig(
        model=ViTConfig(vit_cls_flag=True, vit_hidden_act="gelu", vit_n_blocks=4),
        data=ClassesConfig(crop=0.6),
        train=FitConfig(steps=1000, lr_muon=0.015, warmup=100, eval_every=200)),
} | {
    f"{size}{patch}": paper_run(f"{size}{patch}", paper_vit(*shape, patch))
    for size, shape in SIZES.items() for patch in PATCHES
}
