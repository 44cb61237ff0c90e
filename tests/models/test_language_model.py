"""The decoder is transformers' Llama, Qwen2 and Qwen3; its loss is F.cross_entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import models.language_model as language_model
from configs import LMConfig
from models.inference.kv_cache import KVCache
from models.language_model import LanguageModel, LanguageModelMLP, RMSNorm
from models.ops import token_loss
from models.pretrained.layouts import llama
from models.pretrained.mapping import expand, import_tensors, prefixed

SIZES = dict(
    lm_hidden_dim=48,
    lm_inter_dim=72,
    lm_n_heads=4,
    lm_n_kv_heads=2,
    lm_n_blocks=3,
    lm_vocab_size=101,
    lm_max_position_embeddings=64,
    lm_rms_eps=1e-3,  # large, so that a wrong one shows
    lm_re_base=500.0,
)
LLAMA3 = dict(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
OUR_LLAMA3 = dict(
    lm_rope_type="llama3",
    lm_rope_factor=8.0,
    lm_rope_low_freq_factor=1.0,
    lm_rope_high_freq_factor=4.0,
    lm_rope_original_max_positions=64,
)
# Their class, the fields of ours that differ from SIZES, the fields of theirs.
CASES = {
    "llama": ("Llama", dict(lm_tie_weights=False), {}),
    "llama tied": ("Llama", dict(lm_tie_weights=True), dict(tie_word_embeddings=True)),
    "llama head_dim": (
        "Llama",
        dict(lm_tie_weights=False, lm_head_dim=20, lm_n_kv_heads=1),
        dict(head_dim=20, num_key_value_heads=1),
    ),
    "llama3 rope": (
        "Llama",
        dict(lm_tie_weights=False, **OUR_LLAMA3),
        dict(rope_parameters=dict(rope_type="llama3", rope_theta=500.0, **LLAMA3)),
    ),
    "qwen2": ("Qwen2", dict(lm_tie_weights=False, lm_qkv_bias=True), {}),
    "qwen3": (
        "Qwen3",
        dict(lm_tie_weights=False, lm_qk_norm=True, lm_head_dim=20),
        dict(head_dim=20),
    ),
    "qwen3 tied": (
        "Qwen3",
        dict(lm_tie_weights=True, lm_qk_norm=True, lm_head_dim=16),
        dict(head_dim=16, tie_word_embeddings=True),
    ),
}


def build_pair(case: str, randomise) -> tuple[LanguageModel, torch.nn.Module]:
    """(ours, theirs) with the same random weights, through the table."""
    kind, our_fields, their_fields = CASES[case]
    cfg = LMConfig(**SIZES | our_fields)
    fields = dict(
        vocab_size=101,
        hidden_size=48,
        intermediate_size=72,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-3,
        rope_parameters=dict(rope_type="default", rope_theta=500.0),
        initializer_range=0.2,  # at 0.02 attention is uniform, whatever queries and keys are
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    their_cfg = getattr(transformers, f"{kind}Config")(**fields | their_fields)
    theirs = randomise(getattr(transformers, f"{kind}ForCausalLM")(their_cfg))
    ours = LanguageModel(cfg).eval()
    table = [*prefixed(llama.TABLE, "", "model."), ("head.weight", "lm_head.weight")]
    names = expand(table, {"blocks.": cfg.lm_n_blocks})
    found = import_tensors(theirs.state_dict(), names, ours.state_dict(), llama.IGNORE, case)
    ours.load_state_dict(found)
    return ours, theirs


def token_ids(B: int = 2, T: int = 30) -> torch.Tensor:
    return torch.randint(101, (B, T), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_equals_transformers(case, randomise):
    ours, theirs = build_pair(case, randomise)
    ids = token_ids()
    wanted = theirs(ids).logits
    assert wanted.std() > 0.5, "logits large enough for the tolerance to mean something"
    logits = ours.logits(ours(ours.token_embedding(ids)))
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)
    positions = torch.arange(30).flip(0).expand(2, -1)
    logits = ours.logits(ours(ours.token_embedding(ids), positions))
    wanted = theirs(ids, position_ids=positions).logits
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)


def test_gradients_equal_transformers(randomise):
    """Tied: the shared matrix gets the sum of both of its uses."""
    ours, theirs = build_pair("llama tied", randomise)
    ids = token_ids()
    targets = torch.cat((ids[:, 1:], torch.full((2, 1), -100)), dim=1)
    ours.loss(ours(ours.token_embedding(ids)), targets).backward()
    theirs(ids, labels=ids).loss.backward()
    for mine, other in (
        (ours.token_embedding.weight, theirs.model.embed_tokens.weight),
        (ours.blocks[0].attn.k_proj.weight, theirs.model.layers[0].self_attn.k_proj.weight),
        (ours.blocks[2].norm2.weight, theirs.model.layers[2].post_attention_layernorm.weight),
    ):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_rms_norm_rounds_as_llamas(scale):
    g = torch.Generator().manual_seed(0)
    x = (scale * torch.randn(64, 96, generator=g)).bfloat16()
    ours, theirs = RMSNorm(96, 1e-5), LlamaRMSNorm(96, 1e-5)
    weight = torch.randn(96, generator=g)
    for norm in (ours, theirs):
        norm.load_state_dict({"weight": weight})
        norm.bfloat16()
    assert ours(x).dtype == torch.bfloat16
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norms_gradient_is_autograds(dtype):
    g = torch.Generator().manual_seed(0)
    norm, wide = RMSNorm(24, 1e-5), torch.nn.Parameter(torch.randn(24, generator=g))
    with torch.no_grad():
        norm.weight.copy_(wide)
    norm.to(dtype)
    x = (3 * torch.randn(2, 5, 4, 24, generator=g)).to(dtype).requires_grad_()
    like = x.detach().float().requires_grad_()
    cotangent = torch.randn(x.shape, generator=g)
    norm(x).backward(cotangent.to(dtype))
    F.rms_norm(like, (24,), wide, eps=1e-5).backward(cotangent)
    assert x.grad.dtype == norm.weight.grad.dtype == dtype
    close = {} if dtype == torch.float32 else dict(rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(x.grad.float(), like.grad, **close)
    torch.testing.assert_close(norm.weight.grad.float(), wide.grad, **close)
    with torch.no_grad():
        assert torch.equal(norm(x.detach()), norm(x).detach())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_is_cross_entropy(reduction, randomise):
    ours, _ = build_pair("llama", randomise)
    hidden = torch.randn(2, 30, 48, requires_grad=True)
    targets = token_ids()
    targets[0, :11], targets[1, 5::2] = -100, -100
    loss = ours.loss(hidden, targets, reduction)
    grad = torch.autograd.grad(loss, (hidden, ours.head.weight))
    logits = ours.logits(hidden).flatten(0, 1)
    wanted = F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction=reduction)
    wanted_grad = torch.autograd.grad(wanted, (hidden, ours.head.weight))
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
    for mine, other in zip(grad, wanted_grad, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_without_targets_is_zero(reduction):
    """F.cross_entropy's mean is NaN there, and would end a run on one empty batch."""
    ours = LanguageModel(LMConfig(**SIZES))
    hidden = ours(ours.token_embedding(token_ids()))
    loss = ours.loss(hidden, torch.full((2, 30), -100), reduction)
    assert loss.item() == 0
    loss.backward()
    for name, p in ours.named_parameters():
        assert p.grad is not None and not p.grad.any(), name


