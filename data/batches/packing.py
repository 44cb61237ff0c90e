"""Pack samples into rows, and collate rows into a Batch.

Pure functions of lengths and arrays.
Not here: where samples come from (loader.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from configs import VLMConfig
from data.images import normalise
from data.types import IGNORE_INDEX, Batch, Tokens


def fill_rows(
    lengths: Sequence[int],
    n_rows: int,
    capacity: int,
    tiles: Sequence[int] = (),
    max_tiles: int = 0,
) -> list[list[int]]:
    """Choose the waiting samples that best fill `n_rows` rows of `capacity` tokens.

    Each row starts with the oldest remaining sample, so that none waits forever, and is filled with
    the best subset of the others. While a row of several samples exceeds `max_tiles`, the added
    sample with the most tiles is removed and the row is filled again.
    Returns indices into `lengths`, one list per row.
    """
    left, rows = list(range(len(lengths))), []
    while left and len(rows) < n_rows:
        first, *candidates = left
        row = [first, *best_subset(lengths, candidates, capacity - lengths[first])]
        while max_tiles and sum(tiles[i] for i in row) > max_tiles and len(row) > 1:
            candidates.remove(max(row[1:], key=lambda i: tiles[i]))
            row = [first, *best_subset(lengths, candidates, capacity - lengths[first])]
        rows.append(sorted(row))
        left = [i for i in left if i not in row]
    return rows


def best_subset(lengths: Sequence[int], candidates: Sequence[int], capacity: int) -> list[int]:
    """The subset of `candidates` with the maximum total length up to `capacity` (subset sum)."""
    reach = [1]  # bit t of reach[k]: a subset of the first k candidates has total length t
    for i in candidates:
        reach.append((reach[-1] | reach[-1] << lengths[i]) & ((1 << capacity + 1) - 1))
    total, row = reach[-1].bit_length() - 1, []
    for k in reversed(range(len(candidates))):
        if not reach[k] >> total & 1:
            row.append(candidates[k])
            total -= lengths[candidates[k]]
    return row


def collate(rows: Sequence[Sequence[Tokens]], cfg: VLMConfig) -> Batch:
    """Rows of samples -> a Batch, padded at the end to the longest row.

    Raises ValueError naming a sample if its placeholders do not match its tiles.
    """
    width = max(sum(map(len, row)) for row in rows)
    shape = (len(rows), width)
    ids = np.full(shape, cfg.vlm_pad_token_id, dtype=np.int64)
    targets = np.full(shape, IGNORE_INDEX, dtype=np.int64)
    positions, segments = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for r, row in enumerate(rows):
        start = 0
        for s, sample in enumerate(row):
            n = len(sample)
            n_image, n_tiles = (sample.ids == cfg.vlm_image_token_id).sum(), len(sample.tiles)
            if n_image != n_tiles * cfg.tokens_per_tile:
                tiles = f"{n_tiles} tiles of {cfg.tokens_per_tile} tokens"
                raise ValueError(f"{sample.row}: {n_image} image placeholders for {tiles}")
            ids[r, start : start + n] = sample.ids
            supervised = np.where(sample.supervised[1:], sample.ids[1:], IGNORE_INDEX)
            targets[r, start : start + n - 1] = supervised
            positions[r, start : start + n] = np.arange(n)
            segments[r, start : start + n] = s + 1
            start += n
        positions[r, start:] = np.arange(width - start)
    packed = any(len(row) > 1 for row in rows)
    tiles = np.concatenate([sample.tiles for row in rows for sample in row])
    return Batch(
        input_ids=torch.from_numpy(ids),
        targets=torch.from_numpy(targets),
        positions=torch.from_numpy(positions),
        segments=torch.from_numpy(segments) if packed else None,
        images=normalise(tiles, cfg),
        n_targets=int((targets != IGNORE_INDEX).sum()),
        n_samples=sum(map(len, rows)),
        n_tokens=int((segments > 0).sum()),
    )


def collate_prompts(
    prompts: Sequence[Tokens], cfg: VLMConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prompts -> input_ids, attention_mask [B, T], padded at the end, and images [N, 3, H, W]."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), cfg.vlm_pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.from_numpy(prompt.ids)
        mask[row, : len(prompt)] = 1
    return ids, mask, normalise(np.concatenate([p.tiles for p in prompts]), cfg)
