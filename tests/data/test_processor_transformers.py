"""transformers' Idefics3Processor loads a checkpoint of picoVLM and gives the same inputs."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace

import pytest
from transformers import AutoProcessor

from configs import PRESETS, VLMConfig
from data import processor as processors
from data import text
from data.images import normalise
from data.types import Turn
from models.vision_language_model import VisionLanguageModel

SIZES = [(5, 9), (120, 30), (70, 100), (1, 300), (300, 1), (16, 16), (64, 64), (64, 16), (48, 64)]


def load_reference(cfg: VLMConfig, processor, directory):
    VisionLanguageModel(cfg).save_pretrained(directory, processor)
    return AutoProcessor.from_pretrained(directory)


@pytest.fixture(scope="module")
def tiled_reference(tiled, tmp_path_factory):
    return load_reference(tiled.cfg, tiled, tmp_path_factory.mktemp("tiled"))


@pytest.fixture(scope="module")
def tiny_reference(tiny_processor, tmp_path_factory):
    return load_reference(tiny_processor.cfg, tiny_processor, tmp_path_factory.mktemp("tiny"))


def encode_reference(reference, question: str, images: list):
    """Ids and pixel values of the prompt by transformers' processor."""
    content = [{"type": "text", "text": question}]
    content = [{"type": "image"}] * len(images) + content
    rendered = reference.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    out = reference(text=rendered, images=[images] if images else None, return_tensors="pt")
    return out["input_ids"][0].tolist(), out["pixel_values"][0] if images else None


@pytest.fixture(scope="module")
def check_sizes(noise):
    """Check ids, and pixels to 1e-6, for an image of each size; returns the tile counts."""

    def check(processor, reference, sizes: list[tuple[int, int]]) -> set[int]:
        n_tiles = set()
        for seed, size in enumerate(sizes):
            image = noise(*size, seed)
            want_ids, want_pixels = encode_reference(reference, "What is it?", [image])
            prompt = processor.encode_prompt([Turn("user", "<image>What is it?")], [image])
            assert prompt.ids.tolist() == want_ids, size
            pixels = normalise(prompt.tiles, processor.cfg)
            assert pixels.shape == want_pixels.shape, size
            assert (pixels - want_pixels).abs().max() <= 1e-6, size
            n_tiles.add(len(prompt.tiles))
        return n_tiles

    return check


def random_sizes(n: int, largest: int) -> list[tuple[int, int]]:
    rng = random.Random(0)
    return [(rng.randint(1, largest), rng.randint(1, largest)) for _ in range(n)]


def test_a_grid_expands_as_in_transformers(tiled, tiled_reference, check_sizes):
    n_tiles = check_sizes(tiled, tiled_reference, SIZES + random_sizes(200, 200))
    assert {5, 9, 13, 17} <= n_tiles  # 4 x 1 to 4 x 4 tiles and the global view


@pytest.fixture
def smolvlm(shared, tmp_path):
    """build(tile, longest): (processor, reference) with SmolLM2's tokenizer, SmolVLM's ids."""

    def build(tile: int, longest: int):
        cfg = replace(
            PRESETS["460m"].model,
            vit_img_size=tile,
            vit_patch_size=tile // 8,
            max_img_size=longest,
            lm_tokenizer=str(shared / "tokenizers" / "smollm2"),
        )
        processor = processors.build(cfg)
        processor.save(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "idefics3"}))
        return processor, AutoProcessor.from_pretrained(tmp_path)

    return build


def test_a_grid_expands_as_in_transformers_with_smolvlms_tokens(smolvlm, check_sizes):
    processor, reference = smolvlm(32, 192)
    assert processor.tokenizer.token_to_id("<row_6_col_6>") == 49188
    # 37: 6 x 6 tiles and the global view
    assert 37 in check_sizes(processor, reference, SIZES + random_sizes(200, 400))


@pytest.mark.slow
def test_a_grid_expands_as_in_transformers_at_smolvlms_size(smolvlm, check_sizes):
    """Tiles of 512, longest edge 2048, as in SmolVLM."""
    processor, reference = smolvlm(512, 2048)
    assert 17 in check_sizes(processor, reference, SIZES[:5] + random_sizes(60, 3000))


