"""The key-value cache: preallocated tensors that the caller owns.

Letters: B batch, T tokens, S slots, K key-value heads, C head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from configs import LMConfig
from models.ops.rope import rope_frequencies, rope_tables


class KVCache:
    """Keys and values of every block. A token at position p fills slot p of its row.

    A step is `begin_step(positions)`, then `write` once in every block. Prompts of unequal length
    are padded at the end: later tokens overwrite the padding's slots before any query attends.
    """

    def __init__(
        self, cfg: LMConfig, n_rows: int, n_slots: int, device: torch.device, dtype: torch.dtype
    ):
        shape = (n_rows, cfg.lm_n_kv_heads, n_slots, cfg.lm_head_width)
        # One tensor per block: a compiled step would copy a tensor that holds all blocks.
        self.k, self.v = (
            [torch.zeros(shape, device=device, dtype=dtype) for _ in range(cfg.lm_n_blocks)]
            for _ in "kv"
        )  # one [B, K, S, C] for each block
        slots = torch.arange(n_slots, device=device)[None]  # [1, S]
        self.cos, self.sin = rope_tables(rope_frequencies(cfg, device), slots, dtype)
        self.rows = torch.arange(n_rows, device=device)[:, None]  # [B, 1]
        # Set by begin_step:
        self.positions: Tensor | None = None  # [B, T]
        self.mask: Tensor | None = None  # [B, 1, T, S]; None: causal, or one query sees all
        self.n_used: int | None = 0  # slots in use after the step
        self.span: slice | None = None  # the slots written, if they are the same in every row

    @property
    def n_slots(self) -> int:
        return self.k[0].shape[2]

    def begin_step(self, positions: Tensor) -> None:
        """Prepare to write at `positions` [B, T], consecutive in each row.

        Prompts that start at position 0 need no mask, nor does one token per row if all rows have
        the same length. Raises ValueError beyond the last slot.
        """
        T, n_used = positions.shape[1], int(positions.max()) + 1
        if n_used > self.n_slots:
            raise ValueError(f"position {n_used - 1} exceeds a cache of {self.n_slots} slots")
        start = n_used - T
        same = bool((positions[:, 0] == start).all())
        self.positions, self.n_used, self.mask = positions, n_used, None
        self.span = slice(start, n_used) if same else None
        if not same or (T > 1 and start > 0):
            slots = torch.arange(n_used, device=positions.device)
            self.mask = (slots <= positions[:, :, None])[:, None]  # [B, 1, T, S]

    def rope(self) -> tuple[Tensor, Tensor]:
        """cos and sin at the step's positions, each [B or 1, T, 1, C]."""
        if self.span is not None:
            return self.cos[:, self.span], self.sin[:, self.span]
        return self.cos[0, self.positions], self.sin[0, self.positions]

    def write(self, block: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store [B, K, T, C] of a block; return all its used slots, each [B, K, S, C]."""
        for cache, new in ((self.k[block], k), (self.v[block], v)):
            if self.span is not None:
                cache[:, :, self.span] = new
            else:
                cache[self.rows, :, self.positions] = new.transpose(1, 2).to(cache.dtype)
        return self.k[block][:, :, : self.n_used], self.v[block][:, :, : self.n_used]

    def keep_rows(self, rows: Tensor) -> None:
        """Keep only these rows, in this order; a row named twice is copied."""
        self.k, self.v = ([x[rows] for x in tensors] for tensors in (self.k, self.v))
        self.rows = torch.arange(len(rows), device=rows.device)[:, None]

    def put(self, rows: Tensor, other: KVCache) -> None:
        """Overwrite these rows with all rows of `other`, which must not have more slots."""
        for mine, new in zip((*self.k, *self.v), (*other.k, *other.v), strict=True):
            mine[rows, :, : other.n_slots] = new


class StaticCache(KVCache):
    """Shares the tensors of another cache; every query gets all slots and a mask.

    Shapes are static and no step synchronises with the device, so that a step can be compiled or
    captured as a CUDA graph.
    """

    def __init__(self, cache: KVCache):
        self.k, self.v, self.cos, self.sin = cache.k, cache.v, cache.cos, cache.sin
        self.rows, self.span, self.n_used = cache.rows, None, None  # all slots are used
        self.positions = self.mask = None

    def begin_step(self, positions: Tensor) -> None:
        slots = torch.arange(self.k[0].shape[2], device=positions.device)
        self.positions, self.mask = positions, (slots <= positions[:, :, None])[:, None]
