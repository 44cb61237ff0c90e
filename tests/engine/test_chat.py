"""However it is asked, alone, in pieces or among others, a model gives one answer."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from configs import InputError
from data.sample import Turn
from engine.chat import Chat
from models.generation import Sampling

SHORT = Sampling(max_new_tokens=16)
RED, BLUE = Image.new("RGB", (40, 30), "red"), Image.new("RGB", (20, 60), "blue")
ASKED = [
    ("What color is it?", [RED]),
    ("Yes?", []),
    ("Describe both pictures, one after the other, in words.", [BLUE, RED]),
    ("<image>What color is it?", [BLUE]),
    ("Is <image> bigger than this one <image>, or not?", [RED, BLUE]),
]


@pytest.fixture(scope="module")
def chat(small_checkpoint) -> Chat:
    return Chat.load(small_checkpoint)


def test_pieces_join_to_the_answer(chat):
    for prompt, images in ASKED:
        pieces = list(chat.stream(prompt, images, SHORT))
        assert 16 <= len(pieces) <= 17 and "".join(pieces) == chat(prompt, images, SHORT)


def test_answers_among_others_are_those_alone(chat):
    prompts = [chat.prompt(*asked) for asked in ASKED]
    alone = [chat(*asked, SHORT) for asked in ASKED]
    assert len({len(p) for p in prompts}) > 3 and len(set(alone)) == len(alone)
    for batch_size in (1, 2, 64):
        assert chat.answers(prompts, SHORT, batch_size) == alone


def test_pictures_precede_a_prompt_that_does_not_place_them(chat):
    a, b = chat.prompt("Which?", [RED, BLUE]), chat.prompt("<image><image>Which?", [RED, BLUE])
    assert a.ids.tolist() == b.ids.tolist()
    assert chat.prompt("", [RED]).ids.tolist() == chat.prompt("<image>", [RED]).ids.tolist()
    with pytest.raises(InputError, match="1 <image> placeholders for 2 images"):
        chat.prompt("<image>Which?", [RED, BLUE])
    with pytest.raises(InputError, match="prompt is empty"):
        chat.prompt("\n ")


def test_no_prompt_at_all_is_no_answer(chat):
    assert chat.answers([], SHORT) == []


def test_half_characters_are_held_back(chat, monkeypatch):
    """The bytes of one character come as several tokens: nothing is said before it is whole."""
    text = "a Ω😀 – ü"
    ids = [i for byte in text.encode() for i in byte_tokens(chat, byte)]
    eos = chat.processor.cfg.vlm_eos_token_id
    fake = iter([torch.tensor([i]) for i in [*ids, eos]])
    monkeypatch.setattr(type(chat.model), "stream", lambda *_: fake)
    pieces = list(chat.stream("What?", [], SHORT))
    assert "".join(pieces) == text and "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert [p for p in pieces if p.strip()] == ["a", " Ω", "😀", " –", " ü"]


def byte_tokens(chat: Chat, byte: int) -> list[int]:
    """The token of one byte in a byte-level vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in printable]
    char = chr(byte) if byte in printable else chr(256 + hidden.index(byte))
    return [chat.processor.tokenizer.token_to_id(char)]


def test_a_broken_end_is_said_when_the_turn_ends(chat, monkeypatch):
    ids = [byte_tokens(chat, ord("a"))[0], byte_tokens(chat, 0xCE)[0]]  # half an Ω, then the end
    fake = [torch.tensor([i]) for i in [*ids, chat.processor.cfg.vlm_eos_token_id]]
    monkeypatch.setattr(type(chat.model), "stream", lambda *_: iter(fake))
    said = "".join(chat.stream("What?", [], SHORT))
    assert said == chat.processor.decode(ids) == "a\N{REPLACEMENT CHARACTER}"


def test_it_answers_from_the_newest_checkpoint_of_a_run(small_checkpoint, tmp_path):
    import shutil

    shutil.copytree(small_checkpoint, tmp_path / "step-000004")
    (tmp_path / "step-000004" / "state.pt").touch()
    chat, direct = Chat.load(tmp_path), Chat.load(small_checkpoint)
    assert not chat.model.training
    assert chat("What?", [RED], SHORT) == direct("What?", [RED], SHORT)


def test_turns_of_a_longer_conversation_are_answered(chat):
    turns = [Turn("user", "<image>What?"), Turn("assistant", "red"), Turn("user", "Sure?")]
    tokens = chat.processor.encode_prompt(turns, [RED])
    assert chat.answers([tokens], SHORT) == ["".join(chat.stream_tokens(tokens, SHORT))]
