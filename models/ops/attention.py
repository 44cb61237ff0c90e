"""Softmax attention (Vaswani et al. 2017) with grouped queries, on every device.

Letters: B batch, T tokens, S slots, H query heads, K key-value heads, C head width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """softmax(q k^T / sqrt(C)) v, over the slots that `mask` allows for each query."""
    T, S = q.shape[2], k.shape[2]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))  # [B, H, S, C]
    scores = q.float() @ k.float().transpose(2, 3) / math.sqrt(q.shape[3])  # [B, H, T, S]
    if causal and T > 1:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril()  # [T, S]
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return (scores.softmax(-1) @ v.float()).to(v.dtype)  # [B, H, T, C]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """Queries [B, H, T, C] over keys and values [B, K, S, C] -> [B, H, T, C].

    `mask` [B, 1, T, S] is True where a query attends to a slot. With `causal`, query t attends to
    slots 0..t, but a single query attends to every slot.
    """
    is_grouped = q.shape[1] != k.shape[1]
    if q.shape[2] == 1:
        causal = False
        if is_grouped:
            # Treat heads that share a key-value head as queries of one head: for one token the
            # bf16 CPU kernel for grouped heads is five times slower.
            grouped = q.unflatten(1, (k.shape[1], -1))[..., 0, :]  # [B, K, H / K, C]
            return attention(grouped, k, v, mask, False, dropout).view_as(q)
    options = dict(attn_mask=mask, dropout_p=dropout, is_causal=causal, enable_gqa=is_grouped)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled():
        # The CPU kernel's backward is four times slower in bf16 than in fp32: a bf16 training step
        # of `tiny` would take twice as long (docs/log/2026-12-01-operations.md).
        with torch.autocast("cpu", enabled=False):
            out = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **options)
        return out.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, **options)
