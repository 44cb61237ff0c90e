"""One low-precision copy of a tensor for several layers, where autocast would make one for each."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.ops.memory import autocast_dtype


def cast_once_reference(x: Tensor, n: int) -> tuple[Tensor, ...]:
    """x for n layers; under autocast each of them casts it, and keeps its copy for backward."""
    return (x,) * n


def cast_once(x: Tensor, n: int) -> tuple[Tensor, ...]:
    """`cast_once_reference`, where the n tensors share one copy in autocast's dtype.

    Saves 4 % of the peak memory of a bf16 training step of `222m`
    (docs/log/2026-12-01-operations.md). Gradients add in the dtype of x, as under autocast.
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
        for grad in grads[-2::-1]:  # the order in which autograd would add them
            total.add_(grad)
        return total, None, None
