"""LoRA: only adapters train, merging keeps the logits, and transformers loads them with peft."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from config_tools import InputError, read_json
from configs import TrainConfig
from engine.inference.chat import Chat
from engine.training import adapters
from models.vision_language_model import VisionLanguageModel
from train import main

peft = pytest.importorskip("peft")
ALL = dict(lora=("vision", "projector", "language"), lora_r=4, lora_alpha=12.0)


def randomise_adapters(model: VisionLanguageModel, seed: int = 1) -> None:
    """Set random adapter weights; new adapters add zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))


@pytest.fixture
def inputs(small_config, make_sample):
    cfg = small_config()
    ids, images = make_sample(cfg, 2, 9, 0)
    return {"input_ids": ids[None], "images": images}


@pytest.mark.parametrize("parts", [("language",), ("vision", "projector", "language")])
def test_merging_keeps_the_logits_and_new_adapters_add_zero(small_model, inputs, parts):
    model = small_model()
    before, _ = model(**inputs)
    freeze = tuple({"vision", "language"} - set(parts))
    cfg = TrainConfig(**ALL | {"lora": parts}, freeze=freeze)
    adapters.attach_adapters(model, cfg)
    with torch.no_grad():
        fresh, _ = model(**inputs)
        plain = adapters.merge(model)
        assert torch.equal(plain(**inputs)[0], before), "merging zero changes nothing"
        randomise_adapters(model)
        adapted, _ = model(**inputs)
        merged, _ = adapters.merge(model)(**inputs)
    assert torch.equal(fresh, before)
    assert (adapted - before).abs().max() > 0.05
    torch.testing.assert_close(merged, adapted, rtol=1e-5, atol=1e-5)


def test_target_modules(small_model):
    model = small_model()
    cfg = TrainConfig(lora=("language",), lora_targets=("q_proj", "v_proj"), freeze=("vision",))
    names = adapters.target_modules(model, cfg)
    assert names == [f"decoder.blocks.{i}.attn.{n}_proj" for i in range(3) for n in "qv"]
    everything = adapters.target_modules(model, TrainConfig(**ALL))
    assert len(everything) == 7 * 3 + 6 * 2 + 1 and "decoder.head" not in everything
    with pytest.raises(InputError, match=r"no linear layer in vision matches; it has .*out_proj"):
        adapters.target_modules(model, TrainConfig(lora=("vision",), lora_targets=("gate",)))
    with pytest.raises(InputError, match=r"vision would train in full.*--train\.freeze"):
        adapters.attach_adapters(model, TrainConfig(lora=("language",)))
    with pytest.raises(InputError, match="a frozen part trains no adapters"):
        TrainConfig(lora=("language",), freeze=("language", "vision"))


def test_a_run_with_adapters_resumes_exactly(run_file, small_checkpoint, stop_after):
    """Also: the base model is unchanged, and checkpoints hold the merged model."""
    flags = ["--train.init-from", str(small_checkpoint), "--train.lora", "language",
             "--train.freeze", "vision", "--train.lora-r", "2"]  # fmt: skip
    whole, parts = (run_file(n, steps=4, save_every=2) for n in ("whole", "parts"))
    main([str(whole), *flags])
    stop_after(2)
    main([str(parts), *flags])
    main([str(parts), *flags, "--train.resume", "auto"])
    one, two = (Path(read_json(c)["train"]["out"]) for c in (whole, parts))
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        files = (run / "step-000004" / name for run in (one, two))
        assert next(files).read_bytes() == next(files).read_bytes()
    with pytest.raises(InputError, match=r"lora_A.* does not match the adapters of this run"):
        main([str(parts), *flags[:-1], "4", "--train.resume", "auto"])
    given = VisionLanguageModel.from_pretrained(small_checkpoint).state_dict()
    base = VisionLanguageModel.from_pretrained(two / "base")
    assert [n for n, t in base.state_dict().items() if not torch.equal(t, given[n])] == []
    cfg = TrainConfig(lora=("language",), lora_r=2, freeze=("vision",))
    adapters.attach_adapters(base, cfg)
    for p in base.vision_encoder.parameters():
        p.requires_grad_(False)
    base.MP.requires_grad_(True)
    adapters.load_adapter(base, two / "step-000004")
    moved = adapters.merge(base).state_dict()
    merged = Chat.load(two).model.state_dict()
    assert [n for n, t in merged.items() if not torch.equal(t, moved[n])] == []
    changed = {n for n, t in merged.items() if not torch.equal(t, given[n])}
    assert changed == {n.replace(".lora_A", "") for n in adapters.trainable_tensors(base)
                       if "lora_B" not in n}  # fmt: skip
    state = torch.load(two / "step-000004" / "state.pt", weights_only=True)["optimizer"]
    n_state = sum(len(s["state"]) for s in state)
    assert n_state == len(adapters.trainable_tensors(base)), "frozen tensors have none"


@pytest.mark.parametrize("with_projector", [False, True])
def test_transformers_and_peft_open_the_adapter(
    small_checkpoint, tmp_path, tiny_processor, with_projector
):
    """transformers' Idefics3 with peft gives the same logits on the exported base model."""
    import transformers as hf

    chat = Chat.load(small_checkpoint)
    model = chat.model.float()
    parts = ("vision", "language") if with_projector else ALL["lora"]
    cfg = TrainConfig(**ALL | {"lora": parts}, out=str(tmp_path))
    (tmp_path / "base").mkdir()
    model.save_pretrained(tmp_path / "base", replace(tiny_processor, cfg=model.cfg))
    adapters.attach_adapters(model, cfg)
    randomise_adapters(model)
    if with_projector:  # it trains in full
        model.MP.requires_grad_(True)
        with torch.no_grad():
            model.MP.proj.weight.add_(0.05)
    adapters.save_adapter(model, cfg, tmp_path)
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (saved["peft_type"], saved["r"], saved["lora_alpha"]) == ("LORA", 4, 12.0)

    tokens = chat.encode_prompt("What is it?", [noise_image()])
    from data.batches.packing import collate_prompts

    ids, mask, images = collate_prompts([tokens], model.cfg)
    reference = hf.AutoModelForImageTextToText.from_pretrained(tmp_path / "base").eval()
    call = dict(input_ids=ids, attention_mask=mask, pixel_values=images[None])
    with torch.no_grad():
        base = reference(**call).logits
        reference = peft.PeftModel.from_pretrained(reference, tmp_path / "adapter").eval()
        expected = reference(**call).logits
        logits, _ = model(ids, images, mask)
    assert (expected - base).abs().max() > 0.1
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def noise_image():
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
