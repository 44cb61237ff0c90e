"""Packed attention is the dense mask, RoPE is transformers', the cache keeps rows apart."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from configs import LMConfig, TrainConfig
from engine.training import adapters
from engine.training.optim import build_optimizer
from models.inference.kv_cache import KVCache
from models.ops import memory
from models.ops.attention import attention
from models.ops.packed import _Take, plan_segments
from models.ops.rope import apply_rope, rope_frequencies, rope_tables
from models.vision_language_model import VisionLanguageModel

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
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    real = (segments != 0)[:, None, :, None]  # nobody looks at the output of padding
    cotangent = torch.randn(shapes[0], generator=g) * real

    out = attention(*ours, causal=True, plan=plan_segments(segments, CPU))
    wanted = dense(*theirs, segments)
    torch.testing.assert_close(out * real, wanted * real, rtol=0, atol=1e-5)
    out.backward(cotangent)
    wanted.backward(cotangent)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=1e-5)


def test_packed_attention_in_bf16_has_the_gradients_of_fp32():
    """On CPU the kernel runs in fp32 inside a bf16 graph: only in- and outputs are rounded."""
    segments = lay_out(LAYOUTS["rows"])
    B, T = segments.shape
    g = torch.Generator().manual_seed(1)
    ours = [torch.randn(B, h, T, 6, generator=g).bfloat16().requires_grad_() for h in (4, 2, 2)]
    theirs = [x.detach().float().requires_grad_() for x in ours]
    out = attention(*ours, causal=True, plan=plan_segments(segments, CPU))
    wanted = dense(*theirs, segments)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), wanted, rtol=2**-8, atol=2**-8)
    out.float().sum().backward()
    wanted.sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.grad.dtype == torch.bfloat16
        torch.testing.assert_close(mine.grad.float(), other.grad, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_token_has_one_real_slot(layout):
    segments = lay_out(LAYOUTS[layout])
    plan = plan_segments(segments, CPU)
    n_slots = sum(g.n_segments * g.length for g in plan.groups)
    assert plan.sources.shape == (n_slots,) and plan.real.shape == (n_slots, 1, 1)
    real = plan.real.flatten()
    everyone = torch.arange(segments.numel())
    assert torch.equal(plan.sources[real].sort().values, everyone)
    assert torch.equal(plan.sources[plan.slots], everyone) and real[plan.slots].all()


def test_a_group_wastes_less_than_half_of_its_slots():
    """A segment joins a group only when at least half as long as its longest."""
    lengths = (300, 1, 2, 90, 7, 3, 160)
    plan = plan_segments(lay_out([list(enumerate(lengths, 1))]), CPU)
    assert len(plan.sources) < 2 * 563
    assert [g.length for g in plan.groups] == [300, 90, 7, 3, 1]


def test_take_is_an_index_with_its_gradient():
    """Repeated sources count once, through their real slot: a scatter-add of masked gradients."""
    plan = plan_segments(lay_out(LAYOUTS["unequal"]), CPU)
    g = torch.Generator().manual_seed(2)
    x = torch.randn(16, 3, 2, generator=g, requires_grad=True)
    out = _Take.apply(x, plan.sources, plan.slots, None)
    assert torch.equal(out, x[plan.sources])
    grad = torch.randn(out.shape, generator=g) * plan.real
    out.backward(grad)
    assert torch.equal(x.grad, torch.zeros_like(x).index_add(0, plan.sources, grad))

    y = torch.randn(len(plan.sources), 3, 2, generator=g, requires_grad=True)
    back = _Take.apply(y, plan.slots, plan.sources, plan.real)
    assert torch.equal(back, y[plan.slots])
    grad = torch.randn(back.shape, generator=g)
    back.backward(grad)
    assert torch.equal(y.grad, torch.zeros_like(y).index_add(0, plan.slots, grad))


ROPES = {
    "default": (dict(rope_type="default"), {}),
    "linear": (dict(rope_type="linear", factor=4.0), dict(lm_rope_factor=4.0)),
    "llama3": (  # of the 8 wavelengths some are kept, some blended, some stretched
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
def test_rope_is_transformers(kind):
    parameters, fields = ROPES[kind]
    cfg = LMConfig(lm_hidden_dim=64, lm_n_heads=4, lm_re_base=5000.0, lm_rope_type=kind, **fields)
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=64,
            num_attention_heads=4,
            max_position_embeddings=4096,
            rope_parameters=parameters | {"rope_theta": 5000.0},
        )
    )
    freq = rope_frequencies(cfg)
    torch.testing.assert_close(freq, theirs.inv_freq, rtol=1e-6, atol=0)

    positions = torch.tensor([[0, 1, 2, 3, 50], [7, 8, 0, 1, 100]])
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 5, 16, generator=g), torch.randn(2, 2, 5, 16, generator=g)
    cos, sin = rope_tables(freq, positions, torch.float32)
    wanted = apply_rotary_pos_emb(q, k, *theirs(q, positions))
    found = (apply_rope(x.transpose(1, 2), cos, sin).transpose(1, 2) for x in (q, k))
    for mine, others in zip(found, wanted, strict=True):
        # Positions to 100 amplify the last bit of a frequency to 100 * 6e-8.
        torch.testing.assert_close(mine, others, rtol=0, atol=2e-5)
    if kind == "llama3":
        plain = rope_frequencies(LMConfig(lm_hidden_dim=64, lm_n_heads=4, lm_re_base=5000.0))
        ratio = plain / freq
        inside = (ratio > 1.01) & (ratio < 7.99)
        assert ratio.min() == 1 and ratio.max() == 8 and inside.any()


def test_rope_tables_are_computed_in_fp32_then_cast():
    freq, positions = rope_frequencies(LMConfig()), torch.tensor([[1999]])
    cos, _ = rope_tables(freq, positions, torch.bfloat16)
    assert torch.equal(cos, rope_tables(freq, positions, torch.float32)[0].bfloat16())


def test_cache_slots_are_positions_for_unequal_rows():
    cfg = LMConfig(lm_hidden_dim=16, lm_n_heads=2, lm_n_kv_heads=1, lm_n_blocks=2)
    cache = KVCache(cfg, 2, 8, torch.device("cpu"), torch.float32)
    g = torch.Generator().manual_seed(0)
    prompt = torch.arange(4).expand(2, 4)  # row 1 has two real tokens; slots 2 and 3 hold padding
    k0, v0 = torch.randn(2, 1, 4, 8, generator=g), torch.randn(2, 1, 4, 8, generator=g)
    assert cache.visible(prompt) is None
    k, v = cache.write(1, k0, v0, prompt)
    assert torch.equal(k, k0) and torch.equal(v, v0)
    assert not cache.k[0].any(), "another block's slots"

    positions = torch.tensor([[4], [2]])
    seen = cache.visible(positions)
    assert seen.tolist() == [[[[True] * 5]], [[[True, True, True, False, False]]]]
    k1, v1 = torch.randn(2, 1, 1, 8, generator=g), torch.randn(2, 1, 1, 8, generator=g)
    k, v = cache.write(1, k1, v1, positions)
    for new, first, later in ((k, k0, k1), (v, v0, v1)):
        assert torch.equal(new[0], torch.cat((first[0], later[0]), dim=1))
        assert torch.equal(new[1, :, :3], torch.cat((first[1, :, :2], later[1]), dim=1))

    cache.keep_rows(torch.tensor([1]))
    assert cache.visible(torch.tensor([[3]])) is None and cache.used == 4, "the longer row left"
    k2 = torch.randn(1, 1, 1, 8, generator=g)
    k, _ = cache.write(1, k2, k2, torch.tensor([[3]]))
    assert torch.equal(k[0], torch.cat((k0[1, :, :2], k1[1], k2[0]), dim=1))


@pytest.mark.parametrize("n_kv", [4, 2, 1])
def test_a_lone_query_sees_every_slot(n_kv):
    """Two rows of one length and a token more need no mask; causal would hide all but slot 0."""
    cfg = LMConfig(lm_hidden_dim=32, lm_n_heads=4, lm_n_kv_heads=n_kv, lm_n_blocks=1)
    cache = KVCache(cfg, 2, 8, torch.device("cpu"), torch.float32)
    q, k, v = (torch.randn(2, heads, 5, 8) for heads in (4, n_kv, n_kv))
    assert cache.visible(torch.arange(4).expand(2, 4)) is None
    cache.write(0, k[:, :, :4], v[:, :, :4], torch.arange(4).expand(2, 4))
    last = torch.full((2, 1), 4)
    assert cache.visible(last) is None and cache.at == slice(4, 5)
    slots = cache.write(0, k[:, :, 4:], v[:, :, 4:], last)
    whole = attention(q, k, v, causal=True)
    torch.testing.assert_close(attention(q[:, :, 4:], *slots, causal=True), whole[:, :, 4:])
    hides = torch.tensor([True, False, True, True, True])  # as where rows are of unequal length
    seen = attention(q[:, :, 4:], *slots, causal=True, visible=hides.expand(2, 1, 1, 5))
    few = (x[:, :, hides] for x in (k, v))
    torch.testing.assert_close(seen, attention(q[:, :, 4:], *few, causal=True))
    two = torch.tensor([[3, 4], [3, 4]])  # two tokens more need one, each row at the same place
    assert cache.visible(two).tolist() == [[[[True] * 4 + [False], [True] * 5]]] * 2
    slots = cache.write(0, k[:, :, 3:], v[:, :, 3:], two)
    seen = attention(q[:, :, 3:], *slots, causal=True, visible=cache.visible(two))
    torch.testing.assert_close(seen, whole[:, :, 3:])


def test_rotation_and_its_gradient_keep_the_layout():
    """A projection's output is token-major; a copy of it would cost as much as the rotation."""
    x = torch.randn(2, 5, 3, 8).requires_grad_()  # [B, T, H, C]
    cos, sin = rope_tables(torch.rand(4), torch.arange(5).expand(2, 5), torch.float32)
    out = apply_rope(x, cos, sin)
    assert out.stride() == x.stride()
    first, second = x.chunk(2, dim=-1)
    plain = x * cos + torch.cat((-second, first), dim=-1) * sin[..., 4:].repeat(1, 1, 1, 2)
    torch.testing.assert_close(out, plain)
    cotangent = torch.randn(out.shape)
    (mine,) = torch.autograd.grad(out, x, cotangent)
    (wanted,) = torch.autograd.grad(plain, x, cotangent)
    torch.testing.assert_close(mine, wanted)


