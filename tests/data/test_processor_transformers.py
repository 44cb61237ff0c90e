"""transformers' Idefics3Processor loads our checkpoint directory and gives the same inputs."""

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


def load_theirs(cfg: VLMConfig, ours, directory):
    VisionLanguageModel(cfg).save_pretrained(directory, ours)
    return AutoProcessor.from_pretrained(directory)


@pytest.fixture(scope="module")
def tiled_theirs(tiled, tmp_path_factory):
    return load_theirs(tiled.cfg, tiled, tmp_path_factory.mktemp("tiled"))


@pytest.fixture(scope="module")
def tiny_theirs(tiny_processor, tmp_path_factory):
    return load_theirs(tiny_processor.cfg, tiny_processor, tmp_path_factory.mktemp("tiny"))


def ask_theirs(theirs, question: str, pictures: list):
    """The prompt as a transformers user would make it: ids and pixel values."""
    content = [{"type": "text", "text": question}]
    content = [{"type": "image"}] * len(pictures) + content
    rendered = theirs.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    out = theirs(text=rendered, images=[pictures] if pictures else None, return_tensors="pt")
    return out["input_ids"][0].tolist(), out["pixel_values"][0] if pictures else None


@pytest.fixture(scope="module")
def check_sizes(noise):
    """Same ids, pixels within 1e-6, for a noise image of each size; how many tiles there were."""

    def check(ours, theirs, sizes: list[tuple[int, int]]) -> set[int]:
        n_tiles = set()
        for seed, size in enumerate(sizes):
            picture = noise(*size, seed)
            want_ids, want_pixels = ask_theirs(theirs, "What is it?", [picture])
            prompt = ours.encode_prompt([Turn("user", "<image>What is it?")], [picture])
            assert prompt.ids.tolist() == want_ids, size
            pixels = normalise(prompt.tiles, ours.cfg)
            assert pixels.shape == want_pixels.shape, size
            assert (pixels - want_pixels).abs().max() <= 1e-6, size
            n_tiles.add(len(prompt.tiles))
        return n_tiles

    return check


def random_sizes(n: int, largest: int) -> list[tuple[int, int]]:
    rng = random.Random(0)
    return [(rng.randint(1, largest), rng.randint(1, largest)) for _ in range(n)]


def test_a_grid_expands_as_in_transformers(tiled, tiled_theirs, check_sizes):
    n_tiles = check_sizes(tiled, tiled_theirs, SIZES + random_sizes(200, 200))
    assert {5, 9, 13, 17} <= n_tiles  # 4 x 1 to 4 x 4 tiles and the global view


@pytest.fixture
def smolvlm(shared, tmp_path):
    """(ours, theirs) with SmolLM2's tokenizer and SmolVLM's ids, for given image sizes."""

    def build(tile: int, longest: int):
        cfg = replace(
            PRESETS["460m"].model,
            vit_img_size=tile,
            vit_patch_size=tile // 8,
            max_img_size=longest,
            lm_tokenizer=str(shared / "tokenizers" / "smollm2"),
        )
        ours = processors.build(cfg)
        ours.save(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "idefics3"}))
        return ours, AutoProcessor.from_pretrained(tmp_path)

    return build


def test_a_grid_expands_as_in_transformers_with_smolvlms_tokens(smolvlm, check_sizes):
    ours, theirs = smolvlm(32, 192)
    assert ours.tokenizer.token_to_id("<row_6_col_6>") == 49188
    assert 37 in check_sizes(ours, theirs, SIZES + random_sizes(200, 400))  # 6 x 6 and the whole


@pytest.mark.slow
def test_a_grid_expands_as_in_transformers_at_smolvlms_size(smolvlm, check_sizes):
    """Tiles of 512, longest edge 2048: SmolVLM's own settings."""
    ours, theirs = smolvlm(512, 2048)
    assert 17 in check_sizes(ours, theirs, SIZES[:5] + random_sizes(60, 3000))


