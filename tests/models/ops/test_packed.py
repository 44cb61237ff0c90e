"""Packed attention equals dense attention with a mask, for any layout of the rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models.ops.packed import group_segments, packed_attention

CPU = torch.device("cpu")


# Rows of (segment id, length). Ids need not ascend, and two rows may contain the same id.
LAYOUTS = {
    "one segment": [[(1, 7)]],
    "unequal": [[(1, 1), (2, 9), (3, 2), (4, 4)]],
    "rows": [[(1, 5), (2, 11)], [(2, 16)], [(1, 2), (2, 2), (3, 2), (4, 10)]],
    "padding": [[(1, 6), (2, 3), (0, 5)], [(0, 4), (1, 10)], [(5, 14)]],
    "singles": [[(i, 1) for i in range(1, 9)]],
}


def lay_out(rows: list) -> torch.Tensor:
    return torch.tensor([[i for i, n in row for _ in range(n)] for row in rows])


def dense(q, k, v, segments):
    """Reference: one boolean mask, every key-value head repeated."""
    T = segments.shape[1]
    same = segments[:, :, None] == segments[:, None, :]
    mask = (same & torch.ones(T, T, dtype=torch.bool).tril())[:, None]  # [B, 1, T, T]
    n = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(n, 1), v.repeat_interleave(n, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@pytest.mark.parametrize("n_kv", [1, 2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_attention_equals_dense_attention(layout, n_kv):
    segments = lay_out(LAYOUTS[layout])
    B, T = segments.shape
    g = torch.Generator().manual_seed(1)
    shapes = [(B, 4, T, 6), (B, n_kv, T, 6), (B, n_kv, T, 6)]
    inputs = [torch.randn(s, generator=g, requires_grad=True) for s in shapes]
    reference_inputs = [x.detach().clone().requires_grad_() for x in inputs]
    real = (segments != 0)[:, None, :, None]  # the output of padding is not used
    cotangent = torch.randn(shapes[0], generator=g) * real

    out = packed_attention(*inputs, group_segments(segments, CPU))
    expected = dense(*reference_inputs, segments)
    torch.testing.assert_close(out * real, expected * real, rtol=0, atol=1e-5)
    out.backward(cotangent)
    expected.backward(cotangent)
    for x, y in zip(inputs, reference_inputs, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=1e-5)


def test_packed_attention_in_bf16_matches_fp32():
    """On a CPU attention runs in fp32 inside a bf16 graph: only inputs and outputs are rounded."""
    segments = lay_out(LAYOUTS["rows"])
    B, T = segments.shape
    g = torch.Generator().manual_seed(1)
    inputs = [torch.randn(B, h, T, 6, generator=g).bfloat16().requires_grad_() for h in (4, 2, 2)]
    reference_inputs = [x.detach().float().requires_grad_() for x in inputs]
    out = packed_attention(*inputs, group_segments(segments, CPU))
    expected = dense(*reference_inputs, segments)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=2**-8, atol=2**-8)
    out.float().sum().backward()
    expected.sum().backward()
    for x, y in zip(inputs, reference_inputs, strict=True):
        assert x.grad.dtype == torch.bfloat16
        torch.testing.assert_close(x.grad.float(), y.grad, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_token_has_one_slot(layout):
    segments = lay_out(LAYOUTS[layout])
    groups = group_segments(segments, CPU)
    assert groups.sources.shape == (sum(n * length for n, length in groups.shapes),)
    tokens = torch.arange(segments.numel())
    assert torch.equal(groups.sources[groups.slots], tokens)
    assert len(groups.slots.unique()) == len(tokens)


def test_less_than_half_of_the_slots_are_padding():
    """A segment joins a group only if it has at least half the length of the longest."""
    lengths = (300, 1, 2, 90, 7, 3, 160)
    groups = group_segments(lay_out([list(enumerate(lengths, 1))]), CPU)
    assert len(groups.sources) < 2 * 563
    assert [length for _, length in groups.shapes] == [300, 90, 7, 3, 1]
