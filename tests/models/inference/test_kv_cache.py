"""A token's slot is its position, rows are independent, and a single query sees every slot."""

from __future__ import annotations

import pytest
import torch

from configs import LMConfig
from models.inference.kv_cache import KVCache
from models.ops.attention import attention


def test_cache_slots_are_positions_for_unequal_rows():
    cfg = LMConfig(lm_hidden_dim=16, lm_n_heads=2, lm_n_kv_heads=1, lm_n_blocks=2)
    cache = KVCache(cfg, 2, 8, torch.device("cpu"), torch.float32)
    g = torch.Generator().manual_seed(0)
    prompt = torch.arange(4).expand(2, 4)  # row 1 has two real tokens; slots 2 and 3 hold padding
    k0, v0 = torch.randn(2, 1, 4, 8, generator=g), torch.randn(2, 1, 4, 8, generator=g)
    cache.begin_step(prompt)
    assert cache.mask is None
    k, v = cache.write(1, k0, v0)
    assert torch.equal(k, k0) and torch.equal(v, v0)
    assert not cache.k[0].any(), "other blocks are unchanged"

    positions = torch.tensor([[4], [2]])
    cache.begin_step(positions)
    assert cache.mask.tolist() == [[[[True] * 5]], [[[True, True, True, False, False]]]]
    k1, v1 = torch.randn(2, 1, 1, 8, generator=g), torch.randn(2, 1, 1, 8, generator=g)
    k, v = cache.write(1, k1, v1)
    for new, first, later in ((k, k0, k1), (v, v0, v1)):
        assert torch.equal(new[0], torch.cat((first[0], later[0]), dim=1))
        assert torch.equal(new[1, :, :3], torch.cat((first[1, :, :2], later[1]), dim=1))

    cache.keep_rows(torch.tensor([1]))
    cache.begin_step(torch.tensor([[3]]))
    assert cache.mask is None and cache.n_used == 4, "only the shorter row remains"
    k2 = torch.randn(1, 1, 1, 8, generator=g)
    k, _ = cache.write(1, k2, k2)
    assert torch.equal(k[0], torch.cat((k0[1, :, :2], k1[1], k2[0]), dim=1))


@pytest.mark.parametrize("n_kv", [4, 2, 1])
def test_single_query_sees_every_slot(n_kv):
    """Rows of equal length need no mask for one more token; `causal` would hide all but slot 0."""
    cfg = LMConfig(lm_hidden_dim=32, lm_n_heads=4, lm_n_kv_heads=n_kv, lm_n_blocks=1)
    cache = KVCache(cfg, 2, 8, torch.device("cpu"), torch.float32)
    q, k, v = (torch.randn(2, heads, 5, 8) for heads in (4, n_kv, n_kv))
    cache.begin_step(torch.arange(4).expand(2, 4))
    assert cache.mask is None
    cache.write(0, k[:, :, :4], v[:, :, :4])
    last = torch.full((2, 1), 4)
    cache.begin_step(last)
    assert cache.mask is None and cache.span == slice(4, 5)
    slots = cache.write(0, k[:, :, 4:], v[:, :, 4:])
    whole = attention(q, k, v, causal=True)
    torch.testing.assert_close(attention(q[:, :, 4:], *slots, causal=True), whole[:, :, 4:])
    visible = torch.tensor([True, False, True, True, True])  # as with rows of unequal length
    masked = attention(q[:, :, 4:], *slots, mask=visible.expand(2, 1, 1, 5))
    kept = (x[:, :, visible] for x in (k, v))
    torch.testing.assert_close(masked, attention(q[:, :, 4:], *kept, causal=True))
    two = torch.tensor([[3, 4], [3, 4]])  # two more tokens need a mask
    cache.begin_step(two)
    assert cache.mask.tolist() == [[[[True] * 4 + [False], [True] * 5]]] * 2
    slots = cache.write(0, k[:, :, 3:], v[:, :, 3:])
    masked = attention(q[:, :, 3:], *slots, mask=cache.mask)
    torch.testing.assert_close(masked, whole[:, :, 3:])


def test_rows_of_a_cache_are_copied_and_replaced():
    cfg = LMConfig(lm_hidden_dim=16, lm_n_heads=2, lm_n_kv_heads=1, lm_n_blocks=2)
    device = torch.device("cpu")
    big, small = (KVCache(cfg, *shape, device, torch.float32) for shape in ((3, 8), (2, 5)))
    for cache in (big, small):
        for x in (*cache.k, *cache.v):
            x.normal_()
    old = [x.clone() for x in (*big.k, *big.v)]
    big.put(torch.tensor([2, 0]), small)
    sources = *small.k, *small.v
    for x, before, source in zip((*big.k, *big.v), old, sources, strict=True):
        assert torch.equal(x[[2, 0], :, :5], source)
        assert torch.equal(x[1], before[1])
        assert torch.equal(x[..., 5:, :], before[..., 5:, :])
    big.keep_rows(torch.tensor([1, 1, 0]))
    assert big.rows.tolist() == [[0], [1], [2]]
    for x, before, source in zip((*big.k, *big.v), old, sources, strict=True):
        assert torch.equal(x[0], before[1]) and torch.equal(x[1], before[1])
        assert torch.equal(x[2, :, :5], source[1])


def test_getters_have_no_side_effects_and_overflow_raises():
    cache = KVCache(LMConfig(), 1, 4, torch.device("cpu"), torch.float32)
    cache.begin_step(torch.arange(3)[None])
    before = {name: value for name, value in vars(cache).items()}
    assert torch.equal(cache.rope()[0], cache.rope()[0]) and cache.n_slots == 4
    assert all(vars(cache)[name] is value for name, value in before.items())
    with pytest.raises(ValueError, match="position 4 exceeds a cache of 4 slots"):
        cache.begin_step(torch.tensor([[4]]))
