"""Encoding of conversations with images, truncation and errors."""

from __future__ import annotations

import resource
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from config_tools import InputError
from data import processor as processors
from data.images import tile
from data.types import Sample, Turn
from models.vision_language_model import VisionLanguageModel

SQUARE = Image.new("RGB", (4, 4))


def talk(*pairs: tuple[str, str], images=(), row: str = "row 3") -> Sample:
    turns = tuple(Turn(*t) for q, a in pairs for t in (("user", q), ("assistant", a)))
    return Sample(turns, tuple(images), row)


# --- Save and load --------------------------------------------------------------------------------


def test_save_and_load_round_trip(tiled, tmp_path, noise):
    VisionLanguageModel(tiled.cfg).save_pretrained(tmp_path, tiled)
    again = processors.load(tmp_path)
    assert again.cfg == tiled.cfg
    assert again.tokenizer.to_str() == tiled.tokenizer.to_str()
    sample = talk(("<image>\N{OWL}?", "an owl"), ("Sure?", "yes"), images=[noise(50, 30)])
    a, b = (p.encode(sample, 500, 20) for p in (tiled, again))
    assert a.ids.tolist() == b.ids.tolist() and a.supervised.tolist() == b.supervised.tolist()
    assert np.array_equal(a.tiles, b.tiles)
    files = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    again.save(tmp_path)
    assert files == {f.name: f.read_bytes() for f in tmp_path.iterdir()}


def test_loading_from_a_directory_without_a_processor(tmp_path):
    with pytest.raises(InputError, match=r"config\.json: no such file"):
        processors.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "idefics3"}')
    with pytest.raises(InputError, match="no `picovlm` key"):
        processors.load(tmp_path)


# --- Training samples -----------------------------------------------------------------------------


def test_the_prompt_is_a_prefix_of_the_training_ids(tiled, noise):
    images = [noise(60, 20), noise(9, 9)]
    pairs = [("<image>What?", "a cat"), ("And <image>?", " a dog \n"), ("Sure?", "yes")]
    whole = tiled.encode(talk(*pairs, images=images), 2000, 99)
    turns = talk(*pairs).turns
    for n in (1, 3, 5):
        shown = images[: 1 + (n > 1)]
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


def test_placeholders_are_tiles_times_tokens_per_tile(tiled, noise):
    flat, high = [(120, 30), (300, 1), (64, 16)], [(5, 9), (70, 100), (1, 300), (48, 64)]
    for size in [*flat, *high, (16, 16), (64, 64)]:
        tokens = tiled.encode(talk(("<image>a", "b"), images=[noise(*size)]), 2000, 99)
        assert (tokens.ids == tiled.cfg.vlm_image_token_id).sum() == 4 * len(tokens.tiles)
        assert tokens.tiles.dtype == np.uint8 and tokens.ids.dtype == np.int32
        assert not tokens.supervised[tokens.ids == tiled.cfg.vlm_image_token_id].any()


def test_truncation_cuts_only_text_after_the_last_image(tiled, noise):
    sample = talk(("<image>one", "two three"), ("four", "five six"), images=[noise(9, 9)])
    whole = tiled.encode(sample, 2000, 99)
    last = int(np.flatnonzero(whole.ids == tiled.cfg.vlm_image_token_id)[-1])
    first = int(np.flatnonzero(whole.supervised)[0])
    for length in range(1, len(whole) + 1):
        if length <= last + 1:
            with pytest.raises(InputError, match=f"row 3: its images take {last + 1} tokens"):
                tiled.encode(sample, length, 99)
        elif length <= first:
            with pytest.raises(InputError, match=f"row 3: no supervised token .* {length} tokens"):
                tiled.encode(sample, length, 99)
        else:
            cut = tiled.encode(sample, length, 99)
            assert len(cut) == length and cut.ids.tolist() == whole.ids[:length].tolist()
            assert cut.supervised.tolist() == whole.supervised[:length].tolist()
            assert np.array_equal(cut.tiles, whole.tiles)


