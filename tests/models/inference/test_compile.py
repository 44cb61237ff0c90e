"""Compiled blocks and decoding steps equal eager ones, and few graphs are compiled.

Most tests use a backend that runs the traced graph eagerly, so they need no C++ compiler.
"""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch.profiler import profile

from configs import TrainConfig, ViTConfig
from engine.training import adapters
from engine.training.distributed import missing_compiler
from models.classifier import Classifier
from models.inference.compile import (
    _few_row_product,
    _uses_packed_gemm,
    compile_blocks,
    compile_decoding,
    eager_blocks,
)
from models.inference.generate import steps
from models.inference.int8 import quantize_int8
from models.inference.kv_cache import KVCache, StaticCache
from models.inference.sampling import Sampling
from models.language_model import RMSNorm
from models.vision_language_model import VisionLanguageModel
from models.vision_transformer import ViT

SMALL = dict(vit_n_blocks=2, lm_n_blocks=2)


@pytest.fixture(autouse=True)
def reset_compiler():
    """Reset the compiler before and after each test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def compile_eagerly():
    """Compile the blocks of a model with an eager backend; returns the list of its graphs."""
    counters.clear()
    graphs = []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    def compile_model(model):
        compile_blocks(model, count)
        return graphs

    return compile_model


def assert_same_step(eager, compiled, tensors: dict) -> None:
    losses = []
    for model in (eager, compiled):
        model.zero_grad()
        losses.append(model(**tensors, reduction="sum")[1])
        losses[-1].backward()
    torch.testing.assert_close(*losses)
    for (name, x), y in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        if x.requires_grad:
            torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4, msg=name)


def pair(small_config, **fields) -> list[VisionLanguageModel]:
    torch.manual_seed(0)
    one, two = (VisionLanguageModel(small_config(**SMALL, **fields)).train() for _ in range(2))
    two.load_state_dict(one.state_dict())
    return [one, two]


@pytest.mark.parametrize("kind", ["plain", "packed", "varlen"])
def test_compiled_blocks_equal_eager_ones_and_are_few(
    small_config, compile_eagerly, some_rows, kind, request
):
    """Lengths and numbers of samples and images vary; after a few batches nothing recompiles."""
    if kind == "varlen":
        request.getfixturevalue("masked_varlen")
    eager, compiled = pair(small_config)
    names = list(compiled.state_dict())
    graphs, so_far = compile_eagerly(compiled), []
    for seed in range(6):
        assert_same_step(eager, compiled, some_rows(compiled.cfg, seed, kind != "plain"))
        so_far.append(len(graphs))
    assert so_far[3] == so_far[-1]
    # Encoder and decoder blocks compile once for static and once for dynamic sizes. The input of
    # the first decoder block is a view, later ones are not. Grouped attention breaks the graph.
    assert so_far[-1] <= {"plain": 5, "packed": 16, "varlen": 8}[kind]
    assert bool(counters["graph_break"]) == (kind == "packed")
    assert list(compiled.state_dict()) == names


def test_evaluation_compiles_nothing(small_config, compile_eagerly):
    eager, compiled = pair(small_config)
    graphs = compile_eagerly(compiled.eval())
    ids = torch.arange(4, 12)[None]
    with eager_blocks(compiled):
        assert torch.equal(eager.eval().generate(ids), compiled.generate(ids))
    assert graphs == []
    compiled(ids)
    assert graphs, "outside of eager_blocks they are compiled"


def test_compiled_models_are_copied_and_saved(small_config, compile_eagerly, some_rows, tmp_path):
    """Copies and files hold the uncompiled model."""
    eager, compiled = pair(small_config)
    graphs = compile_eagerly(compiled)
    compile_decoding(compiled, lambda graph, _: graph.forward)
    torch.save(compiled, tmp_path / "model.pt")
    for other in (deepcopy(compiled), torch.load(tmp_path / "model.pt", weights_only=False)):
        n_graphs = len(graphs)
        assert other.compiled_decode is None and compiled.compiled_decode is not None
        assert_same_step(eager, other, some_rows(compiled.cfg, 1, False))
        assert len(graphs) == n_graphs


def test_adapters_and_checkpointed_blocks_compile(small_config, compile_eagerly, some_rows):
    pytest.importorskip("peft")
    eager, compiled = pair(small_config)
    for model in (eager, compiled):
        torch.manual_seed(0)
        adapters.attach_adapters(model, TrainConfig(lora=("vision", "language")))
        for name in ("vision", "language"):
            model.parts[name].activation_checkpointing = True
    graphs = compile_eagerly(compiled)
    for seed in range(3):
        assert_same_step(eager, compiled, some_rows(compiled.cfg, seed, True))
    assert graphs and not any("lora" in p for p, x in compiled.named_parameters() if x.grad is None)


def test_blocks_with_different_drop_path_rates_compile(compile_eagerly):
    """The compiler treats a rate as a constant, so each block is compiled separately."""
    cfg = ViTConfig(vit_img_size=16, vit_patch_size=4, vit_hidden_dim=16, vit_inter_dim=32,
                    vit_n_heads=2, vit_n_blocks=12, vit_n_classes=3, vit_drop_path=0.1)  # fmt: skip
    compiled = Classifier(ViT(cfg)).train()
    graphs = compile_eagerly(compiled)
    compiled(torch.randn(2, 3, 16, 16))
    assert 0 < len(graphs) <= 12


def test_gradients_of_a_compiled_norm_stay_in_fp32():
    """Backward stays in fp32, as without a compiler."""
    g = torch.Generator().manual_seed(0)
    x, cotangent = torch.randn(2, 500, 64, generator=g).unbind()
    norm = RMSNorm(64, 1e-5)
    torch.nn.init.normal_(norm.weight, 1, 0.2, generator=g)
    found = []
    for function in (norm, torch.compile(norm, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = function(leaf)
        found.append(torch.autograd.grad(out, (leaf, norm.weight), cotangent))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)  # in bf16 they would differ by 1e-3


@pytest.fixture
def decoding(small_config):
    """(model whose step is compiled with an eager backend, list of compiled graphs)."""
    graphs = []
    cfg = small_config(**SMALL, lm_tie_weights=False, lm_n_kv_heads=2)
    torch.manual_seed(0)
    model = VisionLanguageModel(cfg).eval()
    with torch.no_grad():  # no end of turn
        model.decoder.head.weight[cfg.vlm_eos_token_id] = 0
    assert compile_decoding(model, lambda graph, _: graphs.append(graph) or graph.forward) > 0
    return model, graphs


def eager_and_compiled(model, *args) -> list[list]:
    compiled_decode, model.compiled_decode = model.compiled_decode, None
    eager = list(steps(model, *args))
    model.compiled_decode = compiled_decode
    return [eager, list(steps(model, *args))]


def assert_same_answers(eager: list, compiled: list) -> None:
    for a, b in zip(eager, compiled, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        torch.testing.assert_close(a.logits, b.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_few_row_product_equals_matmul(rows):
    """In bf16 it sums in fp32 and rounds once."""
    a, b = torch.randn(rows, 48), torch.randn(20, 48).t()
    torch.testing.assert_close(_few_row_product(a, b), a @ b)
    a, b = a.bfloat16(), b.bfloat16()
    expected, found = a.float() @ b.float(), _few_row_product(a, b)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=2**-8, atol=1e-5)


def test_products_of_many_rows_keep_the_gemm():
    assert _few_row_product(torch.randn(9, 48), torch.randn(48, 20)) is NotImplemented


def test_one_graph_serves_answers_of_every_length(decoding, make_sample):
    """The graph is compiled by compile_decoding, not during the first answer."""
    model, graphs = decoding
    assert len(graphs) == 1
    for seed, (n_words, n_new) in enumerate([(3, 5), (30, 60), (9, 100)]):
        ids, images = make_sample(model.cfg, 1, n_words, seed)
        eager, compiled = eager_and_compiled(model, ids[None], images, None, Sampling(n_new))
        assert_same_answers(eager, compiled)
        assert len(compiled) == n_new and len({int(s.tokens[0]) for s in compiled}) > 2
    assert len(graphs) == 1


def test_compiled_steps_with_unequal_prompts_and_a_reused_cache(decoding, make_sample, pad_rows):
    model, graphs = decoding
    samples = [make_sample(model.cfg, 1, n, n) for n in (4, 11)]
    ids, images, mask = pad_rows(model.cfg, samples, "left")
    assert_same_answers(*eager_and_compiled(model, ids, images, mask, Sampling(9)))
    assert len(graphs) == 2  # for one row and for two

    (ids, images), (more, _) = samples[0], make_sample(model.cfg, 0, 6, 3)
    cache = KVCache(model.cfg, 1, 80, torch.device("cpu"), torch.float32)
    first = [int(s.tokens) for s in steps(model, ids[None], images, None, Sampling(9), cache)]
    whole = torch.cat((ids, torch.tensor(first), more))[None]
    # The last token was not fed to the cache.
    n_seen = len(ids) + len(first) - 1
    later = list(steps(model, whole, None, None, Sampling(9), cache, n_seen))
    eager, _ = eager_and_compiled(model, whole, images, None, Sampling(9))
    assert_same_answers(eager, later)


def test_hooks_are_called_on_compiled_models(decoding, make_sample):
    model, calls = decoding[0], []
    ids, images = make_sample(model.cfg, 1, 5, 0)
    handle = model.decoder.norm.register_forward_hook(lambda *_: calls.append(1))
    list(steps(model, ids[None], images, None, Sampling(4)))
    handle.remove()
    assert len(calls) == 4


has_bf16 = torch.cpu._is_avx512_bf16_supported()


def test_which_steps_use_the_packed_gemm(small_config, monkeypatch):
    """Steps of 5 rows or more in bf16, on CPUs with bf16 instructions, without int8 weights."""
    model = VisionLanguageModel(small_config(**SMALL, lm_hidden_dim=384))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert not _uses_packed_gemm(model, 8)
    model.bfloat16()
    assert [_uses_packed_gemm(model, n) for n in (1, 4, 5, 64)] == [False, False, True, True]
    assert not _uses_packed_gemm(VisionLanguageModel(small_config(**SMALL)).bfloat16(), 8)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert not _uses_packed_gemm(model, 8)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    quantize_int8(model.decoder)
    assert not _uses_packed_gemm(model, 8)


def test_packed_steps_trace_weights_as_constants(small_config, monkeypatch):
    """The step of one row takes them as inputs. `freezing` is not changed globally."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    model = VisionLanguageModel(small_config(**SMALL, lm_hidden_dim=384)).eval().bfloat16()
    n_inputs = []
    compile_decoding(model, lambda graph, given: n_inputs.append(len(given)) or graph.forward)
    tokens, positions = torch.arange(6), torch.full((6,), 4)
    cache = KVCache(model.cfg, 6, 9, torch.device("cpu"), torch.bfloat16)
    with torch.inference_mode():
        found = model.compiled_decode(cache, tokens, positions)(tokens, positions)
        expected = model.decode(tokens, positions, StaticCache(cache))
    torch.testing.assert_close(found, expected)
    n_weights = len(list(model.decoder.parameters()))
    assert len(n_inputs) == 2 and n_inputs[0] > n_weights > n_inputs[1]
    assert not inductor.freezing


