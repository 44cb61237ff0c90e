"""The decoder equals transformers' Llama, Qwen2 and Qwen3; its loss equals F.cross_entropy."""

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
    lm_rms_eps=1e-3,  # large, so that a wrong one is visible
    lm_re_base=500.0,
)
LLAMA3 = dict(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
LLAMA3_FIELDS = dict(
    lm_rope_type="llama3",
    lm_rope_factor=8.0,
    lm_rope_low_freq_factor=1.0,
    lm_rope_high_freq_factor=4.0,
    lm_rope_original_max_positions=64,
)
# transformers class, LMConfig fields that differ from SIZES, fields of the transformers config.
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
        dict(lm_tie_weights=False, **LLAMA3_FIELDS),
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
    """(model, transformers' model) with the same random weights, mapped by the table."""
    kind, fields, hf_fields = CASES[case]
    cfg = LMConfig(**SIZES | fields)
    hf_sizes = dict(
        vocab_size=101,
        hidden_size=48,
        intermediate_size=72,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-3,
        rope_parameters=dict(rope_type="default", rope_theta=500.0),
        initializer_range=0.2,  # with the default 0.02 attention is nearly uniform
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    hf_cfg = getattr(transformers, f"{kind}Config")(**hf_sizes | hf_fields)
    reference = randomise(getattr(transformers, f"{kind}ForCausalLM")(hf_cfg))
    model = LanguageModel(cfg).eval()
    table = [*prefixed(llama.TABLE, "", "model."), ("head.weight", "lm_head.weight")]
    names = expand(table, {"blocks.": cfg.lm_n_blocks})
    found = import_tensors(reference.state_dict(), names, model.state_dict(), llama.IGNORE, case)
    model.load_state_dict(found)
    return model, reference


def token_ids(B: int = 2, T: int = 30) -> torch.Tensor:
    return torch.randint(101, (B, T), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_equals_transformers(case, randomise):
    model, reference = build_pair(case, randomise)
    ids = token_ids()
    expected = reference(ids).logits
    assert expected.std() > 0.5, "logits must be large compared with the tolerance"
    logits = model.logits(model(model.token_embedding(ids)))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    positions = torch.arange(30).flip(0).expand(2, -1)
    logits = model.logits(model(model.token_embedding(ids), positions))
    expected = reference(ids, position_ids=positions).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_gradients_equal_transformers(randomise):
    """With tied weights, the gradient is the sum of both uses of the matrix."""
    model, reference = build_pair("llama tied", randomise)
    ids = token_ids()
    targets = torch.cat((ids[:, 1:], torch.full((2, 1), -100)), dim=1)
    model.loss(model(model.token_embedding(ids)), targets).backward()
    reference(ids, labels=ids).loss.backward()
    for p, q in (
        (model.token_embedding.weight, reference.model.embed_tokens.weight),
        (model.blocks[0].attn.k_proj.weight, reference.model.layers[0].self_attn.k_proj.weight),
        (model.blocks[2].norm2.weight, reference.model.layers[2].post_attention_layernorm.weight),
    ):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_rms_norm_rounds_like_llama(scale):
    g = torch.Generator().manual_seed(0)
    x = (scale * torch.randn(64, 96, generator=g)).bfloat16()
    norm, reference = RMSNorm(96, 1e-5), LlamaRMSNorm(96, 1e-5)
    weight = torch.randn(96, generator=g)
    for each in (norm, reference):
        each.load_state_dict({"weight": weight})
        each.bfloat16()
    assert norm(x).dtype == torch.bfloat16
    assert torch.equal(norm(x), reference(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_gradient_equals_autograd(dtype):
    g = torch.Generator().manual_seed(0)
    norm, weight = RMSNorm(24, 1e-5), torch.nn.Parameter(torch.randn(24, generator=g))
    with torch.no_grad():
        norm.weight.copy_(weight)
    norm.to(dtype)
    x = (3 * torch.randn(2, 5, 4, 24, generator=g)).to(dtype).requires_grad_()
    reference_x = x.detach().float().requires_grad_()
    cotangent = torch.randn(x.shape, generator=g)
    norm(x).backward(cotangent.to(dtype))
    F.rms_norm(reference_x, (24,), weight, eps=1e-5).backward(cotangent)
    assert x.grad.dtype == norm.weight.grad.dtype == dtype
    tolerance = {} if dtype == torch.float32 else dict(rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(x.grad.float(), reference_x.grad, **tolerance)
    torch.testing.assert_close(norm.weight.grad.float(), weight.grad, **tolerance)
    with torch.no_grad():
        assert torch.equal(norm(x.detach()), norm(x).detach())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_equals_cross_entropy(reduction, randomise):
    model, _ = build_pair("llama", randomise)
    hidden = torch.randn(2, 30, 48, requires_grad=True)
    targets = token_ids()
    targets[0, :11], targets[1, 5::2] = -100, -100
    loss = model.loss(hidden, targets, reduction)
    grad = torch.autograd.grad(loss, (hidden, model.head.weight))
    logits = model.logits(hidden).flatten(0, 1)
    expected = F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction=reduction)
    expected_grad = torch.autograd.grad(expected, (hidden, model.head.weight))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for actual, value in zip(grad, expected_grad, strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_without_targets_is_zero(reduction):
    """F.cross_entropy returns NaN here, and one such batch would end a run."""
    model = LanguageModel(LMConfig(**SIZES))
    hidden = model(model.token_embedding(token_ids()))
    loss = model.loss(hidden, torch.full((2, 30), -100), reduction)
    assert loss.item() == 0
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and not p.grad.any(), name


class Products(TorchDispatchMode):
    """Records the output shapes of matrix products, in order."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default:
            self.shapes.append(tuple(found.shape))
        return found


@torch.no_grad()
def test_head_runs_on_supervised_tokens_only():
    model = LanguageModel(LMConfig(**SIZES))
    targets = torch.full((2, 30), -100)
    targets[0, 3], targets[1, 7:9] = 5, 6
    with Products() as products:
        model.loss(torch.randn(2, 30, 48), targets)
    assert products.shapes == [(3, 101)]


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("tied", [True, False])
def test_chunked_loss_equals_whole_loss(reduction, tied, randomise, monkeypatch):
    """Value and gradients are equal; chunks hold MAX_LOGITS logits, each computed once."""
    torch.manual_seed(0)
    model = randomise(LanguageModel(LMConfig(**SIZES, lm_tie_weights=tied)))
    targets = torch.randint(0, 101, (2, 30))
    targets[:, ::3] = -100
    start, found = torch.randn(2, 30, 48), []
    for max_logits, sizes in ((token_loss.MAX_LOGITS["cpu"], [40]), (101 * 7, 5 * [7] + [5])):
        monkeypatch.setitem(token_loss.MAX_LOGITS, "cpu", max_logits)
        hidden = start.clone().requires_grad_()
        with Products() as products:
            loss = model.loss(hidden, targets, reduction)
            loss.backward()
        assert [shape for shape in products.shapes if shape[1] == 101] == [(n, 101) for n in sizes]
        found.append((loss.detach(), hidden.grad, model.head.weight.grad.clone()))
        model.zero_grad()
    for whole, chunks in zip(*found, strict=True):
        torch.testing.assert_close(chunks, whole)
    with torch.no_grad(), Products() as products:
        torch.testing.assert_close(model.loss(start, targets, reduction), found[0][0])
    assert len(products.shapes) == 6, "no products for gradients under no_grad"


@pytest.mark.parametrize("frozen", ["head", "hidden"])
def test_loss_with_a_frozen_head_or_hidden_states(frozen, randomise):
    """Only what is trainable gets a gradient; the other product is not computed."""
    model = randomise(LanguageModel(LMConfig(**SIZES, lm_tie_weights=False)))
    model.head.requires_grad_(frozen == "hidden")
    hidden, targets = torch.randn(2, 30, 48, requires_grad=frozen == "head"), token_ids()
    with Products() as products:
        model.loss(hidden, targets).backward()
    trainable = model.head.weight if frozen == "hidden" else hidden
    expected = F.cross_entropy(model.head(hidden).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(trainable.grad, torch.autograd.grad(expected, trainable)[0])
    assert len(products.shapes) == 2


def test_loss_under_autocast_equals_loss_of_bf16_logits(randomise):
    model = randomise(LanguageModel(LMConfig(**SIZES)))
    hidden, targets = torch.randn(2, 30, 48, requires_grad=True), token_ids()
    trainable, found = (hidden, model.head.weight), []
    for loss_of in (
        lambda: model.loss(hidden, targets),
        lambda: F.cross_entropy(model.head(hidden).float().flatten(0, 1), targets.flatten()),
    ):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of()
        found.append((loss.detach(), *torch.autograd.grad(loss, trainable)))
    assert [x.dtype for x in found[0]] == 3 * [torch.float32]
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=0)
    for actual, value in zip(found[0][1:], found[1][1:], strict=True):
        error = (actual - value).norm() / value.norm()
        assert error < 0.01, "both multiply in bf16"


def test_second_backward_of_the_loss_raises():
    model = LanguageModel(LMConfig(**SIZES))
    loss = model.loss(torch.randn(2, 30, 48), token_ids())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward"):
        loss.backward()


def test_swiglu_stores_only_its_inputs(randomise):
    """The gradients are bit-identical to autograd's."""
    mlp = randomise(LanguageModelMLP(LMConfig(**SIZES)))
    x, kept, found = torch.randn(5, 48, requires_grad=True), [], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = mlp(x)
    wide = {t.data_ptr() for t in kept if t.shape == (5, 72)}
    assert len(wide) == 3, "gate, up and the input of down_proj"
    plain = mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    for out in (y, plain):
        found.append(torch.autograd.grad(out.sum(), (x, *mlp.parameters())))
    assert torch.equal(y, plain)
    for actual, value in zip(*found, strict=True):
        assert torch.equal(actual, value)
    with torch.no_grad():
        assert torch.equal(mlp(x), y)


def test_too_long_input_raises():
    model = LanguageModel(LMConfig(**SIZES))
    assert model(torch.zeros(1, 64, 48)).shape == (1, 64, 48)
    with pytest.raises(ValueError, match="65 tokens exceed lm_max_position_embeddings = 64"):
        model(torch.zeros(1, 65, 48))


def test_segments_with_a_cache_raise():
    model = LanguageModel(LMConfig(**SIZES))
    cache = KVCache(model.cfg, 1, 8, torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="segments and cache cannot be combined"):
        model(torch.zeros(1, 4, 48), segments=torch.ones(1, 4, dtype=torch.long), cache=cache)


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
    model = LanguageModel(LMConfig(**SIZES | fields))
    for name, p in model.named_parameters():
        assert p.isfinite().all(), name
        if p.ndim == 1:
            assert (p == (1.0 if name.endswith("weight") else 0.0)).all(), name
        else:
            assert p.std() > 0.005, name
    tied = model.head.weight is model.token_embedding.weight
    assert tied == fields.get("lm_tie_weights", True)


@pytest.mark.parametrize("packed", [False, True])
@torch.no_grad()
def test_dropout_is_active_in_training_only(packed):
    torch.manual_seed(0)
    model = LanguageModel(LMConfig(**SIZES, lm_dropout=0.5)).eval()
    x = torch.randn(2, 30, 48)
    segments = torch.arange(30).div(11, rounding_mode="floor").add(1).expand(2, -1)
    options = dict(segments=segments) if packed else {}
    assert torch.equal(model(x, **options), model(x, **options))
    model.train()
    assert not torch.equal(model(x, **options), model(x, **options))
    for block in model.blocks:
        block.dropout.eval()  # leaves only the dropout of attention
    assert not torch.equal(model(x, **options), model(x, **options))


@pytest.mark.parametrize("silent", ["attn", "mlp"])
@torch.no_grad()
def test_dropout_applies_to_both_branches(silent, monkeypatch):
    model = LanguageModel(LMConfig(**SIZES | dict(lm_n_blocks=1), lm_dropout=0.5)).train()
    block = model.blocks[0]
    block.attn.eval()  # no dropout inside attention, only on the branch
    branch = getattr(block, silent)
    monkeypatch.setattr(branch, "forward", lambda x, *_: torch.zeros_like(x))
    x = torch.randn(2, 30, 48)
    assert not torch.equal(model(x), model(x))
