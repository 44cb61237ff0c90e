"""Scaled dot-product attention as torch computes it fastest on each device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    gqa = q.shape[1] != k.shape[1]
    if q.device.type == "cpu" and torch.is_grad_enabled() and q.dtype == torch.bfloat16:
        # The backward of the CPU kernel is four times slower in bf16 than in fp32.
        with torch.autocast("cpu", enabled=False):
            out = F.scaled_dot_product_attention(
                q.float(), k.float(), v.float(), enable_gqa=gqa, **options
            )
        return out.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=gqa, **options)
