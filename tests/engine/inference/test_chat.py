"""However it is asked, alone, in pieces or among others, a model gives one answer."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from config_tools import InputError
from data.batches.packing import collate
from data.types import Sample, Turn
from engine.inference.chat import Chat, answer_text, stream_text, top_tokens
from models.inference.generate import Step
from models.inference.sampling import Sampling

GOLDEN = Path(__file__).parents[2] / "golden"
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
    prompts = [chat.encode_prompt(*asked) for asked in ASKED]
    alone = [chat(*asked, SHORT) for asked in ASKED]
    assert len({len(p) for p in prompts}) > 3 and len(set(alone)) == len(alone)
    for batch_size in (1, 2, 64):
        assert chat.generate_answers(prompts, SHORT, batch_size) == alone


def test_a_checkpoint_that_was_kept_says_what_it_said():
    """tests/golden was written on 2026-11-21 and is never written anew: it is other people's model.

    Tokens are told apart by 0.1 at least, thousands of times the noise of sums.
    """
    chat = Chat.load(GOLDEN)
    ramp = np.indices((16, 16)).sum(0).astype(np.uint8) * 8
    one, two = (Image.fromarray(np.stack((ramp, 255 - ramp, 0 * ramp + c), -1)) for c in (0, 200))
    asked = ("What is it?", [one]), ("Describe both.", [one, two]), ("Hello?", [])
    prompts = [chat.encode_prompt(*question) for question in asked]
    said = dict(chat.generate_replies(prompts, Sampling(max_new_tokens=8)))
    assert [said[i].tokens for i in range(3)] == [
        (5, 5, 610, 339, 610, 415, 150, 247),
        (518, 505, 446, 505, 534, 518, 186, 518),
        (293, 124, 558, 390, 292, 504, 331, 408),
    ]


def test_pictures_precede_a_prompt_that_does_not_place_them(chat):
    a, b = (
        chat.encode_prompt("Which?", [RED, BLUE]),
        chat.encode_prompt("<image><image>Which?", [RED, BLUE]),
    )
    assert a.ids.tolist() == b.ids.tolist()
    assert (
        chat.encode_prompt("", [RED]).ids.tolist()
        == chat.encode_prompt("<image>", [RED]).ids.tolist()
    )
    with pytest.raises(InputError, match="1 <image> placeholders for 2 images"):
        chat.encode_prompt("<image>Which?", [RED, BLUE])
    with pytest.raises(InputError, match="prompt is empty"):
        chat.encode_prompt("\n ")


def test_no_prompt_at_all_is_no_answer(chat):
    assert chat.generate_answers([], SHORT) == []


def test_half_characters_are_held_back(chat, monkeypatch):
    """The bytes of one character come as several tokens: nothing is said before it is whole."""
    text = "a Ω😀 – ü"
    ids = [i for byte in text.encode() for i in byte_tokens(chat, byte)]
    eos = chat.processor.cfg.vlm_eos_token_id
    monkeypatch.setattr("engine.inference.chat.steps", lambda *_: said([*ids, eos]))
    pieces = list(chat.stream("What?", [], SHORT))
    assert "".join(pieces) == text and "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert [p for p in pieces if p.strip()] == ["a", " Ω", "😀", " –", " ü"]


def said(ids: list[int]):
    """What a model would yield that says just this."""
    return iter([Step(torch.tensor([i]), torch.zeros(1, 4)) for i in ids])


def byte_tokens(chat: Chat, byte: int) -> list[int]:
    """The token of one byte in a byte-level vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in printable]
    char = chr(byte) if byte in printable else chr(256 + hidden.index(byte))
    return [chat.processor.tokenizer.token_to_id(char)]


def test_a_broken_end_is_said_when_the_turn_ends(chat, monkeypatch):
    ids = [byte_tokens(chat, ord("a"))[0], byte_tokens(chat, 0xCE)[0]]  # half an Ω, then the end
    eos = chat.processor.cfg.vlm_eos_token_id
    monkeypatch.setattr("engine.inference.chat.steps", lambda *_: said([*ids, eos]))
    answer = "".join(chat.stream("What?", [], SHORT))
    assert answer == chat.processor.decode(ids) == "a\N{REPLACEMENT CHARACTER}"


