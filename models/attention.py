"""One attention for everybody: the mask rule, rotary positions, the key-value cache, memory.

The mask rule is *causal and same segment* in the language model, *everything* in the vision one.
Not here: projections and heads (see the models), nor attention maps for people to look at.

Letters: B batch, T tokens, S slots, H heads, K key-value heads, C head width, G segments of a
group, L its length.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from configs import LMConfig

# --- Memory -------------------------------------------------------------------------------------


@cache
def room(device: torch.device) -> float:
    """Bytes that may be kept for a backward pass; infinite where the system does not tell.

    An eighth of the machine's memory; half of a GPU's, which nobody else needs.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 2
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 8
    except (AttributeError, ValueError, OSError):  # not POSIX
        return math.inf


def computes_in(like: Tensor) -> torch.dtype:
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
    again = learns and (checkpointing or n_values * computes_in(x).itemsize > room(x.device))
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False) if again else block(x)
    return x


def send(x: Tensor, device: torch.device) -> Tensor:
    """x on `device`; a copy to a GPU stands in line there, and the host goes on at once."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


# --- Rotary positions ---------------------------------------------------------------------------


def rope_frequencies(cfg: LMConfig, device: torch.device | None = None) -> Tensor:
    """Angle per position of each pair of channels, [C/2] fp32 (Su et al. 2021).

    `llama3` stretches long wavelengths by the factor, leaves short ones, and blends in between
    (transformers' `_compute_llama3_parameters`); `linear` stretches all.
    """
    exponent = (
        torch.arange(0, cfg.lm_head_width, 2, dtype=torch.float32, device=device)
        / cfg.lm_head_width
    )
    freq = 1.0 / cfg.lm_re_base**exponent  # [C/2]
    if cfg.lm_rope_type == "default":
        return freq
    stretched = freq / cfg.lm_rope_factor
    if cfg.lm_rope_type == "linear":
        return stretched
    turns = (
        cfg.lm_rope_original_max_positions * freq / (2 * torch.pi)
    )  # within the original context
    low, high = cfg.lm_rope_low_freq_factor, cfg.lm_rope_high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * freq + (1 - keep) * stretched


def rope_tables(freq: Tensor, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos of every angle, and sin, negated in the first half of the channels: each [B, T, 1, C].

    In fp32, then cast, as transformers does.
    """
    angles = positions[:, :, None, None].float() * freq  # [B, T, 1, C/2]
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)  # [B, T, 1, C/2]
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, way: int) -> Tensor:
    other = x.roll(x.shape[-1] // 2, -1)  # the second half of the channels, then the first
    # Rounded as transformers rounds: a fused product and sum would be 2e-5 off in a logit.
    return (x * cos).add_(other * sin, alpha=way)


class _Rotate(torch.autograd.Function):
    """Its gradient turns back. By hand, as autograd would negate, join and add whole tensors."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1).detach()  # see _SwiGLU

    @staticmethod
    def backward(ctx, grad):
        return _rotate(grad, *ctx.saved_tensors, -1), None, None


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [B, T, H, C] in Hugging Face's half-split layout: channel c pairs with c + C/2."""
    return _Rotate.apply(x, cos, sin) if torch.is_grad_enabled() else _rotate(x, cos, sin, 1)


# --- Segments: several samples in one row -------------------------------------------------------


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
    return SegmentBounds(send(bounds, device), int(lengths.max()), bounded_kernel())


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
    return SegmentPlan(groups, *(send(x, device) for x in tensors))


def takes_bounds(cfg: LMConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's kernel for segments of any length computes this: FlashAttention 2 decides.

    It has no fp32, no dropout as torch calls it, and heads of 8 to 256 channels, by eights.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or cfg.lm_dropout:
        return False
    if cfg.lm_head_width % 8 or cfg.lm_head_width > 256:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def bounded_kernel() -> Callable[..., Tensor]:
    """`varlen_attn`, told of grouped queries where it asks: torch 2.11's takes them as they are."""
    from torch.nn.attention.varlen import varlen_attn  # imports torch.compile's half of torch

    asks = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return partial(varlen_attn, enable_gqa=True) if asks else varlen_attn


def plan_for(cfg: LMConfig, segments: Tensor, like: Tensor) -> SegmentPlan | SegmentBounds:
    """What `attend` needs to keep segments [B, T] apart in blocks that start from `like`.

    A GPU waits for nothing where `segments` are on the CPU.
    """
    is_bounded = takes_bounds(cfg, like.device, computes_in(like))
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


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    gqa = q.shape[1] != k.shape[1]
    if q.device.type == "cpu" and torch.is_grad_enabled() and q.dtype == torch.bfloat16:
        # The backward of the CPU kernel is four times slower in bf16 than in fp32.
        with torch.autocast("cpu", enabled=False):
            out = F.scaled_dot_product_attention(
                q.float(), k.float(), v.float(), enable_gqa=gqa, **options
            )
        return out.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=gqa, **options)


def _attend_segments(q: Tensor, k: Tensor, v: Tensor, plan: SegmentPlan, dropout: float) -> Tensor:
    B, H, T, C = q.shape
    sizes = [group.n_segments * group.length for group in plan.groups]
    spread = []
    for x in (q, k, v):
        x = x.transpose(1, 2).reshape(B * T, -1, C)  # [B*T, H, C], no copy after a projection
        spread.append(_Take.apply(x, plan.sources, plan.slots, None).split(sizes))  # [G*L, H, C]
    outputs = []
    for group, *parts in zip(plan.groups, *spread, strict=True):
        qkv = (x.unflatten(0, (group.n_segments, -1)).transpose(1, 2) for x in parts)
        out = _softmax_attention(*qkv, dropout_p=dropout, is_causal=True)  # [G, H, L, C]
        outputs.append(out.transpose(1, 2).reshape(-1, H, C))  # [G*L, H, C]
    out = _Take.apply(torch.cat(outputs), plan.slots, plan.sources, plan.real)  # [B*T, H, C]
    return out.view(B, T, H, C).transpose(1, 2)  # [B, H, T, C]


def _attend_bounds(q: Tensor, k: Tensor, v: Tensor, plan: SegmentBounds) -> Tensor:
    B, H, T, C = q.shape
    flat = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # [B*T, H, C]
    bounds, longest = (plan.bounds, plan.bounds), (plan.longest, plan.longest)  # of q, of k
    causal = (-1, 0)  # everything before, nothing behind
    out = plan.kernel(*flat, *bounds, *longest, window_size=causal)
    return out.view(B, T, H, C).transpose(1, 2)  # [B, H, T, C]


def attend(
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
        return _attend_bounds(q, k, v, plan)
    if plan is not None:
        return _attend_segments(q, k, v, plan, dropout)
    if q.shape[2] == 1:
        # Heads that share keys go as queries of one: apart, a CPU in bf16 is five times as slow.
        own = q.unflatten(1, (k.shape[1], -1))[..., 0, :]  # [B, K, H / K, C]
        return _softmax_attention(own, k, v, attn_mask=visible, dropout_p=dropout).view_as(q)
    is_causal = causal and visible is None
    return _softmax_attention(q, k, v, attn_mask=visible, dropout_p=dropout, is_causal=is_causal)


# --- The cache ----------------------------------------------------------------------------------


class KVCache:
    """Keys and values of every block, preallocated; the caller owns it.

    A token at position p stands in slot p of its row, whatever the other rows hold, and sees slots
    0..p. Prompts of unequal length are padded at the end: the padding's slots are overwritten
    before any later token can see them. So is what a conversation that goes back leaves behind.
    """

    def __init__(
        self, cfg: LMConfig, n_rows: int, n_slots: int, device: torch.device, dtype: torch.dtype
    ):
        shape = (n_rows, cfg.lm_n_kv_heads, n_slots, cfg.lm_head_width)
        blocks = range(cfg.lm_n_blocks)
        # A tensor a block: were they views of one, a compiled step would copy all to write to one.
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in blocks]  # [B, K, S, C]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in blocks]
        self.rows = torch.arange(n_rows, device=device)[:, None]  # [B, 1]
        slots = torch.arange(n_slots, device=device)[None]  # [1, S]
        self.turns = rope_tables(rope_frequencies(cfg, device), slots, dtype)  # two of [1, S, 1, C]
        self.used = 0  # slots the rows of this pass reach
        self.at: slice | None = None  # where this pass writes, if at the same place in every row
        self.views: list[list[Tensor]] = []  # k and v of this pass: a [B, K, S, C] a block
        self.places: list[list[Tensor]] = []  # their slots `at`, a [B, K, T, C] a block

    @property
    def n_slots(self) -> int:
        return self.k[0].shape[2]

    def visible(self, positions: Tensor) -> Tensor | None:
        """[B, 1, T, S] for tokens about to be written at `positions` [B, T], which rise by one.

        None where no mask is needed: contiguous prompts from position 0 on, and a lone token of
        every row where all rows are as long, which sees all slots.
        """
        T = positions.shape[1]
        self.used = int(positions.max()) + 1
        start = self.used - T
        self.at = slice(start, self.used) if bool((positions[:, 0] == start).all()) else None
        both = self.k, self.v
        self.views = [[x[:, :, : self.used] for x in kept] for kept in both]
        self.places = [[x[:, :, self.at] for x in kept] for kept in both if self.at]
        if self.at is not None and (T == 1 or start == 0):
            return None
        return (torch.arange(self.used, device=positions.device) <= positions[:, :, None])[:, None]

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The rotary tables at `positions` [B, T] of a pass, each [B or 1, T, 1, C]."""
        cos, sin = self.turns
        if self.at is not None:
            return cos[:, self.at], sin[:, self.at]
        return cos[0, positions], sin[0, positions]

    def write(self, block: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Store [B, K, T, C] at their positions; return all used slots, each [B, K, S, C]."""
        slots = self.views[0][block], self.views[1][block]
        if self.at is not None:
            self.places[0][block].copy_(k)
            self.places[1][block].copy_(v)
            return slots
        for kept, new in zip(slots, (k, v)):
            kept[self.rows, :, positions] = new.transpose(1, 2).to(kept.dtype)
        return slots

    def keep_rows(self, rows: Tensor) -> None:
        """Forget all rows but these, as when others have finished; a row named twice is copied."""
        self.k, self.v = ([x[rows] for x in kept] for kept in (self.k, self.v))
        self.rows = torch.arange(len(rows), device=rows.device)[:, None]

    def put(self, rows: Tensor, other: KVCache) -> None:
        """Copy all rows of `other`, which has no more slots, over these."""
        for mine, others in zip((*self.k, *self.v), (*other.k, *other.v), strict=True):
            mine[rows, :, : other.n_slots] = others
