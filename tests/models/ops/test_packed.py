"""Packed attention is the dense mask, whatever the layout of the rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models.ops.packed import group_segments, packed_attention

CPU = torch.device("cpu")


# Rows of (segment id, length); ids need not rise, and neighbours in two rows may share one.
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
    """The oracle: one boolean mask, every key-value head repeated."""
    T = segments.shape[1]
    same = segments[:, :, None] == segments[:, None, :]
    mask = (same & torch.ones(T, T, dtype=torch.bool).tril())[:, None]  # [B, 1, T, T]
    n = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(n, 1), v.repeat_interleave(n, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@pytest.mark.parametrize("n_kv", [1, 2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_attention_is_the_dense_mask(layout, n_kv):
    segments = lay_out(LAYOUTS[layout])
    B, T = segments.shape
    g = torch.Generator().manual_seed(1)
    shapes = [(B, 4, T, 6), (B, n_kv, T, 6), (B, n_kv, T, 6)]
    ours = [torch.randn(s, generator=g, requires_grad=True) for s in shapes]
    reference = [x.detach().clone().requires_grad_() for x in ours]
    real = (segments != 0)[:, None, :, None]  # nobody looks at the output of padding
    cotangent = torch.randn(shapes[0], generator=g) * real

    out = packed_attention(*ours, group_segments(segments, CPU))
    wanted = dense(*reference, segments)
    torch.testing.assert_close(out * real, wanted * real, rtol=0, atol=1e-5)
    out.backward(cotangent)
    wanted.backward(cotangent)
    for mine, other in zip(ours, reference, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=1e-5)


def test_packed_attention_in_bf16_has_the_gradients_of_fp32():
    """On CPU the kernel runs in fp32 inside a bf16 graph: only in- and outputs are rounded."""
    segments = lay_out(LAYOUTS["rows"])
    B, T = segments.shape
    g = torch.Generator().manual_seed(1)
    ours = [torch.randn(B, h, T, 6, generator=g).bfloat16().requires_grad_() for h in (4, 2, 2)]
    reference = [x.detach().float().requires_grad_() for x in ours]
    out = packed_attention(*ours, group_segments(segments, CPU))
    wanted = dense(*reference, segments)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), wanted, rtol=2**-8, atol=2**-8)
    out.float().sum().backward()
    wanted.sum().backward()
    for mine, other in zip(ours, reference, strict=True):
        assert mine.grad.dtype == torch.bfloat16
        torch.testing.assert_close(mine.grad.float(), other.grad, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_token_has_one_real_slot(layout):
    segments = lay_out(LAYOUTS[layout])
    groups = group_segments(segments, CPU)
    assert groups.sources.shape == (sum(n * length for n, length in groups.shapes),)
    tokens = torch.arange(segments.numel())
    assert torch.equal(groups.sources[groups.slots], tokens)
    assert len(groups.slots.unique()) == len(tokens)


def test_a_group_wastes_less_than_half_of_its_slots():
    """A segment joins a group only when at least half as long as its longest."""
    lengths = (300, 1, 2, 90, 7, 3, 160)
    groups = group_segments(lay_out([list(enumerate(lengths, 1))]), CPU)
    assert len(groups.sources) < 2 * 563
    assert [length for _, length in groups.shapes] == [300, 90, 7, 3, 1]
