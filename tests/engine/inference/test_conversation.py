"""A conversation says what the whole of it asked anew would, and encodes each picture once."""

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
def picture() -> Image.Image:
    return Image.effect_noise((40, 30), 90).convert("RGB")


@pytest.fixture
def seen(chat, monkeypatch) -> list[tuple[int, int]]:
    """(tiles encoded, tokens run) of every pass of the model."""
    passes, embed = [], type(chat.model).embed

    def counted(self, ids, images):
        passes.append((0 if images is None else len(images), ids.numel()))
        return embed(self, ids, images)

    monkeypatch.setattr(type(chat.model), "embed", counted)
    return passes


def say(conversation: Conversation, prompt: str, images=(), sampling=SHORT, stop=()) -> str:
    return "".join(p.text for p in conversation.ask(prompt, images, sampling, stop))


def anew(conversation: Conversation, prompt: str, images=()) -> str:
    """The naive way: everything said so far, encoded and run again."""
    chat, turns = conversation.chat, list(conversation.turns)
    turns.append(Turn("user", "<image>" * len(images) + prompt))
    tokens = chat.processor.encode_prompt(turns, [*conversation.images, *images])
    return chat.generate_answers([tokens], SHORT)[0]


def test_five_turns_encode_the_picture_once(chat, picture, seen):
    conversation, answers = Conversation(chat), []
    for i, question in enumerate(QUESTIONS):
        images = [picture] if i == 0 else []
        wanted = anew(conversation, question, images)
        seen.clear()
        answers.append(say(conversation, question, images))
        assert answers[-1] == wanted
        assert seen[0][0] == (1 if i == 0 else 0)
        assert i == 0 or seen[0][1] < 40, "only what is new runs"
    assert len(set(answers)) > 2, "a model that always says the same would prove nothing"


def test_later_turns_do_not_grow_with_the_pictures(chat, seen):
    runs = []
    for n in (1, 4):
        pictures = [Image.effect_noise((30, 20 + i), 90).convert("RGB") for i in range(n)]
        conversation = Conversation(chat)
        say(conversation, "What?", pictures)
        seen.clear()
        say(conversation, "Sure?")
        runs.append(seen[0])
    # Question and speakers, and up to six tokens of an answer that text spells differently.
    assert all(n_tiles == 0 and n_tokens < 20 for n_tiles, n_tokens in runs), runs


def test_pictures_may_come_later(chat, picture):
    conversation = Conversation(chat)
    other = Image.new("RGB", (50, 50), "blue")
    for question, images in (("Hello?", []), ("What?", [picture]), ("And?", [other]), ("So?", [])):
        assert anew(conversation, question, images) == say(conversation, question, images)
    with pytest.raises(InputError, match="1 <image> placeholders for 0 images"):
        say(conversation, "<image>?")


def test_after_a_reset_the_same_picture_is_not_encoded_again(chat, picture, seen):
    conversation = Conversation(chat)
    first = say(conversation, QUESTIONS[0], [picture])
    say(conversation, QUESTIONS[1])
    conversation.reset()
    seen.clear()
    assert say(conversation, QUESTIONS[0], [picture]) == first and seen[0][0] == 0
    conversation.reset()
    seen.clear()
    other = Image.new("RGB", (40, 30), "blue")
    assert anew(conversation, QUESTIONS[0], [other]) == say(conversation, QUESTIONS[0], [other])
    assert seen[-2][0] == 1 or any(n == 1 for n, _ in seen), "another picture is"


def test_a_penalty_counts_what_was_cached(chat, picture):
    """Words that an earlier turn said are repeated words."""
    sampling = Sampling(max_new_tokens=6, repetition_penalty=2.0)
    conversation = Conversation(chat)
    for i, question in enumerate(QUESTIONS):
        images = [picture] if i == 0 else []
        turns = [*conversation.turns, Turn("user", "<image>" * len(images) + question)]
        tokens = chat.processor.encode_prompt(turns, [*conversation.images, *images])
        wanted = chat.generate_answers([tokens], sampling)[0]
        assert say(conversation, question, images, sampling) == wanted


def test_an_answer_cut_short_is_what_was_said(chat, picture):
    conversation = Conversation(chat)
    pieces = conversation.ask("Describe it.", [picture], Sampling(max_new_tokens=30))
    heard = "".join(next(pieces).text for _ in range(4))
    pieces.close()
    assert conversation.turns[-1] == Turn("assistant", heard)
    assert anew(conversation, "Go on.") == say(conversation, "Go on.")


def test_a_stop_string_ends_the_turn(chat, picture):
    conversation = Conversation(chat)
    plain = say(conversation, "What?", [picture])
    conversation.reset()
    pairs = (plain[i : i + 2] for i in range(1, len(plain)))
    stop = next(pair for pair in pairs if pair.isascii() and not pair.isspace())
    assert say(conversation, "What?", [picture], stop=(stop,)) == plain.split(stop)[0].rstrip()
    assert anew(conversation, "And?") == say(conversation, "And?")


def test_an_error_leaves_it_as_it_was(chat, picture):
    conversation = Conversation(chat)
    say(conversation, "What?", [picture])
    turns, said = list(conversation.turns), list(conversation.keys)
    with pytest.raises(InputError, match="the model's context ends at 256"):
        say(conversation, "word " * 120)
    with pytest.raises(InputError, match=r"lost\.png"):
        say(conversation, "And this?", ["lost.png"])
    assert conversation.turns == turns and len(conversation.keys) == len(said)
    assert anew(conversation, "And?") == say(conversation, "And?")


def test_identities_tell_tiles_apart(chat):
    red, blue = Image.new("RGB", (9, 9), "red"), Image.new("RGB", (9, 9), "blue")
    cfg = chat.processor.cfg
    a, b, c = (
        cache_keys(chat.encode_prompt("Which is it?", pictures), cfg)
        for pictures in ([red, blue], [red, red], [red, blue])
    )
    per_tile = cfg.tokens_per_tile
    assert (a == c).all() and common_prefix_length(a, b) == int(
        torch.tensor(a < 0).nonzero()[per_tile]
    )
    assert common_prefix_length(a, a[:5]) == 5 and (a < 0).sum() == 2 * per_tile