class Products(TorchDispatchMode):
    """Shapes of what matrix products make, in order."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default:
            self.shapes.append(tuple(found.shape))
        return found


@torch.no_grad()
def test_only_supervised_positions_meet_the_head():
    ours = LanguageModel(LMConfig(**SIZES))
    targets = torch.full((2, 30), -100)
    targets[0, 3], targets[1, 7:9] = 5, 6
    with Products() as met:
        ours.loss(torch.randn(2, 30, 48), targets)
    assert met.shapes == [(3, 101)]


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_loss_in_chunks_is_the_loss(reduction, tied, randomise, monkeypatch):
    """Value and gradients; at most so many logits at a time, and each computed once."""
    torch.manual_seed(0)
    ours = randomise(LanguageModel(LMConfig(**SIZES, lm_tie_weights=tied)))
    targets = torch.randint(0, 101, (2, 30))
    targets[:, ::3] = -100
    start, found = torch.randn(2, 30, 48), []
    for most, sizes in ((token_loss.MAX_LOGITS["cpu"], [40]), (101 * 7, 5 * [7] + [5])):
        monkeypatch.setitem(token_loss.MAX_LOGITS, "cpu", most)
        hidden = start.clone().requires_grad_()
        with Products() as met:
            loss = ours.loss(hidden, targets, reduction)
            loss.backward()
        assert [shape for shape in met.shapes if shape[1] == 101] == [(n, 101) for n in sizes]
        found.append((loss.detach(), hidden.grad, ours.head.weight.grad.clone()))
        ours.zero_grad()
    for whole, chunks in zip(*found, strict=True):
        torch.testing.assert_close(chunks, whole)
    with torch.no_grad(), Products() as met:
        torch.testing.assert_close(ours.loss(start, targets, reduction), found[0][0])
    assert len(met.shapes) == 6, "no gradients where nobody asks for any"


@pytest.mark.parametrize("frozen", ["head", "hidden"])
def test_the_loss_of_a_frozen_head(frozen, randomise):
    """What is not frozen gets its gradient; for what is frozen no product is made."""
    ours = randomise(LanguageModel(LMConfig(**SIZES, lm_tie_weights=False)))
    ours.head.requires_grad_(frozen == "hidden")
    hidden, targets = torch.randn(2, 30, 48, requires_grad=frozen == "head"), token_ids()
    with Products() as met:
        ours.loss(hidden, targets).backward()
    learned = ours.head.weight if frozen == "hidden" else hidden
    wanted = F.cross_entropy(ours.head(hidden).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(learned.grad, torch.autograd.grad(wanted, learned)[0])
    assert len(met.shapes) == 2


def test_the_loss_under_autocast_is_that_of_bf16_logits(randomise):
    ours = randomise(LanguageModel(LMConfig(**SIZES)))
    hidden, targets = torch.randn(2, 30, 48, requires_grad=True), token_ids()
    learned, found = (hidden, ours.head.weight), []
    for loss_of in (
        lambda: ours.loss(hidden, targets),
        lambda: F.cross_entropy(ours.head(hidden).float().flatten(0, 1), targets.flatten()),
    ):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of()
        found.append((loss.detach(), *torch.autograd.grad(loss, learned)))
    assert [x.dtype for x in found[0]] == 3 * [torch.float32]
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=0)
    for mine, other in zip(found[0][1:], found[1][1:], strict=True):
        error = (mine - other).norm() / other.norm()
        assert error < 0.01, "both round what they multiply to 8 bits"


def test_the_loss_has_one_backward_pass():
    ours = LanguageModel(LMConfig(**SIZES))
    loss = ours.loss(torch.randn(2, 30, 48), token_ids())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward"):
        loss.backward()


def test_swiglu_keeps_its_inputs_alone_and_its_gradient_is_autograds(randomise):
    """Bit for bit: the same operations in another order."""
    mlp = randomise(LanguageModelMLP(LMConfig(**SIZES)))
    x, kept, found = torch.randn(5, 48, requires_grad=True), [], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = mlp(x)
    wide = {t.data_ptr() for t in kept if t.shape == (5, 72)}
    assert len(wide) == 3, "gate, up, and what down_proj multiplies"
    plain = mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    for out in (y, plain):
        found.append(torch.autograd.grad(out.sum(), (x, *mlp.parameters())))
    assert torch.equal(y, plain)
    for mine, other in zip(*found, strict=True):
        assert torch.equal(mine, other)
    with torch.no_grad():
        assert torch.equal(mlp(x), y)


def test_too_long_is_refused():
    ours = LanguageModel(LMConfig(**SIZES))
    assert ours(torch.zeros(1, 64, 48)).shape == (1, 64, 48)
    with pytest.raises(ValueError, match="65 tokens exceed lm_max_position_embeddings = 64"):
        ours(torch.zeros(1, 65, 48))


def test_segments_and_a_cache_exclude_each_other():
    ours = LanguageModel(LMConfig(**SIZES))
    cache = KVCache(ours.cfg, 1, 8, torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="exclude"):
        ours(torch.zeros(1, 4, 48), segments=torch.ones(1, 4, dtype=torch.long), cache=cache)


@pytest.mark.parametrize(
    "fields",
    [{}, dict(lm_tie_weights=False), dict(lm_qkv_bias=True), dict(lm_qk_norm=True, lm_head_dim=20)],
    ids=str,
)
def test_every_parameter_is_initialised(fields, monkeypatch):
    original = language_model.init_weights

    def fill_with_nan_first(module, n_residual):
        for p in module.parameters():
            torch.nn.init.constant_(p, torch.nan)
        original(module, n_residual)

    monkeypatch.setattr(language_model, "init_weights", fill_with_nan_first)
    torch.manual_seed(0)
    ours = LanguageModel(LMConfig(**SIZES | fields))
    for name, p in ours.named_parameters():
        assert p.isfinite().all(), name
        if p.ndim == 1:
            assert (p == (1.0 if name.endswith("weight") else 0.0)).all(), name
        else:
            assert p.std() > 0.005, name
    tied = ours.head.weight is ours.token_embedding.weight
    assert tied == fields.get("lm_tie_weights", True)


@pytest.mark.parametrize("packed", [False, True])
@torch.no_grad()
def test_dropout_acts_in_training_only(packed):
    torch.manual_seed(0)
    ours = LanguageModel(LMConfig(**SIZES, lm_dropout=0.5)).eval()
    x = torch.randn(2, 30, 48)
    segments = torch.arange(30).div(11, rounding_mode="floor").add(1).expand(2, -1)
    options = dict(segments=segments) if packed else {}
    assert torch.equal(ours(x, **options), ours(x, **options))
    ours.train()
    assert not torch.equal(ours(x, **options), ours(x, **options))
    for block in ours.blocks:
        block.dropout.eval()  # what is left is attention's own
    assert not torch.equal(ours(x, **options), ours(x, **options))


@pytest.mark.parametrize("silent", ["attn", "mlp"])
@torch.no_grad()
def test_dropout_acts_on_both_branches(silent, monkeypatch):
    ours = LanguageModel(LMConfig(**SIZES | dict(lm_n_blocks=1), lm_dropout=0.5)).train()
    block = ours.blocks[0]
    block.attn.eval()  # its inner dropout is not what is asked about
    branch = getattr(block, silent)
    monkeypatch.setattr(branch, "forward", lambda x, *_: torch.zeros_like(x))
    x = torch.randn(2, 30, 48)
    assert not torch.equal(ours(x), ours(x))
