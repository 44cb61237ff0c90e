"""Pictures and words together: transformers' own processor reads our directory and agrees."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor

from configs import PRESETS, InputError, VLMConfig
from data import processor as processors
from data import text
from data.images import normalise, tile
from data.sample import Sample, Turn
from models.vision_language_model import VisionLanguageModel

TILED = VLMConfig(vit_img_size=16, vit_patch_size=4, max_img_size=64, lm_n_blocks=1, vit_n_blocks=1)
SIZES = [(5, 9), (120, 30), (70, 100), (1, 300), (300, 1), (16, 16), (64, 64), (64, 16), (48, 64)]


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def talk(*pairs: tuple[str, str], pictures=(), row: str = "row 3") -> Sample:
    turns = tuple(Turn(*t) for q, a in pairs for t in (("user", q), ("assistant", a)))
    return Sample(turns, tuple(pictures), row)


@pytest.fixture(scope="module")
def tiled():
    return processors.build(TILED)


def load_theirs(cfg: VLMConfig, ours, directory):
    VisionLanguageModel(cfg).save_pretrained(directory, ours)
    return AutoProcessor.from_pretrained(directory)


@pytest.fixture(scope="module")
def tiled_theirs(tiled, tmp_path_factory):
    return load_theirs(TILED, tiled, tmp_path_factory.mktemp("tiled"))


@pytest.fixture(scope="module")
def tiny_theirs(tiny_processor, tmp_path_factory):
    return load_theirs(tiny_processor.cfg, tiny_processor, tmp_path_factory.mktemp("tiny"))


def ask_theirs(theirs, question: str, pictures: list, tiles: bool = True):
    """The prompt as a transformers user would make it: ids and pixel values."""
    content = [{"type": "text", "text": question}]
    content = [{"type": "image"}] * len(pictures) + content
    rendered = theirs.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    out = theirs(text=rendered, images=[pictures] if pictures else None, return_tensors="pt")
    return out["input_ids"][0].tolist(), out["pixel_values"][0] if pictures else None


# --- The same as transformers -------------------------------------------------------------------


def check_sizes(ours, theirs, sizes: list[tuple[int, int]]) -> set[int]:
    """Same ids, pixels within 1e-6, for a noise picture of each size; how many tiles there were."""
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


def random_sizes(n: int, largest: int) -> list[tuple[int, int]]:
    rng = random.Random(0)
    return [(rng.randint(1, largest), rng.randint(1, largest)) for _ in range(n)]


def test_a_grid_expands_as_in_transformers(tiled, tiled_theirs):
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


def test_a_grid_expands_as_in_transformers_with_smolvlms_tokens(smolvlm):
    ours, theirs = smolvlm(32, 192)
    assert ours.tokenizer.token_to_id("<row_6_col_6>") == 49188
    assert 37 in check_sizes(ours, theirs, SIZES + random_sizes(200, 400))  # 6 x 6 and the whole


@pytest.mark.slow
def test_a_grid_expands_as_in_transformers_at_smolvlms_size(smolvlm):
    """Tiles of 512, longest edge 2048: SmolVLM's own settings."""
    ours, theirs = smolvlm(512, 2048)
    assert 17 in check_sizes(ours, theirs, SIZES[:5] + random_sizes(60, 3000))


def test_one_tile_expands_as_in_transformers(tiny_processor, tiny_theirs):
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


def test_several_pictures_and_none(tiled, tiled_theirs):
    pictures = [noise(10, 10), noise(60, 20, 1), noise(20, 60, 2)]
    want_ids, want_pixels = ask_theirs(tiled_theirs, "Which?", pictures)
    prompt = tiled.encode_prompt([Turn("user", "<image><image><image>Which?")], pictures)
    assert prompt.ids.tolist() == want_ids
    assert (normalise(prompt.tiles, tiled.cfg) - want_pixels).abs().max() <= 1e-6
    prompt = tiled.encode_prompt([Turn("user", "Which?")])
    assert prompt.ids.tolist() == ask_theirs(tiled_theirs, "Which?", [])[0]
    assert prompt.tiles.shape == (0, 16, 16, 3)


