"""Compiled blocks are the blocks, whatever the batch, and few are compiled; so is a token's step.

What the compiler is given is run as it is, which takes none.
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
def nothing_compiled():
    """Neither before a test nor after it."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def compiled():
    """Compile a model's blocks by what only counts the graphs it is given; the counter."""
    counters.clear()
    graphs = []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    def compile_model(model):
        compile_blocks(model, count)
        return graphs

    return compile_model


def assert_same_step(plain, made, tensors: dict) -> None:
    losses = []
    for model in (plain, made):
        model.zero_grad()
        losses.append(model(**tensors, reduction="sum")[1])
        losses[-1].backward()
    torch.testing.assert_close(*losses)
    for (name, x), y in zip(plain.named_parameters(), made.parameters(), strict=True):
        if x.requires_grad:
            torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4, msg=name)


def pair(small_config, **fields) -> list[VisionLanguageModel]:
    torch.manual_seed(0)
    one, two = (VisionLanguageModel(small_config(**SMALL, **fields)).train() for _ in range(2))
    two.load_state_dict(one.state_dict())
    return [one, two]


@pytest.mark.parametrize("kind", ["plain", "packed", "bounded"])
def test_compiled_blocks_are_the_blocks_and_few(small_config, compiled, some_rows, kind, request):
    """Lengths and numbers of samples and pictures vary; after a few batches nothing is new."""
    if kind == "bounded":
        request.getfixturevalue("like_a_gpu")
    plain, made = pair(small_config)
    names = list(made.state_dict())
    graphs, so_far = compiled(made), []
    for seed in range(6):
        assert_same_step(plain, made, some_rows(made.cfg, seed, kind != "plain"))
        so_far.append(len(graphs))
    assert so_far[3] == so_far[-1]
    # One of pictures and one of words, of fixed sizes, then of any; words before the first block
    # are a view, after it not. Samples in groups are attended between graphs.
    assert so_far[-1] <= {"plain": 5, "packed": 16, "bounded": 8}[kind]
    assert bool(counters["graph_break"]) == (kind == "packed")
    assert list(made.state_dict()) == names


def test_evaluation_compiles_nothing(small_config, compiled):
    plain, made = pair(small_config)
    graphs = compiled(made.eval())
    ids = torch.arange(4, 12)[None]
    with eager_blocks(made):
        assert torch.equal(plain.eval().generate(ids), made.generate(ids))
    assert graphs == []
    made(ids)
    assert graphs, "outside of it they are compiled"


def test_compiled_models_are_copied_and_saved(small_config, compiled, some_rows, tmp_path):
    """A copy and a file hold the model as it was before it was compiled."""
    plain, made = pair(small_config)
    graphs = compiled(made)
    compile_decoding(made, lambda graph, _: graph.forward)
    torch.save(made, tmp_path / "model.pt")
    for other in (deepcopy(made), torch.load(tmp_path / "model.pt", weights_only=False)):
        n_graphs = len(graphs)
        assert other.compiled_decode is None and made.compiled_decode is not None
        assert_same_step(plain, other, some_rows(made.cfg, 1, False))
        assert len(graphs) == n_graphs


def test_adapters_and_recomputed_blocks_compile(small_config, compiled, some_rows):
    pytest.importorskip("peft")
    plain, made = pair(small_config)
    for model in (plain, made):
        torch.manual_seed(0)
        adapters.attach_adapters(model, TrainConfig(lora=("vision", "language")))
        for name in ("vision", "language"):
            model.parts[name].activation_checkpointing = True
    graphs = compiled(made)
    for seed in range(3):
        assert_same_step(plain, made, some_rows(made.cfg, seed, True))
    assert graphs and not any("lora" in p for p, x in made.named_parameters() if x.grad is None)


def test_every_block_may_drop_another_share(compiled):
    """A rate is a constant to the compiler, so each block is compiled for itself."""
    cfg = ViTConfig(vit_img_size=16, vit_patch_size=4, vit_hidden_dim=16, vit_inter_dim=32,
                    vit_n_heads=2, vit_n_blocks=12, vit_n_classes=3, vit_drop_path=0.1)  # fmt: skip
    made = Classifier(ViT(cfg)).train()
    graphs = compiled(made)
    made(torch.randn(2, 3, 16, 16))
    assert 0 < len(graphs) <= 12


def test_a_compiled_norm_keeps_its_gradients_from_autocast():
    """What goes back through it stays in fp32, as without a compiler."""
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
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)  # rounded to bf16: 1e-3 off


@pytest.fixture
def decoding(small_config):
    """A model whose step is what the compiler is given, run as it is; the graphs it was given."""
    graphs = []
    cfg = small_config(**SMALL, lm_tie_weights=False, lm_n_kv_heads=2)
    torch.manual_seed(0)
    model = VisionLanguageModel(cfg).eval()
    with torch.no_grad():  # it never stops
        model.decoder.head.weight[cfg.vlm_eos_token_id] = 0
    assert compile_decoding(model, lambda graph, _: graphs.append(graph) or graph.forward) > 0
    return model, graphs


def both_ways(model, *args) -> list[list]:
    made, model.compiled_decode = model.compiled_decode, None
    plain = list(steps(model, *args))
    model.compiled_decode = made
    return [plain, list(steps(model, *args))]


