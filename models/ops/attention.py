"""Softmax attention under the one mask rule: causal and same segment.

Letters: B batch, T tokens, S slots, H heads, K key-value heads, C head width.
"""

from __future__ import annotations

from torch import Tensor

from models.ops import packed
from models.ops.packed import SegmentBounds, SegmentPlan, varlen_attention
from models.ops.sdpa import scaled_dot_product_attention


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    plan: SegmentPlan | SegmentBounds | None = None,
    visible: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Softmax attention of [B, H, T, C] queries over [B, K, S, C] keys and values -> [B, H, T, C].

    `plan` restricts it to each segment; `visible` [B, 1, T, S] says which cache slots a query sees
    and replaces `causal`. At most one of the two is given. Without either a lone query sees all.
    """
    if isinstance(plan, SegmentBounds):
        return varlen_attention(q, k, v, plan)
    if plan is not None:
        return packed.segment_attention(q, k, v, plan, dropout)
    if q.shape[2] == 1:
        # Heads that share keys go as queries of one: apart, a CPU in bf16 is five times as slow.
        own = q.unflatten(1, (k.shape[1], -1))[..., 0, :]  # [B, K, H / K, C]
        return scaled_dot_product_attention(
            own, k, v, attn_mask=visible, dropout_p=dropout
        ).view_as(q)
    is_causal = causal and visible is None
    return scaled_dot_product_attention(
        q, k, v, attn_mask=visible, dropout_p=dropout, is_causal=is_causal
    )