def test_a_broken_end_is_said_before_a_stop_string(chat):
    ids = [byte_tokens(chat, b)[0] for b in (ord("a"), 0xCE, ord("."), ord("b"))]
    pieces = list(stream_text(chat.processor, said(ids), stop=(".",)))
    assert "".join(p.text for p in pieces) == "a\N{REPLACEMENT CHARACTER}"
    assert "".join(p.text for p in pieces) == answer_text(chat.processor, ids, stop=(".",))
    assert len(pieces) == 3, "nothing is computed after the stop string"


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
    assert chat.generate_answers([tokens], SHORT) == [
        "".join(p.text for p in chat.stream_chunks(tokens, SHORT))
    ]


# --- Stop strings, log-probabilities, choices ----------------------------------------------------


def spoken(chat: Chat, monkeypatch, text: str, stop: tuple[str, ...]) -> list[str]:
    ids = [*chat.processor.tokenizer.encode(text).ids, chat.processor.cfg.vlm_eos_token_id]
    monkeypatch.setattr("engine.inference.chat.steps", lambda *_: said(ids))
    tokens = chat.encode_prompt("What?")
    return [piece.text for piece in chat.stream_chunks(tokens, SHORT, stop)]


def test_nothing_of_a_stop_string_is_said(chat, monkeypatch):
    text = " one two, then three"
    assert "".join(spoken(chat, monkeypatch, text, ())) == text.strip()
    pieces = spoken(chat, monkeypatch, text, ("two, th", "three"))
    assert "".join(pieces) == "one" and len(pieces) < 12, "and it stops there"
    # What only begins like a stop string comes late, but whole.
    assert "".join(spoken(chat, monkeypatch, text, ("two, x", "threes"))) == text.strip()


def test_stop_strings_stop_rows_of_a_batch(chat):
    prompts = [chat.encode_prompt(*asked) for asked in ASKED]
    plain = {i: r.text for i, r in chat.generate_replies(prompts, SHORT)}
    stop = plain[0][3:5]
    cut = {i: r for i, r in chat.generate_replies(prompts, SHORT, (stop,))}
    assert {i: r.text for i, r in cut.items()} == {
        i: text.split(stop)[0].rstrip() for i, text in plain.items()
    }
    assert len(cut[0].tokens) < 16


def test_logprobs_are_those_of_a_forward_pass(chat):
    tokens = chat.encode_prompt(*ASKED[0])
    ((_, reply),) = chat.generate_replies([tokens], SHORT)
    answer = torch.tensor([[*tokens.ids, *reply.tokens]])
    with torch.no_grad():
        logits, _ = chat.model(answer, chat.pixel_values(tokens))
    wanted = logits[0, len(tokens) - 1 : -1].log_softmax(-1)
    wanted = wanted.gather(1, torch.tensor(reply.tokens)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(reply.logprobs), wanted, atol=1e-4, rtol=1e-4)
    pieces = [p for p in chat.stream_chunks(tokens, SHORT) if p.token is not None]
    assert [p.token for p in pieces] == list(reply.tokens)
    (best, share), *_ = top_tokens(pieces[0].logits, 3)
    assert best == pieces[0].token and share == pytest.approx(math.exp(reply.logprobs[0]), abs=1e-4)


def test_a_choice_is_weighed_as_a_whole_answer(chat):
    """The share of each is the softmax of its loss, computed as in training."""
    tokens, choices = chat.encode_prompt(*ASKED[0]), ["yes", "no", "a cross", "yes, it"]
    losses = []
    for choice in choices:
        turns = (Turn("user", "<image>" + ASKED[0][0]), Turn("assistant", choice))
        sample = chat.processor.encode(Sample(turns, tuple(ASKED[0][1])), 256, 9)
        row = collate([[sample]], chat.processor.cfg)
        with torch.no_grad():
            _, loss = chat.model(**row.tensors(), reduction="sum")
        losses.append(loss)
    # The row ends with a newline that no model says; it carries no loss.
    wanted = torch.softmax(-torch.stack(losses), 0).tolist()
    assert chat.choice_probabilities(tokens, choices) == pytest.approx(wanted, abs=1e-5)
    assert len({round(share, 6) for share in wanted}) > 2
    with pytest.raises(InputError, match="name at least one"):
        chat.choice_probabilities(tokens, [])
