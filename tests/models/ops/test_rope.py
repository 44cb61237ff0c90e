"""RoPE equals transformers' for every rope type."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from configs import LMConfig
from models.ops.rope import apply_rope, rope_frequencies, rope_tables

ROPES = {
    "default": (dict(rope_type="default"), {}),
    "linear": (dict(rope_type="linear", factor=4.0), dict(lm_rope_factor=4.0)),
    "llama3": (  # of 8 frequencies some are kept, some blended, some divided
        dict(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=512,
        ),
        dict(
            lm_rope_factor=8.0,
            lm_rope_low_freq_factor=1.0,
            lm_rope_high_freq_factor=4.0,
            lm_rope_original_max_positions=512,
        ),
    ),
}


@pytest.mark.parametrize("kind", ROPES)
def test_rope_equals_transformers(kind):
    parameters, fields = ROPES[kind]
    cfg = LMConfig(lm_hidden_dim=64, lm_n_heads=4, lm_re_base=5000.0, lm_rope_type=kind, **fields)
    reference = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=64,
            num_attention_heads=4,
            max_position_embeddings=4096,
            rope_parameters=parameters | {"rope_theta": 5000.0},
        )
    )
    freq = rope_frequencies(cfg)
    torch.testing.assert_close(freq, reference.inv_freq, rtol=1e-6, atol=0)

    positions = torch.tensor([[0, 1, 2, 3, 50], [7, 8, 0, 1, 100]])
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 5, 16, generator=g), torch.randn(2, 2, 5, 16, generator=g)
    cos, sin = rope_tables(freq, positions, torch.float32)
    expected = apply_rotary_pos_emb(q, k, *reference(q, positions))
    found = (apply_rope(x.transpose(1, 2), cos, sin).transpose(1, 2) for x in (q, k))
    for actual, value in zip(found, expected, strict=True):
        # Positions up to 100 amplify the rounding of a frequency to 100 * 6e-8.
        torch.testing.assert_close(actual, value, rtol=0, atol=2e-5)
    if kind == "llama3":
        plain = rope_frequencies(LMConfig(lm_hidden_dim=64, lm_n_heads=4, lm_re_base=5000.0))
        ratio = plain / freq
        inside = (ratio > 1.01) & (ratio < 7.99)
        assert ratio.min() == 1 and ratio.max() == 8 and inside.any()


def test_rope_tables_are_computed_in_fp32_then_cast():
    freq, positions = rope_frequencies(LMConfig()), torch.tensor([[1999]])
    cos, _ = rope_tables(freq, positions, torch.bfloat16)
    assert torch.equal(cos, rope_tables(freq, positions, torch.float32)[0].bfloat16())


def test_rotation_and_its_gradient_keep_the_layout():
    """Projections return token-major tensors; copying one would cost as much as the rotation."""
    x = torch.randn(2, 5, 3, 8).requires_grad_()  # [B, T, H, C]
    cos, sin = rope_tables(torch.rand(4), torch.arange(5).expand(2, 5), torch.float32)
    out = apply_rope(x, cos, sin)
    assert out.stride() == x.stride()
    first, second = x.chunk(2, dim=-1)
    plain = x * cos + torch.cat((-second, first), dim=-1) * sin[..., 4:].repeat(1, 1, 1, 2)
    torch.testing.assert_close(out, plain)
    cotangent = torch.randn(out.shape)
    (actual,) = torch.autograd.grad(out, x, cotangent)
    (expected,) = torch.autograd.grad(plain, x, cotangent)
    torch.testing.assert_close(actual, expected)
