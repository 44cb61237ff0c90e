"""Activation checkpointing stores less and does not change the gradients."""

from __future__ import annotations

import pytest
import torch

from configs import TrainConfig
from engine.training import adapters
from engine.training.optim import build_optimizer
from models.vision_language_model import VisionLanguageModel


@pytest.mark.parametrize("fields", [{}, dict(vit_cls_flag=True, vit_layer_scale=True)], ids=str)
def test_checkpointing_gives_the_same_gradients(fields, small_model, make_sample):
    """Bit-identical, although every block runs twice."""
    model = small_model(**fields).train()
    ids, images = make_sample(model.cfg, 3, 20, seed=0)
    runs, found = [], []
    for block in (*model.vision_encoder.blocks, *model.decoder.blocks):
        block.register_forward_pre_hook(lambda *_: runs.append(1))
    for again in (False, True):
        for part in (model.vision_encoder, model.decoder):
            part.activation_checkpointing = again
        runs.clear()
        _, loss = model(ids[None], images, targets=ids[None])
        loss.backward()
        found.append([len(runs), loss.detach(), *(p.grad.clone() for p in model.parameters())])
        model.zero_grad()
    (once, *kept), (twice, *again) = found
    assert (once, twice) == (5, 10)
    assert all(torch.equal(a, b) for a, b in zip(kept, again))
    runs.clear()
    model.eval()(ids[None], images)
    assert len(runs) == 5, "evaluation recomputes nothing"


PARTS = ("vision", "language")


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("parts", [("vision",), ("language",), PARTS], ids=str)
def test_checkpointed_parts_store_less_and_train_the_same(small_config, parts, lora):
    """Packed rows with every kind of dropout: losses and gradients are bit-identical."""
    rates = dict(vit_dropout=0.1, vit_drop_path=0.2, lm_dropout=0.1)
    torch.manual_seed(0)
    model = VisionLanguageModel(small_config(vit_n_blocks=4, **rates)).train()
    if lora:
        pytest.importorskip("peft", reason="peft is not installed")
        adapters.attach_adapters(model, TrainConfig(lora=PARTS, freeze=("projector",)))
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
    (whole, *first), (checkpointed, *second) = found
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) and len(first) > 20
    assert checkpointed < {("vision",): 0.85, ("language",): 0.75, PARTS: 0.4}[parts] * whole
