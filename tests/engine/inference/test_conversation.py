"""A conversation with a prefix cache gives the same answers and encodes each image once."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from config_tools import InputError
from data.types import Turn
from engine.inference.chat import Chat
from engine.inference.conversation import Conversation, cache_keys, common_prefix_length
from models.inference.sampling import Sampling

SHORT = Sampling(max_new_tokens=6)
QUESTIONS = ["What color is it?", "Sure?", "And the other one, left of it?", "How many?", "Why?"]


@pytest.fixture(scope="module")
def chat(small_checkpoint) -> Chat:
    return Chat.load(small_checkpoint)


@pytest.fixture
def image() -> Image.Image:
    return Image.effect_noise((40, 30), 90).convert("RGB")


@pytest.fixture
def passes(chat, monkeypatch) -> list[tuple[int, int]]:
    """(number of tiles, number of tokens) of every forward pass."""
    passes, embed = [], type(chat.model).embed

    def counted(self, ids, images):
        passes.append((0 if images is None else len(images), ids.numel()))
        return embed(self, ids, images)

    monkeypatch.setattr(type(chat.model), "embed", counted)
    return passes


def ask(conversation: Conversation, prompt: str, images=(), sampling=SHORT, stop=()) -> str:
    return "".join(p.text for p in conversation.ask(prompt, images, sampling, stop))


def ask_uncached(conversation: Conversation, prompt: str, images=()) -> str:
    """Answer without a cache: encode and run the whole conversation."""
    chat, turns = conversation.chat, list(conversation.turns)
    turns.append(Turn("user", "<image>" * len(images) + prompt))
    tokens = chat.processor.encode_prompt(turns, [*conversation.images, *images])
    return chat.generate_answers([tokens], SHORT)[0]


def test_five_turns_encode_the_image_once(chat, image, passes):
    conversation, answers = Conversation(chat), []
    for i, question in enumerate(QUESTIONS):
        images = [image] if i == 0 else []
        expected = ask_uncached(conversation, question, images)
        passes.clear()
        answers.append(ask(conversation, question, images))
        assert answers[-1] == expected
        assert passes[0][0] == (1 if i == 0 else 0)
        assert i == 0 or passes[0][1] < 40, "only new tokens are run"
    assert len(set(answers)) > 2, "the test needs different answers"


def test_cost_of_later_turns_does_not_depend_on_the_number_of_images(chat, passes):
    runs = []
    for n in (1, 4):
        images = [Image.effect_noise((30, 20 + i), 90).convert("RGB") for i in range(n)]
        conversation = Conversation(chat)
        ask(conversation, "What?", images)
        passes.clear()
        ask(conversation, "Sure?")
        runs.append(passes[0])
    # The question with its role tokens, and up to six answer tokens that encode differently.
    assert all(n_tiles == 0 and n_tokens < 20 for n_tiles, n_tokens in runs), runs


def test_images_in_later_turns(chat, image):
    conversation = Conversation(chat)
    other = Image.new("RGB", (50, 50), "blue")
    for question, images in (("Hello?", []), ("What?", [image]), ("And?", [other]), ("So?", [])):
        assert ask_uncached(conversation, question, images) == ask(conversation, question, images)
    with pytest.raises(InputError, match="1 <image> placeholders for 0 images"):
        ask(conversation, "<image>?")


def test_the_same_image_is_not_encoded_again_after_a_reset(chat, image, passes):
    conversation = Conversation(chat)
    first = ask(conversation, QUESTIONS[0], [image])
    ask(conversation, QUESTIONS[1])
    conversation.reset()
    passes.clear()
    assert ask(conversation, QUESTIONS[0], [image]) == first and passes[0][0] == 0
    conversation.reset()
    passes.clear()
    other = Image.new("RGB", (40, 30), "blue")
    expected = ask_uncached(conversation, QUESTIONS[0], [other])
    assert ask(conversation, QUESTIONS[0], [other]) == expected
    assert any(n == 1 for n, _ in passes), "another image is encoded"


def test_repetition_penalty_applies_to_cached_tokens(chat, image):
    """Tokens of earlier turns count as repeated."""
    sampling = Sampling(max_new_tokens=6, repetition_penalty=2.0)
    conversation = Conversation(chat)
    for i, question in enumerate(QUESTIONS):
        images = [image] if i == 0 else []
        turns = [*conversation.turns, Turn("user", "<image>" * len(images) + question)]
        tokens = chat.processor.encode_prompt(turns, [*conversation.images, *images])
        expected = chat.generate_answers([tokens], sampling)[0]
        assert ask(conversation, question, images, sampling) == expected


def test_an_interrupted_answer_is_kept_in_the_conversation(chat, image):
    conversation = Conversation(chat)
    chunks = conversation.ask("Describe it.", [image], Sampling(max_new_tokens=30))
    text = "".join(next(chunks).text for _ in range(4))
    chunks.close()
    assert conversation.turns[-1] == Turn("assistant", text)
    assert ask_uncached(conversation, "Go on.") == ask(conversation, "Go on.")


def test_a_stop_string_ends_the_turn(chat, image):
    conversation = Conversation(chat)
    plain = ask(conversation, "What?", [image])
    conversation.reset()
    pairs = (plain[i : i + 2] for i in range(1, len(plain)))
    stop = next(pair for pair in pairs if pair.isascii() and not pair.isspace())
    assert ask(conversation, "What?", [image], stop=(stop,)) == plain.split(stop)[0].rstrip()
    assert ask_uncached(conversation, "And?") == ask(conversation, "And?")


def test_an_error_does_not_change_the_conversation(chat, image):
    conversation = Conversation(chat)
    ask(conversation, "What?", [image])
    turns, keys = list(conversation.turns), list(conversation.keys)
    with pytest.raises(InputError, match="the model's context ends at 256"):
        ask(conversation, "word " * 120)
    with pytest.raises(InputError, match=r"lost\.png"):
        ask(conversation, "And this?", ["lost.png"])
    assert conversation.turns == turns and len(conversation.keys) == len(keys)
    assert ask_uncached(conversation, "And?") == ask(conversation, "And?")


def test_cache_keys_distinguish_tiles(chat):
    red, blue = Image.new("RGB", (9, 9), "red"), Image.new("RGB", (9, 9), "blue")
    cfg = chat.processor.cfg
    a, b, c = (
        cache_keys(chat.encode_prompt("Which is it?", images), cfg)
        for images in ([red, blue], [red, red], [red, blue])
    )
    per_tile = cfg.tokens_per_tile
    assert (a == c).all() and common_prefix_length(a, b) == int(
        torch.tensor(a < 0).nonzero()[per_tile]
    )
    assert common_prefix_length(a, a[:5]) == 5 and (a < 0).sum() == 2 * per_tile
