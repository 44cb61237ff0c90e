"""Attention over packed rows: several samples share a row and never attend to each other.

Letters: B batch, T tokens, S slots, H heads, C head width, G segments of a group, L its length.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from configs import LMConfig
from models.ops.attention import attention, attention_reference
from models.ops.memory import autocast_dtype, to_device_async


@dataclass
class SegmentGroups:
    """Segments batched by similar length: gather into groups, attend, gather back."""

    shapes: list[tuple[int, int]]  # (G, L) of each group
    sources: Tensor  # [S] token of every slot, S = sum of G * L over the groups
    slots: Tensor  # [B * T] the slot of every token


@dataclass
class SegmentBounds:
    """Arguments of a variable-length kernel, which computes all segments in one call."""

    bounds: Tensor  # [segments + 1] int32: start of each in the flattened B * T tokens, then B * T
    longest: int
    kernel: Callable[..., Any]


Packing = SegmentGroups | SegmentBounds


def packed_attention_reference(q: Tensor, k: Tensor, v: Tensor, segments: Tensor) -> Tensor:
    """A query attends to keys of its own segment up to its own position."""
    T = segments.shape[1]
    same = segments[:, :, None] == segments[:, None, :]  # [B, T, T]
    causal = torch.ones(T, T, dtype=torch.bool, device=segments.device).tril()
    return attention_reference(q, k, v, (same & causal)[:, None])


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, dropout: float = 0.0
) -> Tensor:
    """`packed_attention_reference` whose cost grows with segment lengths, not with T squared.

    [B, H, T, C] queries over [B, K, T, C] keys and values -> [B, H, T, C].
    """
    if isinstance(packing, SegmentBounds):
        return _varlen_attention(q, k, v, packing)
    return _grouped_attention(q, k, v, packing, dropout)


def build_packing(cfg: LMConfig, segments: Tensor, x: Tensor) -> Packing:
    """Prepare segments [B, T] for `packed_attention`.

    Device and dtype of the hidden states x select one of the two kinds. A run of equal ids is a
    segment. Padding (id 0) is a segment whose output is not used. Keep `segments` on the CPU to
    avoid a GPU synchronisation.
    """
    varlen = supports_varlen(cfg, x.device, autocast_dtype(x))
    return (find_bounds if varlen else group_segments)(segments, x.device)


def find_segments(segments: Tensor) -> tuple[Tensor, Tensor]:
    """Start and length of every run of equal ids in [B, T], on the CPU."""
    n_rows, n_tokens = segments.shape
    flat = segments.cpu().reshape(-1)  # [B * T]
    is_start = torch.ones_like(flat, dtype=torch.bool)
    is_start[1:] = flat[1:] != flat[:-1]
    is_start[::n_tokens] = True
    starts = is_start.nonzero()[:, 0]
    return starts, torch.diff(starts, append=torch.tensor([n_rows * n_tokens]))


# --- Groups: standard attention, on every device ------------------------------------------------


def group_segments(segments: Tensor, device: torch.device) -> SegmentGroups:
    """Group the segments of [B, T]; each has at least half the length of its group's longest."""
    starts, lengths = find_segments(segments)
    order = torch.argsort(lengths, descending=True, stable=True)
    shapes, sources, n_slots, first = [], [], 0, 0
    slots = torch.empty(segments.numel(), dtype=torch.long)
    while first < len(order):
        longest = int(lengths[order[first]])
        n_segments = int((lengths[order[first:]] * 2 >= longest).sum())
        chosen = order[first : first + n_segments]
        steps = torch.arange(longest)[None, :]  # [1, L]
        # Slots past a segment's end repeat its last token; causal attention hides them.
        source = starts[chosen, None] + torch.minimum(steps, lengths[chosen, None] - 1)  # [G, L]
        is_token = steps < lengths[chosen, None]  # [G, L]
        slots[source[is_token]] = n_slots + is_token.reshape(-1).nonzero()[:, 0]
        shapes.append((n_segments, longest))
        sources.append(source.reshape(-1))
        n_slots += source.numel()
        first += n_segments
    tensors = (torch.cat(sources), slots)
    return SegmentGroups(shapes, *(to_device_async(x, device) for x in tensors))


# Not compiled, because the number and lengths of segments differ in every batch. Unlike
# `torch.compiler.disable`, this decorator imports the compiler at the first call, not at import.
@torch._disable_dynamo
def _grouped_attention(
    q: Tensor, k: Tensor, v: Tensor, groups: SegmentGroups, dropout: float
) -> Tensor:
    B, H, T, C = q.shape
    sizes = [n_segments * length for n_segments, length in groups.shapes]
    gathered = (
        x.transpose(1, 2).reshape(B * T, -1, C).index_select(0, groups.sources).split(sizes)
        for x in (q, k, v)
    )  # q, k, v as one [G * L, H, C] for each group
    outputs = []
    for (n_segments, _), *parts in zip(groups.shapes, *gathered, strict=True):
        qkv = (x.unflatten(0, (n_segments, -1)).transpose(1, 2) for x in parts)  # [G, H, L, C]
        out = attention(*qkv, causal=True, dropout=dropout)  # [G, H, L, C]
        outputs.append(out.transpose(1, 2).reshape(-1, H, C))  # [G * L, H, C]
    out = torch.cat(outputs).index_select(0, groups.slots)  # [B * T, H, C]
    return out.view(B, T, H, C).transpose(1, 2)  # [B, H, T, C]


# --- Bounds: FlashAttention's variable-length kernel, on a GPU ----------------------------------


def supports_varlen(cfg: LMConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's variable-length kernel (FlashAttention 2) supports this case.

    It supports fp16 and bf16, no dropout, and head widths up to 256 that are multiples of 8.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or cfg.lm_dropout:
        return False
    if cfg.lm_head_width % 8 or cfg.lm_head_width > 256:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def varlen_kernel() -> Callable[..., Any]:
    """torch's `varlen_attn`; versions after 2.11 need `enable_gqa` for grouped queries."""
    from torch.nn.attention.varlen import varlen_attn  # slow: imports much of torch.compile

    has_gqa = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return partial(varlen_attn, enable_gqa=True) if has_gqa else varlen_attn


def find_bounds(segments: Tensor, device: torch.device) -> SegmentBounds:
    starts, lengths = find_segments(segments)
    bounds = F.pad(starts, (0, 1), value=segments.numel()).int()
    return SegmentBounds(to_device_async(bounds, device), int(lengths.max()), varlen_kernel())


def _varlen_attention(q: Tensor, k: Tensor, v: Tensor, segments: SegmentBounds) -> Tensor:
    B, H, T, C = q.shape
    qkv = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # [B * T, H, C]
    bounds, longest = (segments.bounds,) * 2, (segments.longest,) * 2  # of queries, of keys
    causal = (-1, 0)  # window: everything before, nothing after
    out = segments.kernel(*qkv, *bounds, *longest, window_size=causal)
    return out.view(B, T, H, C).transpose(1, 2)  # [B, H, T, C]
