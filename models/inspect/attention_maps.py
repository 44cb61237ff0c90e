"""Attention maps of the decoder, recomputed from queries and keys that hooks capture.

The model itself runs unchanged. Not here: drawing maps over images
(engine/inference/attention_overlay.py).

Letters: T tokens, R query tokens, H heads, K key-value heads, C head width, L blocks, N tiles,
G image tokens along a side of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from configs import VLMConfig
from models.ops.rope import apply_rope, rope_frequencies, rope_tables


@contextmanager
def outputs(modules: list[nn.Module]) -> Generator[list[Tensor]]:
    """Append the outputs of `modules` to a list while the context is open."""
    found: list[Tensor] = []
    hooks = [m.register_forward_hook(lambda _m, _in, out: found.append(out)) for m in modules]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def attention_weights(model, input_ids: Tensor, images: Tensor | None, first: int) -> Tensor:
    """Attention of tokens `first`, `first + 1`, ... of a sequence [T]: [L, H, R, T] in fp32.

    Rows sum to one. images [N, 3, H, W] are the sequence's tiles.
    """
    cfg, blocks = model.cfg, model.decoder.blocks
    with (
        outputs([block.attn.q_norm for block in blocks]) as queries,
        outputs([block.attn.k_norm for block in blocks]) as keys,
    ):
        model.decoder(model.embed(input_ids[None], images))
    positions = torch.arange(len(input_ids), device=input_ids.device)[None]
    rope = rope_tables(rope_frequencies(cfg, input_ids.device), positions, torch.float32)
    later = positions > positions[0, first:, None]  # [R, T]
    maps = []
    for block, q, k in zip(blocks, queries, keys, strict=True):
        q, k = q.float(), k.float()  # [1, T, H, C], [1, T, K, C]
        if block.attn.uses_rope:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        q, k = q.transpose(1, 2), k.transpose(1, 2)  # [1, H, T, C], [1, K, T, C]
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # [1, H, T, C]
        scores = q[0, :, first:] @ k[0].transpose(1, 2) / math.sqrt(q.shape[-1])  # [H, R, T]
        maps.append(scores.masked_fill(later, -torch.inf).softmax(-1))
    return torch.stack(maps)  # [L, H, R, T]


def tile_maps(weights: Tensor, input_ids: Tensor, cfg: VLMConfig) -> Tensor:
    """The entries of [..., T] at image tokens, as [..., N, G, G] in reading order."""
    on_tiles = weights[..., input_ids == cfg.vlm_image_token_id]
    side = math.isqrt(cfg.tokens_per_tile)
    return on_tiles.unflatten(-1, (-1, side, side))
