"""The key-value cache: preallocated, owned by the caller.

Letters: B batch, T tokens, S slots, K key-value heads, C head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from configs import LMConfig
from models.ops.rope import rope_frequencies, rope_tables


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


class StaticCache(KVCache):
    """The slots of another cache, all of which every query is shown behind a mask.

    So a pass is the same at every position, and asks the device for nothing.
    """

    def __init__(self, cache: KVCache):
        self.views = [cache.k, cache.v]
        self.turns, self.rows, self.at = cache.turns, cache.rows, None

    def visible(self, positions: Tensor) -> Tensor:
        slots = torch.arange(self.views[0][0].shape[2], device=positions.device)
        return (slots <= positions[:, :, None])[:, None]  # [B, 1, T, S]
