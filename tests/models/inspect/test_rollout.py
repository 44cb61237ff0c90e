"""Rollout equals the explicit product of the attention that the model computes."""

from __future__ import annotations

import pytest
import torch

from configs import ViTConfig
from models.inspect.rollout import attention_of, rollout
from models.vision_transformer import ViT

SIZES = dict(vit_img_size=16, vit_patch_size=4, vit_hidden_dim=32, vit_inter_dim=56, vit_n_heads=2,
             vit_n_blocks=3)  # fmt: skip


def vit_of(lively, **fields) -> ViT:
    torch.manual_seed(0)
    return lively(ViT(ViTConfig(**SIZES | fields)))


def images(n: int = 2) -> torch.Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def test_attention_reproduces_the_block_output(lively):
    """The returned attention, recomputed here, reproduces the output of every block."""
    vit = vit_of(lively, vit_cls_flag=True)
    x = vit.patch_embedding(images())
    for block, attention in zip(vit.blocks, attention_of(vit, images())):
        torch.testing.assert_close(attention.sum(-1), torch.ones(2, 17))
        a = block.attn
        y = block.ln1(x)
        projections = (a.q_proj, a.k_proj, a.v_proj)
        q, k, v = (p(y).unflatten(-1, (2, 16)).transpose(1, 2) for p in projections)
        weights = (q @ k.mT / 4).softmax(-1)
        torch.testing.assert_close(a(y), a.out_proj((weights @ v).transpose(1, 2).flatten(2)))
        torch.testing.assert_close(attention, weights.mean(1), rtol=0, atol=1e-5)
        x = block(x)


@pytest.mark.parametrize(
    "fields",
    [dict(vit_cls_flag=True), dict(vit_cls_flag=True, vit_n_registers=2, vit_pool="mean"),
     dict(vit_pool="map"), dict()],
    ids=str,
)  # fmt: skip
@torch.no_grad()
def test_rollout_equals_the_explicit_product(fields, lively):
    vit = vit_of(lively, **fields)
    found = rollout(vit, images())
    assert found.shape == (2, 4, 4) and (found >= 0).all()
    n_prefix = vit.cfg.vit_n_prefix
    for n in range(2):
        flow = torch.eye(n_prefix + 16)
        maps = [attention[n] for attention in attention_of(vit, images())]
        for attention in maps[:3]:
            flow = (0.5 * attention + 0.5 * torch.eye(n_prefix + 16)) @ flow
        row = {"cls": flow[0], "map": maps[-1][0] @ flow if len(maps) > 3 else None}.get(
            vit.cfg.vit_pooling, flow[n_prefix:].mean(0)
        )
        torch.testing.assert_close(found[n].flatten(), row[n_prefix:], rtol=0, atol=1e-5)
    assert found.sum((1, 2)).max() <= 1 + 1e-5


def test_rollout_restores_the_model(lively):
    vit = vit_of(lively, vit_dropout=0.5).train()
    first = rollout(vit, images())
    assert vit.training and torch.equal(first, rollout(vit, images()))  # without dropout
    assert not any(module._forward_hooks for module in vit.modules())