def test_truncation_never_drops_a_later_image(tiled, noise):
    images = [noise(9, 9), noise(9, 9, 1)]
    sample = talk(("<image>a", "b " * 50), ("<image>c", "d"), images=images)
    whole = tiled.encode(sample, 2000, 99)
    placed = np.flatnonzero(whole.ids == tiled.cfg.vlm_image_token_id)
    between = int(placed[len(placed) // 2]) - 5  # the first image would fit
    with pytest.raises(InputError, match=r"raise data\.max_length or lower model\.max_img"):
        tiled.encode(sample, between, 99)


text_of = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(
    lambda s: "<" not in s
)
shapes = st.tuples(st.integers(1, 90), st.integers(1, 90))
talks = st.lists(
    st.tuples(
        st.lists(st.one_of(text_of, shapes), max_size=3),  # text and images of a user turn
        text_of.filter(str.strip),
    ),
    min_size=1,
    max_size=4,
)


@given(talk=talks, system=st.one_of(st.none(), text_of), cut=st.integers(1, 900))
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
def test_any_conversation_keeps_its_answers_and_images(tiled, talk, system, cut, noise):
    turns, images = [Turn("system", system)] if system is not None else [], []
    for asked, answer in talk:
        question = "".join("<image>" if isinstance(part, tuple) else part for part in asked)
        turns += [Turn("user", question), Turn("assistant", answer)]
        images += [noise(*part) for part in asked if isinstance(part, tuple)]
    sample = Sample(tuple(turns), tuple(images), "row 3")
    whole = tiled.encode(sample, 100_000, 999)

    # Only the assistant's text and its end of turn are supervised.
    supervised = whole.ids[whole.supervised]
    decoded = tiled.tokenizer.decode(supervised.tolist(), skip_special_tokens=False)
    assert decoded == "".join(f" {answer.strip()}<end_of_utterance>" for _, answer in talk)

    # Placeholders: tiles x tokens per tile; tiles: those of each image in order.
    is_image = whole.ids == tiled.cfg.vlm_image_token_id
    assert is_image.sum() == len(whole.tiles) * tiled.cfg.tokens_per_tile
    if images:
        tiles = [tile(image, tiled.cfg)[0] for image in images]
        assert np.array_equal(whole.tiles, np.concatenate(tiles))

    # Truncated at any length, a row keeps all images or is an error.
    try:
        short = tiled.encode(sample, cut, 999)
    except InputError as error:
        last = int(np.flatnonzero(is_image)[-1]) if images else -1
        first = int(np.flatnonzero(whole.supervised)[0])
        assert cut <= max(last + 1, first) and "row 3: " in str(error)
    else:
        assert len(short) == min(cut, len(whole)) and short.supervised.any()
        assert (short.ids == tiled.cfg.vlm_image_token_id).sum() == is_image.sum()
        assert np.array_equal(short.tiles, whole.tiles)
        assert short.ids.tolist() == whole.ids[:cut].tolist()


def test_too_many_tiles_are_an_error(tiled, noise):
    sample = talk(("<image><image>a", "b"), images=[noise(64, 64), noise(64, 16)])
    assert len(tiled.encode(sample, 2000, 22).tiles) == 17 + 5
    with pytest.raises(InputError, match=r"row 3: 22 tiles are more than data.max_tiles = 21"):
        tiled.encode(sample, 2000, 21)
    with pytest.raises(InputError, match="22 tiles"):
        tiled.encode_prompt(sample.turns[:1], sample.images, max_tiles=21)


def test_a_conversation_without_an_answer_is_an_error(tiled):
    with pytest.raises(InputError, match="row 3: no supervised token"):
        tiled.encode(Sample((Turn("user", "hello"),), (), "row 3"), 2000, 99)


@pytest.mark.parametrize(
    "sample, message",
    [
        (talk(("<image>a", "b")), "row 3: 1 <image> placeholders for 0 images"),
        (talk(("a", "b"), images=[SQUARE]), "row 3: 0 <image> placeholders for 1 images"),
        (talk(("a", "<image>"), images=[SQUARE]), "row 3: an answer contains <image>"),
        (talk(("a<|im_end|>", "b")), "row 3: the text contains the special token"),
        (talk(("<image>a", "b"), images=["no/where.png"]), r"no/where\.png: no such file"),
    ],
)
def test_broken_samples_are_errors(tiled, sample, message):
    with pytest.raises(InputError, match=message):
        tiled.encode(sample, 2000, 99)
    if "answer" not in message:
        with pytest.raises(InputError):
            tiled.encode_prompt(sample.turns[:1], sample.images)


@pytest.mark.parametrize("lone", ["\ud800", "a\udfffb"])
def test_a_lone_surrogate_is_an_error(tiled, lone):
    r"""JSON can contain half of an emoji ("\ud83d"), which tokenizers cannot encode."""
    with pytest.raises(InputError, match="row 3"):
        tiled.encode(talk((f"x{lone}", "b")), 2000, 99)


def test_a_failed_write_of_the_tokenizer_is_an_oserror(tiled, tmp_path):
    """The tokenizers library raises a plain Exception, which callers cannot catch."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError):
            tiled.save(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_prompt_longer_than_the_context_is_an_error(tiled, noise):
    short = replace(tiled, cfg=replace(tiled.cfg, lm_max_position_embeddings=100))
    fits = short.encode_prompt([Turn("user", "<image>a")], [noise(64, 16)])
    assert len(fits) < 100
    with pytest.raises(InputError, match=r"\d+ tokens, 68 of them for images.* ends at 100"):
        short.encode_prompt([Turn("user", "<image>a")], [noise(64, 64)])
    n = len(fits)
    just = replace(tiled, cfg=replace(tiled.cfg, lm_max_position_embeddings=n + 1))
    assert len(just.encode_prompt([Turn("user", "<image>a")], [noise(64, 16)])) == n
    full = replace(tiled, cfg=replace(tiled.cfg, lm_max_position_embeddings=n))
    with pytest.raises(InputError, match=f"has {n} tokens"):  # no space for a new token
        full.encode_prompt([Turn("user", "<image>a")], [noise(64, 16)])


def test_decode_drops_special_tokens_and_surrounding_spaces(tiled):
    ids = tiled.tokenizer.encode("<|im_start|> a cat \n<end_of_utterance>").ids
    assert tiled.decode(ids) == "a cat"
    assert tiled.decode(torch.tensor(ids)) == "a cat"