def test_rows_of_a_cache_are_copied_and_replaced():
    cfg = LMConfig(lm_hidden_dim=16, lm_n_heads=2, lm_n_kv_heads=1, lm_n_blocks=2)
    device = torch.device("cpu")
    big, small = (KVCache(cfg, *shape, device, torch.float32) for shape in ((3, 8), (2, 5)))
    for cache in (big, small):
        for x in (*cache.k, *cache.v):
            x.normal_()
    before = [x.clone() for x in (*big.k, *big.v)]
    big.put(torch.tensor([2, 0]), small)
    others = *small.k, *small.v
    for now, then, other in zip((*big.k, *big.v), before, others, strict=True):
        assert torch.equal(now[[2, 0], :, :5], other)
        assert torch.equal(now[1], then[1])
        assert torch.equal(now[..., 5:, :], then[..., 5:, :])
    big.keep_rows(torch.tensor([1, 1, 0]))
    assert big.rows.tolist() == [[0], [1], [2]]
    for now, then, other in zip((*big.k, *big.v), before, others, strict=True):
        assert torch.equal(now[0], then[1]) and torch.equal(now[1], then[1])
        assert torch.equal(now[2, :, :5], other[1])


@pytest.mark.parametrize("fields", [{}, dict(vit_cls_flag=True, vit_layer_scale=True)], ids=str)
def test_recomputed_blocks_give_the_same_gradients(fields, small_model, make_sample, monkeypatch):
    """Bit for bit; and they are recomputed: every block runs twice."""
    model = small_model(**fields).train()
    ids, images = make_sample(model.cfg, 3, 20, seed=0)
    runs, found = [], []
    for block in (*model.vision_encoder.blocks, *model.decoder.blocks):
        block.register_forward_pre_hook(lambda *_: runs.append(1))
    for n_bytes in (math.inf, 0):
        monkeypatch.setattr(memory, "memory_budget", lambda device, n=n_bytes: n)
        runs.clear()
        _, loss = model(ids[None], images, targets=ids[None])
        loss.backward()
        found.append([len(runs), loss.detach(), *(p.grad.clone() for p in model.parameters())])
        model.zero_grad()
    (once, *kept), (twice, *again) = found
    assert (once, twice) == (5, 10)
    assert all(torch.equal(a, b) for a, b in zip(kept, again))
    monkeypatch.setattr(memory, "memory_budget", lambda device: 0)
    runs.clear()
    with torch.no_grad():
        model(ids[None], images)
    assert len(runs) == 5, "nothing to recompute without a backward pass"


