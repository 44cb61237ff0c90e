"""Attention rollout of a ViT: each patch's share of the output (Abnar and Zuidema 2020).

Attention is recomputed from queries and keys that hooks capture; the model runs unchanged. Not
here: figures (engine/vit/figures.py), the decoder's attention (attention_maps.py).

Letters: N images, T tokens, H heads, C head width, P patches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models.vision_transformer import ViT, ViTMultiHeadAttention


def _weights(attn: ViTMultiHeadAttention, q: Tensor, k: Tensor) -> Tensor:
    """Projected queries [N, Q, D] and keys [N, T, D] -> attention, mean over heads, [N, Q, T]."""
    q, k = (x.unflatten(-1, (attn.n_heads, -1)).transpose(1, 2) for x in (q, k))  # [N, H, T, C]
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean(1)


@torch.no_grad()
def attention_of(vit: ViT, images: Tensor) -> list[Tensor]:
    """Attention [N, T, T] of every block, mean over heads; last, [N, 1, T] of a map pool."""
    layers: list[Any] = [block.attn for block in vit.blocks]
    layers += [vit.map_pool.attn] if vit.map_pool is not None else []
    caught: dict[nn.Module, Tensor] = {}
    hooks = [
        proj.register_forward_hook(lambda module, _, out: caught.__setitem__(module, out))
        for attn in layers
        for proj in (attn.q_proj, attn.k_proj)
    ]
    was_training = vit.training
    try:
        vit.eval()(images)
    finally:
        vit.train(was_training)
        for hook in hooks:
            hook.remove()
    return [_weights(attn, caught[attn.q_proj], caught[attn.k_proj]) for attn in layers]


def rollout(vit: ViT, images: Tensor) -> Tensor:
    """[N, grid, grid]: the share of each patch in the pooled output.

    A block counts as half identity, for its residual connection, and half attention. The shares of
    CLS and registers are left out, so a map sums to at most one.
    """
    maps = attention_of(vit, images)
    n_blocks, T = len(vit.blocks), maps[0].shape[-1]
    eye = torch.eye(T, device=images.device)
    flow = eye.expand(len(images), T, T)  # [N, T, T]
    for attention in maps[:n_blocks]:
        flow = (attention + eye) / 2 @ flow
    if len(maps) > n_blocks:
        flow = maps[-1] @ flow  # [N, 1, T]
    elif vit.cfg.vit_pooling == "cls":
        flow = flow[:, :1]  # [N, 1, T]
    else:
        flow = flow[:, vit.cfg.vit_n_prefix :]  # mean over patches, as mean pooling does
    grid = vit.cfg.vit_grid
    return flow.mean(1)[:, vit.cfg.vit_n_prefix :].unflatten(1, (grid, grid))  # [N, grid, grid]
