"""Compiled blocks are the blocks, whatever the batch, and few are compiled.

What the compiler is given is run as it is, which takes none.
"""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from configs import TrainConfig, ViTConfig
from engine import adapters
from models import attention
from models.classifier import Classifier
from models.compiled import compile_blocks
from models.vision_language_model import VisionLanguageModel
from models.vision_transformer import ViT

SMALL = dict(vit_n_blocks=2, lm_n_blocks=2)


@pytest.fixture
def compiled(monkeypatch):
    """Compile a model's blocks by what only counts the graphs it is given; the counter."""
    monkeypatch.setattr(attention, "_attend_segments", attention._attend_segments)
    torch._dynamo.reset()
    counters.clear()
    graphs = []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    def compile_model(model):
        compile_blocks(model, count)
        return graphs

    yield compile_model
    torch._dynamo.reset()


def batch(cfg, seed: int, packed: bool) -> dict:
    """2 rows of some length with 1 or 2 pictures; packed: of some samples each."""
    g = torch.Generator().manual_seed(seed)
    T, n_tiles = int(torch.randint(40, 60, (), generator=g)), 1 + seed % 2
    ids = torch.randint(4, cfg.lm_vocab_size, (2, T), generator=g)
    ids[0, : n_tiles * cfg.tokens_per_tile] = cfg.vlm_image_token_id
    size = cfg.vit_img_size
    images = torch.randn(n_tiles, 3, size, size, generator=g)
    positions, segments = torch.arange(T).expand(2, T), None
    if packed:
        starts = torch.randint(0, 2, (2, T), generator=g) * (positions >= 34)
        segments = 1 + starts.cumsum(1)
        positions = positions - (positions * starts).cummax(1).values
    return dict(input_ids=ids, images=images, targets=ids.roll(-1, 1), positions=positions,
                segments=segments)  # fmt: skip


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
def test_compiled_blocks_are_the_blocks_and_few(small_config, compiled, kind, request):
    """Lengths and numbers of samples and pictures vary; after a few batches nothing is new."""
    if kind == "bounded":
        request.getfixturevalue("like_a_gpu")
    plain, made = pair(small_config)
    names = list(made.state_dict())
    graphs, so_far = compiled(made), []
    for seed in range(6):
        assert_same_step(plain, made, batch(made.cfg, seed, kind != "plain"))
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
    assert torch.equal(plain.eval().generate(ids), made.generate(ids))
    assert graphs == []


def test_adapters_and_recomputed_blocks_compile(small_config, compiled):
    pytest.importorskip("peft")
    plain, made = pair(small_config)
    for model in (plain, made):
        torch.manual_seed(0)
        adapters.attach(model, TrainConfig(lora=("vision", "language")))
        for name in ("vision", "language"):
            model.parts[name].activation_checkpointing = True
    graphs = compiled(made)
    for seed in range(3):
        assert_same_step(plain, made, batch(made.cfg, seed, True))
    assert graphs and not any("lora" in p for p, x in made.named_parameters() if x.grad is None)


def test_every_block_may_drop_another_share(compiled):
    """A rate is a constant to the compiler, so each block is compiled for itself."""
    cfg = ViTConfig(vit_img_size=16, vit_patch_size=4, vit_hidden_dim=16, vit_inter_dim=32,
                    vit_n_heads=2, vit_n_blocks=12, vit_n_classes=3, vit_drop_path=0.1)  # fmt: skip
    made = Classifier(ViT(cfg)).train()
    graphs = compiled(made)
    made(torch.randn(2, 3, 16, 16))
    assert 0 < len(graphs) <= 12