PARTS = ("vision", "language")


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("parts", [("vision",), ("language",), PARTS], ids=str)
def test_a_part_that_is_asked_to_keeps_less_and_learns_the_same(small_config, parts, lora):
    """Packed, with every kind of dropout: losses and gradients bit for bit."""
    rates = dict(vit_dropout=0.1, vit_drop_path=0.2, lm_dropout=0.1)
    torch.manual_seed(0)
    model = VisionLanguageModel(small_config(vit_n_blocks=4, **rates)).train()
    if lora:
        pytest.importorskip("peft", reason="peft is not installed: adapters are not tested")
        adapters.attach(model, TrainConfig(lora=PARTS, freeze=("projector",)))
        build_optimizer(model.parts, TrainConfig(lora=PARTS, freeze=("projector",)))
    tile = model.cfg.tokens_per_tile
    ids = torch.randint(4, 101, (2, 60))
    ids[:, 2 : 2 + tile] = ids[:, 40 : 40 + tile] = model.cfg.vlm_image_token_id
    segments = torch.tensor([[1] * 30 + [2] * 30, [1] * 35 + [2] * 20 + [0] * 5])
    batch = dict(input_ids=ids, images=torch.randn(4, 3, 16, 16), targets=ids, segments=segments)
    batch["positions"] = torch.cat([torch.arange(30).repeat(2), torch.arange(60)]).view(2, 60)
    weights, found = {p.untyped_storage().data_ptr() for p in model.parameters()}, []
    for again in (False, True):
        for name in parts:
            model.parts[name].activation_checkpointing = again
        held = {}

        def keep(x, held=held):
            held[x.untyped_storage().data_ptr()] = x
            return x

        model.zero_grad()
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            _, loss = model(**batch)
        kept = sum(x.untyped_storage().nbytes() for at, x in held.items() if at not in weights)
        loss.backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append((kept, loss.detach(), torch.get_rng_state(), *grads))
    (whole, *first), (less, *second) = found
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) and len(first) > 20
    assert less < {("vision",): 0.85, ("language",): 0.75, PARTS: 0.4}[parts] * whole


def test_room_on_this_machine():
    assert 2**28 < memory.memory_budget(torch.device("cpu")) < 2**45
