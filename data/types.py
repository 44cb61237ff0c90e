"""The three shapes a training example takes: Sample, Tokens, Batch.

A Sample is what a person means, Tokens are encoded, a Batch is what the model eats.
Not here: how one becomes the next (processor.py, packing.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch

IGNORE = -100  # a target that carries no loss, as in F.cross_entropy


class Turn(NamedTuple):
    """One message. `text` holds a literal `<image>` where a picture stands."""

    role: str  # user | assistant | system
    text: str


@dataclass(frozen=True)
class Sample:
    """A conversation about pictures; the turns hold one `<image>` per image, in the same order."""

    turns: tuple[Turn, ...]
    images: tuple[Any, ...] = ()  # paths, bytes of files, or PIL images; opened when encoded
    row: str = ""  # where it came from, for messages: "train.jsonl row 17"


@dataclass(frozen=True)
class Tokens:
    """An encoded sample. `supervised[t]` says whether `ids[t]` is something the model must say."""

    ids: np.ndarray  # [T] int32
    supervised: np.ndarray  # [T] bool
    tiles: np.ndarray  # [N, H, W, 3] uint8, in reading order of the placeholders
    row: str = ""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class Batch:
    """What the model eats. R rows of T tokens; N tiles in reading order over all rows.

    Targets are already shifted: `targets[r, t]` is what should follow `input_ids[r, t]`, or -100.
    Positions restart with every packed sample. Segment 0 is padding, at the end of a row only.
    """

    input_ids: torch.Tensor  # [R, T] int64
    targets: torch.Tensor  # [R, T] int64
    positions: torch.Tensor  # [R, T] int64
    segments: (
        torch.Tensor | None
    )  # [R, T] int64; None: one sample a row, so causal attention alone is right
    images: torch.Tensor  # [N, 3, H, W] float32, normalised
    n_targets: int = 0
    n_samples: int = 0
    n_tokens: int = 0  # without padding
    state: dict = field(default_factory=dict)  # the loader's, after this batch

    def tensors(self) -> dict[str, torch.Tensor | None]:
        """The arguments of `VisionLanguageModel.forward`."""
        return {
            "input_ids": self.input_ids,
            "targets": self.targets,
            "positions": self.positions,
            "segments": self.segments,
            "images": self.images,
        }

    def to(self, device: torch.device | str) -> Batch:
        """A copy for a model there; the host does not wait for it.

        Ids, targets and segments stay: the model looks at them on the host, to know what goes where
        without asking the device, and sends what its kernels need.
        """
        positions, images = (copied(x, device) for x in (self.positions, self.images))
        return replace(self, positions=positions, images=images)


def copied(x: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """x on a device; only memory that is pinned is copied while the host goes on."""
    pinned = torch.device(device).type == "cuda"
    return (x.pin_memory() if pinned else x).to(device, non_blocking=True)
