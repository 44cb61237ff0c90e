"""Attention maps reproduce the model's outputs and equal transformers' maps."""

from __future__ import annotations

import pytest
import torch

from models.inspect.attention_maps import attention_weights, outputs, tile_maps


@pytest.fixture
def sample(make_sample):
    return lambda model, n_tiles=2: make_sample(model.cfg, n_tiles, 9, 0)


@pytest.mark.parametrize("changes", [{}, {"lm_qk_norm": True}, {"lm_nope_every": 2}], ids=str)
@torch.no_grad()
def test_weights_times_values_give_the_attention_output(changes, small_model, sample):
    model = small_model(**changes)
    ids, images = sample(model)
    blocks = model.decoder.blocks
    with (
        outputs([b.attn.v_proj for b in blocks]) as values,
        outputs([b.attn for b in blocks]) as attended,
    ):
        weights = attention_weights(model, ids, images, 4)
    L, H, R, _ = weights.shape
    assert weights.shape == (3, 4, len(ids) - 4, len(ids))
    torch.testing.assert_close(weights.sum(-1), torch.ones(L, H, R))
    for block, w, v, out in zip(blocks, weights, values, attended, strict=True):
        v = v[0].unflatten(-1, (2, -1)).repeat_interleave(2, dim=1).transpose(0, 1)  # [H, T, C]
        mixed = (w @ v).transpose(0, 1).flatten(1)  # [R, H * C]
        torch.testing.assert_close(block.attn.o_proj(mixed), out[0, 4:], atol=1e-5, rtol=1e-4)
    assert not weights[..., 0, 6:].any() and weights[..., 0, :5].all(), "attention is causal"


@torch.no_grad()
def test_maps_equal_transformers(small_model, sample, tmp_path):
    from transformers import Idefics3ForConditionalGeneration

    model = small_model()
    model.save_pretrained(tmp_path)
    reference = Idefics3ForConditionalGeneration.from_pretrained(
        tmp_path, attn_implementation="eager"
    )
    ids, images = sample(model)
    out = reference.eval()(input_ids=ids[None], pixel_values=images[None], output_attentions=True)
    expected = torch.stack(out.attentions)[:, 0]  # [L, H, T, T]
    found = attention_weights(model, ids, images, 0)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_hooks_are_removed(small_model, sample):
    model = small_model()
    ids, images = sample(model)
    first = attention_weights(model, ids, images, 3)
    assert not any(m._forward_hooks for m in model.modules())
    assert torch.equal(first, attention_weights(model, ids, images, 3))
    with pytest.raises(ValueError, match="tiles were given"):
        attention_weights(model, ids, images[:1], 3)
    assert not any(m._forward_hooks for m in model.modules())


def test_tiles_are_in_reading_order(small_model, sample):
    model = small_model()
    ids, _ = sample(model, 3)
    weights = torch.arange(float(len(ids))).expand(2, len(ids))
    maps = tile_maps(weights, ids, model.cfg)
    side = int(model.cfg.tokens_per_tile**0.5)
    assert maps.shape == (2, 3, side, side)
    image_positions = (ids == model.cfg.vlm_image_token_id).nonzero()[:, 0].float()
    assert (
        torch.equal(maps[0].flatten(), image_positions) and maps[0, 0, 0, 1] == maps[0, 0, 0, 0] + 1
    )