def test_one_tile_expands_as_in_transformers(tiny_processor, tiny_reference, noise):
    rng = random.Random(1)
    for seed, size in enumerate(
        SIZES + [(rng.randint(1, 99), rng.randint(1, 99)) for _ in range(9)]
    ):
        image = noise(*size, seed)
        want_ids, want_pixels = encode_reference(tiny_reference, "color?", [image])
        prompt = tiny_processor.encode_prompt([Turn("user", "<image>color?")], [image])
        assert prompt.ids.tolist() == want_ids, size
        assert (normalise(prompt.tiles, tiny_processor.cfg) - want_pixels).abs().max() <= 1e-6
        assert len(prompt.tiles) == 1 and want_ids.count(tiny_processor.cfg.vlm_image_token_id) == 9


def test_several_images_and_no_image(tiled, tiled_reference, noise):
    images = [noise(10, 10), noise(60, 20, 1), noise(20, 60, 2)]
    want_ids, want_pixels = encode_reference(tiled_reference, "Which?", images)
    prompt = tiled.encode_prompt([Turn("user", "<image><image><image>Which?")], images)
    assert prompt.ids.tolist() == want_ids
    assert (normalise(prompt.tiles, tiled.cfg) - want_pixels).abs().max() <= 1e-6
    prompt = tiled.encode_prompt([Turn("user", "Which?")])
    assert prompt.ids.tolist() == encode_reference(tiled_reference, "Which?", [])[0]
    assert prompt.tiles.shape == (0, 16, 16, 3)


@pytest.mark.parametrize("preset, size", [("222m", (300, 200)), ("460m", (700, 1200))])
def test_large_presets_match_transformers(shared, tmp_path, preset, size, noise):
    """The real tokenizer and image sizes, with a config.json but no weights."""
    cfg = replace(PRESETS[preset].model, lm_tokenizer=str(shared / "tokenizers" / "smollm2"))
    processor = processors.build(cfg)
    processor.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "idefics3"}))
    reference = AutoProcessor.from_pretrained(tmp_path)
    image = noise(*size)
    want_ids, want_pixels = encode_reference(reference, "\n\n1 déjà vu?", [image])
    prompt = processor.encode_prompt([Turn("user", "<image>\n\n1 déjà vu?")], [image])
    assert prompt.ids.tolist() == want_ids
    assert (normalise(prompt.tiles, cfg) - want_pixels).abs().max() <= 1e-6
    n_tiles = {"222m": 1, "460m": 4 * 3 + 1}[preset]
    assert len(prompt.tiles) == n_tiles
    assert want_ids.count(49190) == n_tiles * {"222m": 49, "460m": 64}[preset]


def test_the_reference_pads_on_the_left(tiled_reference, tiled):
    """With the pad token of picoVLM, which is not the end of turn."""
    out = tiled_reference(text=["a b c d e f g", "a"], padding=True, return_tensors="pt")
    assert (out["input_ids"][1][out["attention_mask"][1] == 0] == tiled.cfg.vlm_pad_token_id).all()
    assert out["attention_mask"][1].tolist() == sorted(out["attention_mask"][1].tolist())
    assert set(out) == {"input_ids", "attention_mask"}
    tokenizer = tiled_reference.tokenizer
    ids = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    cfg = tiled.cfg
    assert ids == (cfg.vlm_pad_token_id, cfg.vlm_bos_token_id, cfg.vlm_eos_token_id)
    assert len(tokenizer) == tiled.tokenizer.get_vocab_size()


# --- Files ----------------------------------------------------------------------------------------


def test_transformers_loads_the_directory_without_torchvision(tiled, tmp_path):
    """Run in a process where importing torchvision fails."""
    VisionLanguageModel(tiled.cfg).save_pretrained(tmp_path, tiled)
    code = (
        "import sys; sys.modules['torchvision'] = None\n"
        "from transformers import AutoProcessor\n"
        f"p = AutoProcessor.from_pretrained({str(tmp_path)!r})\n"
        "print(type(p).__name__, type(p.image_processor).__name__, p.image_seq_len)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert out.stdout.split() == ["Idefics3Processor", "Idefics3ImageProcessorPil", "4"], out.stderr


def test_image_settings_on_disk(tiled, tmp_path):
    """vLLM and llama.cpp read these top-level keys of preprocessor_config.json."""
    tiled.save(tmp_path)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert settings["size"] == {"longest_edge": 64}
    assert settings["max_image_size"] == {"longest_edge": 16}
    assert settings["image_mean"] == settings["image_std"] == [0.5, 0.5, 0.5]
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    template = (tmp_path / "chat_template.jinja").read_text()
    assert template == config["chat_template"] == text.CHAT_TEMPLATE
    assert json.loads((tmp_path / "chat_template.json").read_text())["chat_template"] == template
    assert json.loads((tmp_path / "processor_config.json").read_text())["image_seq_len"] == 4
