"""Types of the data pipeline: Sample -> Tokens -> Batch, and the protocols Rows and Dataset.

Rows are dictionaries, as in a file; a Dataset has one Sample per usable row.
Not here: the conversions (sources/, processor.py, batches/packing.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from config_tools import InputError

IGNORE_INDEX = -100  # target without loss; the default of F.cross_entropy


class Turn(NamedTuple):
    """One message. A literal `<image>` in `text` marks where an image is inserted."""

    role: str  # user | assistant | system
    text: str


@dataclass(frozen=True)
class Sample:
    """A conversation about images; its turns contain one `<image>` per image, in the same order."""

    turns: tuple[Turn, ...]
    images: tuple[Any, ...] = ()  # paths, bytes of files, or PIL images; opened when encoded
    row: str = ""  # its row, for messages: "train.jsonl row 17"


class Rows(Protocol):
    """The unparsed rows of a file, a folder or a table, read on access.

    `rows[k]` raises `InputError` if row k cannot be read; `scan` yields that error in its place.
    """

    @property
    def folder(self) -> Path:
        """The folder that image paths are relative to."""

    def __len__(self) -> int: ...

    def __getitem__(self, k: int) -> dict: ...

    def where(self, k: int) -> str:
        """The name of row k in messages, such as "train.jsonl row 17"."""

    def scan(self) -> Iterator[dict | InputError]:
        """All rows in order; the bytes of images may be replaced by a short hash."""


class Dataset(Protocol):
    """Samples by index. Training reads each once per epoch, in shuffled order."""

    @property
    def fingerprint(self) -> str:
        """Identifies the samples and their order; a resumed run must find the same one."""

    @property
    def skipped(self) -> tuple[str, ...]:
        """Why rows were skipped when the dataset was opened; each reason names its row."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines to print before training."""

    @property
    def n_rows(self) -> int:
        """Number of rows read, including skipped ones and those of other splits."""

    @property
    def n_first(self) -> int:
        """Number of leading samples that come first in the first epoch (a curriculum)."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Sample: ...

    def row_number(self, i: int) -> int:
        """The row number of sample i in its source, counted from 1 over all splits."""


@dataclass(frozen=True)
class Tokens:
    """An encoded sample. `supervised[t]`: whether `ids[t]` is a target of the loss."""

    ids: np.ndarray  # [T] int32
    supervised: np.ndarray  # [T] bool
    tiles: np.ndarray  # [N, H, W, 3] uint8, in reading order of the placeholders
    row: str = ""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class Batch:
    """The input of the model: R rows of T tokens, N tiles in reading order over all rows.

    Targets are shifted: `targets[r, t]` is the token after `input_ids[r, t]`, or IGNORE_INDEX.
    Positions restart with every packed sample. Segment 0 is padding, at the end of a row only.
    """

    input_ids: torch.Tensor  # [R, T] int64
    targets: torch.Tensor  # [R, T] int64
    positions: torch.Tensor  # [R, T] int64
    segments: torch.Tensor | None  # [R, T] int64; None: one sample per row, a causal mask suffices
    images: torch.Tensor  # [N, 3, H, W] float32, normalised
    n_targets: int = 0
    n_samples: int = 0
    n_tokens: int = 0  # without padding
    state: dict = field(default_factory=dict)  # state of the loader after this batch

    def tensors(self) -> dict[str, torch.Tensor | None]:
        """The arguments of `VisionLanguageModel.forward`."""
        names = "input_ids", "targets", "positions", "segments", "images"
        return {name: getattr(self, name) for name in names}

    def to(self, device: torch.device | str) -> Batch:
        """A copy with positions and images on `device`, transferred asynchronously.

        Ids, targets and segments stay on the host: the model computes indices from them there and
        copies what its kernels need, so the host never waits for the device.
        """
        positions, images = (copy_to(x, device) for x in (self.positions, self.images))
        return replace(self, positions=positions, images=images)


def copy_to(x: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """x on `device`, copied asynchronously to CUDA, which needs pinned memory."""
    pinned = x.pin_memory() if torch.device(device).type == "cuda" else x
    return pinned.to(device, non_blocking=True)
