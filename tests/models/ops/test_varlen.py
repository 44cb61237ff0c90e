"""Variable-length attention: the arguments of the kernel, and when it is used.

Without a GPU, masked attention replaces the kernel.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import varlen

from configs import LMConfig
from data.types import Batch
from models.ops import packed
from models.ops.packed import (
    build_packing,
    find_bounds,
    packed_attention,
    supports_varlen,
    varlen_kernel,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("n_kv", [1, 4])
def test_varlen_attention_equals_dense_attention(masked_varlen, n_kv):
    segments = torch.tensor([[1] * 5 + [2] * 3 + [0] * 2, [2] * 1 + [1] * 9])
    packing = find_bounds(segments, CPU)
    assert packing.bounds.tolist() == [0, 5, 8, 10, 11, 20] and packing.longest == 9
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, h, 10, 8, generator=g, requires_grad=True) for h in (4, n_kv, n_kv)]
    reference_inputs = [x.detach().clone().requires_grad_() for x in inputs]
    mask = segments[:, None, :, None] == segments[:, None, None, :]  # [B, 1, T, T]
    mask &= torch.ones(10, 10, dtype=torch.bool).tril()
    expected = F.scaled_dot_product_attention(*reference_inputs, attn_mask=mask, enable_gqa=True)
    out = packed_attention(*inputs, packing)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    cotangent = torch.randn(out.shape, generator=g)
    out.backward(cotangent)
    expected.backward(cotangent)
    for x, y in zip(inputs, reference_inputs, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=1e-5)


def test_varlen_attention_gives_the_same_loss(small_model, request):
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(4, 100, (2, 40), generator=g)
    segments = torch.randint(0, 2, (2, 40), generator=g).cumsum(1)
    tensors = dict(input_ids=ids, targets=ids.roll(-1, 1), segments=segments)
    model = small_model()
    grouped = model(**tensors)[1]
    request.getfixturevalue("masked_varlen")
    torch.testing.assert_close(model(**tensors)[1], grouped)


def test_supports_varlen(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    cfg = LMConfig(lm_hidden_dim=64, lm_n_heads=2, lm_n_kv_heads=1)
    assert supports_varlen(cfg, GPU, torch.bfloat16) and supports_varlen(cfg, GPU, torch.float16)
    assert not supports_varlen(cfg, CPU, torch.bfloat16)
    assert not supports_varlen(cfg, GPU, torch.float32)
    for fields in (dict(lm_dropout=0.1), dict(lm_hidden_dim=24), dict(lm_hidden_dim=1024)):
        changed = LMConfig(**(dict(lm_hidden_dim=64, lm_n_heads=2, lm_n_kv_heads=1) | fields))
        assert not supports_varlen(changed, GPU, torch.bfloat16), fields
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert not supports_varlen(cfg, GPU, torch.bfloat16)


def test_enable_gqa_is_passed_if_the_kernel_has_it(monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", lambda *, window_size, enable_gqa: enable_gqa)
    assert varlen_kernel()(window_size=(-1, 0))
    monkeypatch.setattr(varlen, "varlen_attn", lambda *, window_size: "torch 2.11")
    assert varlen_kernel()(window_size=(-1, 0)) == "torch 2.11"


def test_autocast_dtype_selects_the_kernel(monkeypatch):
    dtypes = []
    monkeypatch.setattr(packed, "supports_varlen", lambda *args: dtypes.append(args[2]))
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            build_packing(LMConfig(), torch.ones(1, 4), torch.zeros(1, 4, 8))
    assert dtypes == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("is_varlen", [False, True])
def test_training_step_does_not_synchronise(
    small_model, make_sample, monkeypatch, request, is_varlen
):
    """Reading a value raises on the meta device; on a GPU it would make the host wait."""
    if is_varlen:
        request.getfixturevalue("masked_varlen")
    # The meta device supports neither of these.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    model = small_model().to("meta").train()
    ids, images = make_sample(model.cfg, 2, 9, 0)
    ids, segments = ids[None], 1 + (torch.arange(len(ids))[None] > 3).long()
    batch = Batch(ids, ids, torch.arange(ids.shape[1])[None], segments, images).to("meta")
    assert batch.positions.is_meta and batch.images.is_meta
    model(**batch.tensors())[1].backward()
    assert model.decoder.blocks[0].attn.q_proj.weight.grad.is_meta