def test_one_tile_expands_as_in_transformers(tiny_processor, tiny_theirs, noise):
    rng = random.Random(1)
    for seed, size in enumerate(
        SIZES + [(rng.randint(1, 99), rng.randint(1, 99)) for _ in range(9)]
    ):
        picture = noise(*size, seed)
        want_ids, want_pixels = ask_theirs(tiny_theirs, "color?", [picture])
        prompt = tiny_processor.encode_prompt([Turn("user", "<image>color?")], [picture])
        assert prompt.ids.tolist() == want_ids, size
        assert (normalise(prompt.tiles, tiny_processor.cfg) - want_pixels).abs().max() <= 1e-6
        assert len(prompt.tiles) == 1 and want_ids.count(tiny_processor.cfg.vlm_image_token_id) == 9


def test_several_pictures_and_none(tiled, tiled_theirs, noise):
    pictures = [noise(10, 10), noise(60, 20, 1), noise(20, 60, 2)]
    want_ids, want_pixels = ask_theirs(tiled_theirs, "Which?", pictures)
    prompt = tiled.encode_prompt([Turn("user", "<image><image><image>Which?")], pictures)
    assert prompt.ids.tolist() == want_ids
    assert (normalise(prompt.tiles, tiled.cfg) - want_pixels).abs().max() <= 1e-6
    prompt = tiled.encode_prompt([Turn("user", "Which?")])
    assert prompt.ids.tolist() == ask_theirs(tiled_theirs, "Which?", [])[0]
    assert prompt.tiles.shape == (0, 16, 16, 3)


@pytest.mark.parametrize("preset, size", [("222m", (300, 200)), ("460m", (700, 1200))])
def test_large_presets_agree_too(shared, tmp_path, preset, size, noise):
    """The real tokenizer and image sizes; without weights, so a bare config.json."""
    cfg = replace(PRESETS[preset].model, lm_tokenizer=str(shared / "tokenizers" / "smollm2"))
    ours = processors.build(cfg)
    ours.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "idefics3"}))
    theirs = AutoProcessor.from_pretrained(tmp_path)
    picture = noise(*size)
    want_ids, want_pixels = ask_theirs(theirs, "\n\n1 déjà vu?", [picture])
    prompt = ours.encode_prompt([Turn("user", "<image>\n\n1 déjà vu?")], [picture])
    assert prompt.ids.tolist() == want_ids
    assert (normalise(prompt.tiles, cfg) - want_pixels).abs().max() <= 1e-6
    n_tiles = {"222m": 1, "460m": 4 * 3 + 1}[preset]
    assert len(prompt.tiles) == n_tiles
    assert want_ids.count(49190) == n_tiles * {"222m": 49, "460m": 64}[preset]


def test_padding_and_batches_of_theirs(tiled_theirs, tiled):
    """Left padding with our pad token, which is not the end of turn."""
    out = tiled_theirs(text=["a b c d e f g", "a"], padding=True, return_tensors="pt")
    assert (out["input_ids"][1][out["attention_mask"][1] == 0] == tiled.cfg.vlm_pad_token_id).all()
    assert out["attention_mask"][1].tolist() == sorted(out["attention_mask"][1].tolist())
    assert set(out) == {"input_ids", "attention_mask"}
    tokenizer = tiled_theirs.tokenizer
    ids = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    cfg = tiled.cfg
    assert ids == (cfg.vlm_pad_token_id, cfg.vlm_bos_token_id, cfg.vlm_eos_token_id)
    assert len(tokenizer) == tiled.tokenizer.get_vocab_size()


# --- Files ----------------------------------------------------------------------------------------


def test_transformers_reads_the_directory_without_torchvision(tiled, tmp_path):
    """In a process where torchvision cannot be imported, whatever this machine has."""
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
    """What vLLM and llama.cpp read, flat, from preprocessor_config.json."""
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