@pytest.mark.parametrize("preset, size", [("222m", (300, 200)), ("460m", (700, 1200))])
def test_large_presets_agree_too(shared, tmp_path, preset, size):
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
    assert (out["input_ids"][1][out["attention_mask"][1] == 0] == TILED.vlm_pad_token_id).all()
    assert out["attention_mask"][1].tolist() == sorted(out["attention_mask"][1].tolist())
    assert set(out) == {"input_ids", "attention_mask"}
    tokenizer = tiled_theirs.tokenizer
    ids = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert ids == (TILED.vlm_pad_token_id, TILED.vlm_bos_token_id, TILED.vlm_eos_token_id)
    assert len(tokenizer) == tiled.tokenizer.get_vocab_size()


# --- Save and load ------------------------------------------------------------------------------


def test_save_and_load_round_trip(tiled, tmp_path):
    VisionLanguageModel(TILED).save_pretrained(tmp_path, tiled)
    again = processors.load(tmp_path)
    assert again.cfg == tiled.cfg
    assert again.tokenizer.to_str() == tiled.tokenizer.to_str()
    sample = talk(("<image>\N{OWL}?", "an owl"), ("Sure?", "yes"), pictures=[noise(50, 30)])
    a, b = (p.encode(sample, 500, 20) for p in (tiled, again))
    assert a.ids.tolist() == b.ids.tolist() and a.supervised.tolist() == b.supervised.tolist()
    assert np.array_equal(a.tiles, b.tiles)
    files = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    again.save(tmp_path)
    assert files == {f.name: f.read_bytes() for f in tmp_path.iterdir()}


def test_loading_from_nowhere_or_from_a_foreign_directory(tmp_path):
    with pytest.raises(InputError, match=r"config\.json: no such file"):
        processors.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "idefics3"}')
    with pytest.raises(InputError, match="no `picovlm` key"):
        processors.load(tmp_path)