@pytest.mark.slow
@pytest.mark.skipif(not has_bf16, reason="needs a CPU with bf16 instructions")
def test_packed_gemm_is_as_accurate_as_a_plain_one(small_config):
    """oneDNN's packed GEMM is called for 5 rows or more, and its error is that of a plain GEMM."""
    if why := missing_compiler(torch.device("cpu")):
        pytest.skip(why)
    torch.manual_seed(0)
    model = VisionLanguageModel(small_config(**SMALL, lm_hidden_dim=384)).eval().bfloat16()
    wide = deepcopy(model).float()
    compile_decoding(model)
    for n_rows, n_slots in ((5, 20), (5, 33), (2, 20), (8, 20)):
        tokens, positions = torch.arange(n_rows), torch.full((n_rows,), n_slots - 3)
        cache = KVCache(model.cfg, n_rows, n_slots, torch.device("cpu"), torch.bfloat16)
        for x in (*cache.k, *cache.v):
            x.normal_()
        fp32_cache = deepcopy(cache)
        fp32_cache.k, fp32_cache.v = ([x.float() for x in kept] for kept in (cache.k, cache.v))
        with torch.inference_mode():
            with profile() as events:
                compiled = model.compiled_decode(cache, tokens, positions)(tokens, positions)
            eager = model.decode(tokens, positions, StaticCache(cache))
            fp32 = wide.decode(tokens, positions, StaticCache(fp32_cache))
        packed_gemm = "mkldnn::_linear_pointwise"
        assert (packed_gemm in {event.key for event in events.key_averages()}) == (n_rows >= 5)
        error, eager_error = ((x.float() - fp32).norm() / fp32.norm() for x in (compiled, eager))
        assert 0 < error < max(0.01, 1.5 * eager_error)
