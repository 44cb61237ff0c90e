"""Memory: activation checkpointing within a budget, casts and copies made once."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


@cache
def memory_budget(device: torch.device) -> float:
    """Bytes that may be kept for a backward pass; infinite where the system does not tell.

    An eighth of the machine's memory; half of a GPU's, which nobody else needs.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 2
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 8
    except (AttributeError, ValueError, OSError):  # not POSIX
        return math.inf


def autocast_dtype(like: Tensor) -> torch.dtype:
    """The dtype in which matrices meet `like`: autocast's where that is on."""
    kind = like.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype


def run_blocks(
    blocks: Sequence[Callable[[Tensor], Tensor]],
    x: Tensor,
    inter_dim: int,
    training: bool,
    checkpointing: bool = False,
) -> Tensor:
    """x [..., D] through every block.

    What the backward pass needs is computed again then (Chen et al. 2016) with `checkpointing`, and
    where keeping it would take more room than there is: about 8 tensors as wide as x and 4 as wide
    as the MLP, of every block. Results are the same, dropout too; a step takes a third longer.
    """
    n_values = len(blocks) * x[..., 0].numel() * (8 * x.shape[-1] + 4 * inter_dim)
    learns = training and torch.is_grad_enabled()
    again = learns and (
        checkpointing or n_values * autocast_dtype(x).itemsize > memory_budget(x.device)
    )
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False) if again else block(x)
    return x


def to_device_async(x: Tensor, device: torch.device) -> Tensor:
    """x on `device`; a copy to a GPU stands in line there, and the host goes on at once."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


class _CastOnce(torch.autograd.Function):
    """Each reader's gradient is added in the dtype of x, as if each had narrowed it for itself."""

    @staticmethod
    def forward(ctx, x, n, dtype):
        ctx.dtype, narrow = x.dtype, x.to(dtype)
        return tuple(narrow.detach() for _ in range(n))

    @staticmethod
    def backward(ctx, *grads):
        total = grads[-1].to(ctx.dtype)
        for grad in grads[-2::-1]:  # the order in which autograd would add them
            total.add_(grad)
        return total, None, None


def cast_once(x: Tensor, n: int) -> tuple[Tensor, ...]:
    """x for `n` layers to multiply: in the dtype of autocast once, which makes each a copy."""
    dtype = autocast_dtype(x)
    if dtype == x.dtype or not torch.is_grad_enabled():
        return (x.to(dtype),) * n
    return _CastOnce.apply(x, n, dtype)