def test_transformers_reads_the_directory_without_torchvision(tiled, tmp_path):
    """In a process where torchvision cannot be imported, whatever this machine has."""
    VisionLanguageModel(TILED).save_pretrained(tmp_path, tiled)
    code = (
        "import sys; sys.modules['torchvision'] = None\n"
        "from transformers import AutoProcessor\n"
        f"p = AutoProcessor.from_pretrained({str(tmp_path)!r})\n"
        "print(type(p).__name__, type(p.image_processor).__name__, p.image_seq_len)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert out.stdout.split() == ["Idefics3Processor", "Idefics3ImageProcessorPil", "4"], out.stderr


def test_image_settings_on_disk(tiled, tmp_path):
    """What vLLM and llama.cpp read, flat, from preprocessor_config.json (INTEROP.md section 4)."""
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


# --- Training examples --------------------------------------------------------------------------


def test_the_prompt_is_a_prefix_of_the_training_ids(tiled):
    pictures = [noise(60, 20), noise(9, 9)]
    pairs = [("<image>What?", "a cat"), ("And <image>?", " a dog \n"), ("Sure?", "yes")]
    whole = tiled.encode(talk(*pairs, pictures=pictures), 2000, 99)
    turns = talk(*pairs).turns
    for n in (1, 3, 5):
        shown = pictures[: 1 + (n > 1)]
        prompt = tiled.encode_prompt(turns[:n], shown)
        assert whole.ids[: len(prompt)].tolist() == prompt.ids.tolist()
        assert not prompt.supervised.any()
        assert np.array_equal(whole.tiles[: len(prompt.tiles)], prompt.tiles)
        answer = whole.ids[len(prompt) :]
        assert whole.supervised[len(prompt)] and not whole.supervised[len(prompt) - 1]
        end = answer.tolist().index(tiled.cfg.vlm_eos_token_id)
        assert tiled.decode(answer[: end + 1]) == turns[n].text.strip()
        assert whole.supervised[len(prompt) : len(prompt) + end + 1].all()
        assert not whole.supervised[len(prompt) + end + 1]


def test_placeholders_are_tiles_times_tokens_per_tile(tiled):
    for size in SIZES:
        tokens = tiled.encode(talk(("<image>a", "b"), pictures=[noise(*size)]), 2000, 99)
        assert (tokens.ids == TILED.vlm_image_token_id).sum() == 4 * len(tokens.tiles)
        assert tokens.tiles.dtype == np.uint8 and tokens.ids.dtype == np.int32
        assert not tokens.supervised[tokens.ids == TILED.vlm_image_token_id].any()


def test_truncation_cuts_only_text_after_the_last_image(tiled):
    sample = talk(("<image>one", "two three"), ("four", "five six"), pictures=[noise(9, 9)])
    whole = tiled.encode(sample, 2000, 99)
    last = int(np.flatnonzero(whole.ids == TILED.vlm_image_token_id)[-1])
    first = int(np.flatnonzero(whole.supervised)[0])
    for length in range(1, len(whole) + 1):
        if length <= last + 1:
            with pytest.raises(InputError, match=f"row 3: its images take {last + 1} tokens"):
                tiled.encode(sample, length, 99)
        elif length <= first:
            with pytest.raises(InputError, match=f"row 3: nothing to learn .* {length} tokens"):
                tiled.encode(sample, length, 99)
        else:
            cut = tiled.encode(sample, length, 99)
            assert len(cut) == length and cut.ids.tolist() == whole.ids[:length].tolist()
            assert cut.supervised.tolist() == whole.supervised[:length].tolist()
            assert np.array_equal(cut.tiles, whole.tiles)


def test_truncation_never_drops_a_later_image(tiled):
    pictures = [noise(9, 9), noise(9, 9, 1)]
    sample = talk(("<image>a", "b " * 50), ("<image>c", "d"), pictures=pictures)
    whole = tiled.encode(sample, 2000, 99)
    placed = np.flatnonzero(whole.ids == TILED.vlm_image_token_id)
    between = int(placed[len(placed) // 2]) - 5  # the first image would fit
    with pytest.raises(InputError, match=r"raise data\.max_length or lower model\.max_img"):
        tiled.encode(sample, between, 99)


text_of = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(
    lambda s: "<" not in s
)
shapes = st.tuples(st.integers(1, 90), st.integers(1, 90))
talks = st.lists(
    st.tuples(
        st.lists(st.one_of(text_of, shapes), max_size=3),  # a user's words and pictures
        text_of.filter(str.strip),
    ),
    min_size=1,
    max_size=4,
)


@given(talk=talks, system=st.one_of(st.none(), text_of), cut=st.integers(1, 900))
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
def test_any_conversation_keeps_its_answers_and_its_pictures(tiled, talk, system, cut):
    turns, pictures = [Turn("system", system)] if system is not None else [], []
    for asked, answer in talk:
        said = "".join("<image>" if isinstance(part, tuple) else part for part in asked)
        turns += [Turn("user", said), Turn("assistant", answer)]
        pictures += [noise(*part) for part in asked if isinstance(part, tuple)]
    sample = Sample(tuple(turns), tuple(pictures), "row 3")
    whole = tiled.encode(sample, 100_000, 999)

    # Supervised is exactly what the assistant says, and its end of turn.
    supervised = whole.ids[whole.supervised]
    said = tiled.tokenizer.decode(supervised.tolist(), skip_special_tokens=False)
    assert said == "".join(f" {answer.strip()}<end_of_utterance>" for _, answer in talk)

    # Placeholders are tiles times tokens per tile, the tiles those of each picture in order.
    is_image = whole.ids == TILED.vlm_image_token_id
    assert is_image.sum() == len(whole.tiles) * TILED.tokens_per_tile
    if pictures:
        assert np.array_equal(whole.tiles, np.concatenate([tile(p, TILED)[0] for p in pictures]))

    # Cut anywhere, all pictures stay or the row is refused.
    try:
        short = tiled.encode(sample, cut, 999)
    except InputError as error:
        last = int(np.flatnonzero(is_image)[-1]) if pictures else -1
        first = int(np.flatnonzero(whole.supervised)[0])
        assert cut <= max(last + 1, first) and "row 3: " in str(error)
    else:
        assert len(short) == min(cut, len(whole)) and short.supervised.any()
        assert (short.ids == TILED.vlm_image_token_id).sum() == is_image.sum()
        assert np.array_equal(short.tiles, whole.tiles)
        assert short.ids.tolist() == whole.ids[:cut].tolist()


def test_too_many_tiles_are_refused(tiled):
    sample = talk(("<image><image>a", "b"), pictures=[noise(64, 64), noise(64, 16)])
    assert len(tiled.encode(sample, 2000, 22).tiles) == 17 + 5
    with pytest.raises(InputError, match=r"row 3: 22 tiles are more than data.max_tiles = 21"):
        tiled.encode(sample, 2000, 21)
    with pytest.raises(InputError, match="22 tiles"):
        tiled.encode_prompt(sample.turns[:1], sample.images, max_tiles=21)


def test_a_conversation_without_an_answer_teaches_nothing(tiled):
    with pytest.raises(InputError, match="row 3: nothing to learn"):
        tiled.encode(Sample((Turn("user", "hello"),), (), "row 3"), 2000, 99)


@pytest.mark.parametrize(
    "sample, message",
    [
        (talk(("<image>a", "b")), "row 3: 1 <image> placeholders for 0 images"),
        (talk(("a", "b"), pictures=[noise(4, 4)]), "row 3: 0 <image> placeholders for 1 images"),
        (talk(("a", "<image>"), pictures=[noise(4, 4)]), "row 3: an answer holds <image>"),
        (talk(("a<|im_end|>", "b")), "row 3: the text holds the special token"),
        (talk(("<image>a", "b"), pictures=["no/where.png"]), r"no/where\.png: no such file"),
    ],
)
def test_broken_samples_are_refused(tiled, sample, message):
    with pytest.raises(InputError, match=message):
        tiled.encode(sample, 2000, 99)
    if "answer" not in message:
        with pytest.raises(InputError):
            tiled.encode_prompt(sample.turns[:1], sample.images)


@pytest.mark.parametrize("lone", ["\ud800", "a\udfffb"])
def test_a_lone_surrogate_is_refused_as_input(tiled, lone):
    r"""JSON can spell half of an emoji ("\ud83d"), which no tokenizer takes."""
    with pytest.raises(InputError, match="row 3"):
        tiled.encode(talk((f"x{lone}", "b")), 2000, 99)


def test_a_prompt_longer_than_the_context_is_refused(tiled):
    short = replace(tiled, cfg=replace(TILED, lm_max_position_embeddings=100))
    fits = short.encode_prompt([Turn("user", "<image>a")], [noise(64, 16)])
    assert len(fits) < 100
    with pytest.raises(InputError, match=r"\d+ tokens, 68 of them for images.* ends at 100"):
        short.encode_prompt([Turn("user", "<image>a")], [noise(64, 64)])
    n = len(fits)
    just = replace(tiled, cfg=replace(TILED, lm_max_position_embeddings=n + 1))
    assert len(just.encode_prompt([Turn("user", "<image>a")], [noise(64, 16)])) == n
    full = replace(tiled, cfg=replace(TILED, lm_max_position_embeddings=n))
    with pytest.raises(InputError, match=f"has {n} tokens"):  # no room for one new token
        full.encode_prompt([Turn("user", "<image>a")], [noise(64, 16)])


def test_decode_drops_special_tokens_and_outer_spaces(tiled):
    ids = tiled.tokenizer.encode("<|im_start|> a cat \n<end_of_utterance>").ids
    assert tiled.decode(ids) == "a cat"
    assert tiled.decode(torch.tensor(ids)) == "a cat"
