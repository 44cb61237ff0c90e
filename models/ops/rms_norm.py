"""RMSNorm (Zhang and Sennrich 2019), rounded as in transformers' LlamaRMSNorm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Statistics in fp32, cast back to the dtype of x, then scale: [..., D] -> [..., D]."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm_reference` with a hand-written backward, which passes over memory less often.

    Autograd passes over x a dozen times. This backward saves 4 to 7 % of a training step of `tiny`
    (docs/log/2026-12-01-operations.md). Second derivatives are not supported.
    """
    if torch.is_grad_enabled():
        return _RMSNorm.apply(x, weight, eps)
    if x.dtype == torch.float32:  # in bf16 F.rms_norm rounds once, after the scale
        return F.rms_norm(x, weight.shape, weight, eps)
    return rms_norm_reference(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = x.float()
        factor = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()  # [..., 1]
        ctx.save_for_backward(x, weight, factor)
        return weight * (wide * factor).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, factor = ctx.saved_tensors
        wide, scale = x.float(), weight.float()
        product = (grad * wide).flatten(0, -2)  # [N, D]
        # Under torch.compile the backward inherits the forward's autocast, which would round these
        # sums to bf16. Use `mv`, not `@`: the compiler fuses only `mv` into its loop.
        with torch.autocast(x.device.type, enabled=False):
            row_sums = product.mv(scale)  # [N]
            grad_weight = product.t().mv(factor.flatten())  # [D]
        row_sums = row_sums.view_as(factor) * factor**3 / x.shape[-1]  # [..., 1]
        grad_x = (grad * scale).mul_(factor).addcmul_(wide, row_sums, value=-1)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None
