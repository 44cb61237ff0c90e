"""Activation checkpointing, chunks of tiles, asynchronous copies and autocast's dtype."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Maximum patches per call of the vision encoder. On a CPU more patches use more memory and are no
# faster. On a GPU larger calls amortise the cost of launching kernels.
MAX_PATCHES = {"cpu": 1 << 13, "cuda": 1 << 17}


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, *args, checkpointing: bool) -> Tensor:
    """Apply every block to x [..., D].

    With `checkpointing`, a block stores only its input and is recomputed in backward (Chen et al.
    2016). Results are the same, also with dropout; a step takes about a third longer.
    """
    for block in blocks:
        x = checkpoint(block, x, *args, use_reentrant=False) if checkpointing else block(x, *args)
    return x


def split_tiles(images: Tensor, n_patches: int) -> Sequence[Tensor]:
    """Tiles [N, ...] of `n_patches` each -> chunks of equal size, at most MAX_PATCHES patches."""
    max_patches = MAX_PATCHES.get(images.device.type, MAX_PATCHES["cpu"])
    return images.tensor_split(max(1, math.ceil(len(images) * n_patches / max_patches)))


def to_device_async(x: Tensor, device: torch.device) -> Tensor:
    """x on `device`; the host does not wait for a copy to a GPU."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a matrix product with x: autocast's if it is on, else that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