def assert_said_the_same(plain: list, made: list) -> None:
    for a, b in zip(plain, made, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        torch.testing.assert_close(a.logits, b.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_a_few_row_product_in_loops_is_the_few_row_product(rows):
    """In bf16 it sums in fp32, and rounds once."""
    a, b = torch.randn(rows, 48), torch.randn(20, 48).t()
    torch.testing.assert_close(_few_row_product(a, b), a @ b)
    a, b = a.bfloat16(), b.bfloat16()
    wanted, found = a.float() @ b.float(), _few_row_product(a, b)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, rtol=2**-8, atol=1e-5)


def test_few_row_products_of_many_rows_stay_as_they_are():
    assert _few_row_product(torch.randn(9, 48), torch.randn(48, 20)) is NotImplemented


def test_one_step_is_compiled_for_answers_of_every_length(decoding, make_sample):
    """When it is asked for, not in the middle of the first answer."""
    model, graphs = decoding
    assert len(graphs) == 1
    for seed, (n_words, n_new) in enumerate([(3, 5), (30, 60), (9, 100)]):
        ids, images = make_sample(model.cfg, 1, n_words, seed)
        plain, made = both_ways(model, ids[None], images, None, Sampling(n_new))
        assert_said_the_same(plain, made)
        assert len(made) == n_new and len({int(s.tokens[0]) for s in made}) > 2
    assert len(graphs) == 1


def test_rows_of_unequal_prompts_and_a_cache_that_goes_on(decoding, make_sample, pad_rows):
    model, graphs = decoding
    samples = [make_sample(model.cfg, 1, n, n) for n in (4, 11)]
    ids, images, mask = pad_rows(model.cfg, samples, "left")
    assert_said_the_same(*both_ways(model, ids, images, mask, Sampling(9)))
    assert len(graphs) == 2  # of one row, of two

    (ids, images), (more, _) = samples[0], make_sample(model.cfg, 0, 6, 3)
    cache = KVCache(model.cfg, 1, 80, torch.device("cpu"), torch.float32)
    first = [int(s.tokens) for s in steps(model, ids[None], images, None, Sampling(9), cache)]
    whole = torch.cat((ids, torch.tensor(first), more))[None]
    # The last token was not fed: it opens what the cache has not seen.
    n_seen = len(ids) + len(first) - 1
    later = list(steps(model, whole, None, None, Sampling(9), cache, n_seen))
    plain, _ = both_ways(model, whole, images, None, Sampling(9))
    assert_said_the_same(plain, later)


def test_who_listens_hears_every_compiled_step_too(decoding, make_sample):
    model, heard = decoding[0], []
    ids, images = make_sample(model.cfg, 1, 5, 0)
    handle = model.decoder.norm.register_forward_hook(lambda *_: heard.append(1))
    list(steps(model, ids[None], images, None, Sampling(4)))
    handle.remove()
    assert len(heard) == 4


has_bf16 = torch.cpu._is_avx512_bf16_supported()


def test_which_steps_take_packed_matrices(small_config, monkeypatch):
    """Of some rows in bf16 where there is arithmetic for it; 8 bits would be made wide."""
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


def test_a_step_that_packs_is_traced_with_matrices_as_constants(small_config, monkeypatch):
    """Where the step of one row took them as inputs; and the setting is that step's alone."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    model = VisionLanguageModel(small_config(**SMALL, lm_hidden_dim=384)).eval().bfloat16()
    n_inputs = []
    compile_decoding(model, lambda graph, given: n_inputs.append(len(given)) or graph.forward)
    tokens, positions = torch.arange(6), torch.full((6,), 4)
    cache = KVCache(model.cfg, 6, 9, torch.device("cpu"), torch.bfloat16)
    with torch.inference_mode():
        found = model.compiled_decode(cache, tokens, positions)(tokens, positions)
        wanted = model.decode(tokens, positions, StaticCache(cache))
    torch.testing.assert_close(found, wanted)
    n_weights = len(list(model.decoder.parameters()))
    assert len(n_inputs) == 2 and n_inputs[0] > n_weights > n_inputs[1]
    assert not inductor.freezing


@pytest.mark.slow
@pytest.mark.skipif(not has_bf16, reason="needs a processor with bf16 arithmetic")
def test_packed_matrices_are_as_near_to_fp32_as_plain_ones(small_config):
    """And are what is multiplied: oneDNN is called, for caches of every length, but not by few."""
    if why := missing_compiler(torch.device("cpu")):
        pytest.skip(why)
    torch.manual_seed(0)
    narrow = VisionLanguageModel(small_config(**SMALL, lm_hidden_dim=384)).eval().bfloat16()
    wide = deepcopy(narrow).float()
    compile_decoding(narrow)
    for n_rows, n_slots in ((5, 20), (5, 33), (2, 20), (8, 20)):
        tokens, positions = torch.arange(n_rows), torch.full((n_rows,), n_slots - 3)
        cache = KVCache(narrow.cfg, n_rows, n_slots, torch.device("cpu"), torch.bfloat16)
        for x in (*cache.k, *cache.v):
            x.normal_()
        in_fp32 = deepcopy(cache)
        in_fp32.k, in_fp32.v = ([x.float() for x in kept] for kept in (cache.k, cache.v))
        with torch.inference_mode():
            with profile() as seen:
                made = narrow.compiled_decode(cache, tokens, positions)(tokens, positions)
            plain = narrow.decode(tokens, positions, StaticCache(cache))
            right = wide.decode(tokens, positions, StaticCache(in_fp32))
        of_packed = "mkldnn::_linear_pointwise"
        assert (of_packed in {event.key for event in seen.key_averages()}) == (n_rows >= 5)
        off, as_plain = ((x.float() - right).norm() / right.norm() for x in (made, plain))
        assert 0 < off < max(0.01, 1.5 * as_plain)
