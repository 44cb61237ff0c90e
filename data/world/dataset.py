"""The built-in dataset: samples about scenes that are drawn on access."""

from __future__ import annotations

from dataclasses import dataclass

from configs import DataConfig
from data.types import Sample
from data.world.questions import train_sample

N_SCENES = {"train": 1_000_000, "val": 2_000, "test": 10_000}


@dataclass(frozen=True)
class WorldDataset:
    """Scenes with questions or a caption. A `Dataset`."""

    cfg: DataConfig
    split: str
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    fingerprint: str = "world"

    @property
    def n_first(self) -> int:
        return self.cfg.world_captions_first if self.split == "train" else 0

    @property
    def n_rows(self) -> int:
        return len(self)

    def __len__(self) -> int:
        return N_SCENES[self.split]

    def __getitem__(self, i: int) -> Sample:
        cfg, split = self.cfg, self.split
        captions = 1.0 if i < self.n_first else cfg.world_caption_fraction
        min_shapes = cfg.world_min_shapes if split == "train" else DataConfig.world_min_shapes
        return train_sample(cfg.seed, split, i, cfg.world_questions, captions, min_shapes)

    def row_number(self, i: int) -> int:
        return i + 1
