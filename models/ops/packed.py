"""Attention over packed rows: several samples in one row never see each other.

Letters: B batch, T tokens, S slots, H heads, C head width, G segments of a group, L its length.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from configs import LMConfig
from models.ops.memory import autocast_dtype, to_device_async
from models.ops.sdpa import scaled_dot_product_attention


@dataclass
class Group:
    """Segments of similar length, side by side; each token of a batch has one slot of one group."""

    n_segments: int  # G
    length: int  # L


@dataclass
class SegmentPlan:
    """How to visit the segments of a batch: gather into groups, attend causally, gather back."""

    groups: list[Group]
    sources: Tensor  # [S] token of every slot, S = sum of G * L over the groups
    real: Tensor  # [S, 1, 1] 1 where the slot is its token's own, 0 past the end of a segment
    slots: Tensor  # [B * T] where each token stands among all groups' slots


@dataclass
class SegmentBounds:
    """All that a kernel needs which takes segments of any length side by side."""

    bounds: Tensor  # [segments + 1] int32, where each starts among the B * T tokens, and B * T
    longest: int
    kernel: Callable[..., Tensor]


def find_segments(segments: Tensor) -> tuple[Tensor, Tensor]:
    """Starts and lengths of the runs of equal id in [B, T], among its B * T tokens; on the CPU.

    Padding runs (id 0) are segments like any other: what they compute is never looked at.
    """
    n_rows, n_tokens = segments.shape
    flat = segments.cpu().reshape(-1)  # [B * T]
    starts_here = torch.ones_like(flat, dtype=torch.bool)
    starts_here[1:] = flat[1:] != flat[:-1]
    starts_here[::n_tokens] = True
    starts = starts_here.nonzero()[:, 0]
    return starts, torch.diff(starts, append=torch.tensor([n_rows * n_tokens]))


def bound_segments(segments: Tensor, device: torch.device) -> SegmentBounds:
    starts, lengths = find_segments(segments)
    bounds = F.pad(starts, (0, 1), value=segments.numel()).int()
    return SegmentBounds(to_device_async(bounds, device), int(lengths.max()), varlen_kernel())


def plan_segments(segments: Tensor, device: torch.device) -> SegmentPlan:
    """Group the segments of [B, T] by length, for kernels on `device`.

    A segment at least half as long as the group's longest joins it.
    """
    starts, lengths = find_segments(segments)
    order = torch.argsort(lengths, descending=True, stable=True)
    groups, sources, reals, n_slots, first = [], [], [], 0, 0
    slots = torch.empty(segments.numel(), dtype=torch.long)
    while first < len(order):
        longest = int(lengths[order[first]])
        inside = int((lengths[order[first:]] * 2 >= longest).sum())
        chosen = order[first : first + inside]
        steps = torch.arange(longest)[None, :]  # [1, L]
        source = starts[chosen, None] + torch.minimum(steps, lengths[chosen, None] - 1)  # [G, L]
        real = steps < lengths[chosen, None]
        slots[source[real]] = n_slots + real.reshape(-1).nonzero()[:, 0]
        groups.append(Group(inside, longest))
        sources.append(source.reshape(-1))
        reals.append(real.reshape(-1, 1, 1))
        n_slots += source.numel()
        first += inside
    tensors = (torch.cat(sources), torch.cat(reals), slots)
    return SegmentPlan(groups, *(to_device_async(x, device) for x in tensors))


def supports_varlen(cfg: LMConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's kernel for segments of any length computes this: FlashAttention 2 decides.

    It has no fp32, no dropout as torch calls it, and heads of 8 to 256 channels, by eights.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or cfg.lm_dropout:
        return False
    if cfg.lm_head_width % 8 or cfg.lm_head_width > 256:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def varlen_kernel() -> Callable[..., Tensor]:
    """`varlen_attn`, told of grouped queries where it asks: torch 2.11's takes them as they are."""
    from torch.nn.attention.varlen import varlen_attn  # imports torch.compile's half of torch

    asks = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return partial(varlen_attn, enable_gqa=True) if asks else varlen_attn


def plan_packing(cfg: LMConfig, segments: Tensor, like: Tensor) -> SegmentPlan | SegmentBounds:
    """What `attend` needs to keep segments [B, T] apart in blocks that start from `like`.

    A GPU waits for nothing where `segments` are on the CPU.
    """
    is_bounded = supports_varlen(cfg, like.device, autocast_dtype(like))
    return (bound_segments if is_bounded else plan_segments)(segments, like.device)


class _Take(torch.autograd.Function):
    """`x[index]` whose gradient is `grad[inverse] * weight`.

    A gather both ways, where autograd's scatter-add is slow on CPU. Right for tokens -> slots and
    slots -> tokens, as each token has one real slot, and a slot that is not real neither is seen by
    a real query nor contributes to the output.
    """

    @staticmethod
    def forward(ctx, x, index, inverse, weight):
        ctx.inverse, ctx.weight = inverse, weight
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.index_select(0, ctx.inverse)
        return grad if ctx.weight is None else grad * ctx.weight, None, None, None


def segment_attention(q: Tensor, k: Tensor, v: Tensor, plan: SegmentPlan, dropout: float) -> Tensor:
    B, H, T, C = q.shape
    sizes = [group.n_segments * group.length for group in plan.groups]
    spread = []
    for x in (q, k, v):
        x = x.transpose(1, 2).reshape(B * T, -1, C)  # [B*T, H, C], no copy after a projection
        spread.append(_Take.apply(x, plan.sources, plan.slots, None).split(sizes))  # [G*L, H, C]
    outputs = []
    for group, *parts in zip(plan.groups, *spread, strict=True):
        qkv = (x.unflatten(0, (group.n_segments, -1)).transpose(1, 2) for x in parts)
        out = scaled_dot_product_attention(*qkv, dropout_p=dropout, is_causal=True)  # [G, H, L, C]
        outputs.append(out.transpose(1, 2).reshape(-1, H, C))  # [G*L, H, C]
    out = _Take.apply(torch.cat(outputs), plan.slots, plan.sources, plan.real)  # [B*T, H, C]
    return out.view(B, T, H, C).transpose(1, 2)  # [B, H, T, C]


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, plan: SegmentBounds) -> Tensor:
    B, H, T, C = q.shape
    flat = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # [B*T, H, C]
    bounds, longest = (plan.bounds, plan.bounds), (plan.longest, plan.longest)  # of q, of k
    causal = (-1, 0)  # everything before, nothing behind
    out = plan.kernel(*flat, *bounds, *longest, window_size=causal)
    return out.view(B, T, H, C).transpose(1, 2)  # [B, H, T, C]
