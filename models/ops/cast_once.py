"""One low-precision copy of a tensor for several layers; autocast alone makes one per layer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.ops.memory import autocast_dtype


def cast_once_reference(x: Tensor, n: int) -> tuple[Tensor, ...]:
    """x for n layers; under autocast each layer casts it and keeps its own copy for backward."""
    return (x,) * n


def cast_once(x: Tensor, n: int) -> tuple[Tensor, ...]:
    """`cast_once_reference` whose n tensors share one copy in autocast's dtype.

    Saves 4 % of the peak memory of a bf16 training step of `222m`
    (docs/log/2026-12-01-operations.md). Gradients are summed in the dtype of x, as under autocast.
    """
    dtype = autocast_dtype(x)
    if dtype == x.dtype or not torch.is_grad_enabled():
        return (x.to(dtype),) * n
    return _CastOnce.apply(x, n, dtype)


class _CastOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, n, dtype):
        ctx.dtype, copy = x.dtype, x.to(dtype)
        return tuple(copy.detach() for _ in range(n))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        total = grads[-1].to(ctx.dtype)
        for grad in grads[-2::-1]:  # in autograd's order
            total.add_(grad)
        return total, None, None
