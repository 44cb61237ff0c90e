"""Answers do not depend on streaming or batching; stop strings, log-probabilities, choices."""

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
QUESTIONS = [
    ("What color is it?", [RED]),
    ("Yes?", []),
    ("Describe both pictures, one after the other, in words.", [BLUE, RED]),
    ("<image>What color is it?", [BLUE]),
    ("Is <image> bigger than this one <image>, or not?", [RED, BLUE]),
]


@pytest.fixture(scope="module")
def chat(small_checkpoint) -> Chat:
    return Chat.load(small_checkpoint)


def test_streamed_chunks_join_to_the_answer(chat):
    for prompt, images in QUESTIONS:
        chunks = list(chat.stream(prompt, images, SHORT))
        assert 16 <= len(chunks) <= 17 and "".join(chunks) == chat(prompt, images, SHORT)


def test_batched_answers_match_single_ones(chat):
    prompts = [chat.encode_prompt(*question) for question in QUESTIONS]
    alone = [chat(*question, SHORT) for question in QUESTIONS]
    assert len({len(p) for p in prompts}) > 3 and len(set(alone)) == len(alone)
    for batch_size in (1, 2, 64):
        assert chat.generate_answers(prompts, SHORT, batch_size) == alone


def test_golden_checkpoint_gives_the_same_answers():
    """tests/golden was written on 2026-11-21 and must not be regenerated: it stands for checkpoints
    of users.

    The top two logits differ by at least 0.1, thousands of times the rounding noise.
    """
    chat = Chat.load(GOLDEN)
    ramp = np.indices((16, 16)).sum(0).astype(np.uint8) * 8
    one, two = (Image.fromarray(np.stack((ramp, 255 - ramp, 0 * ramp + c), -1)) for c in (0, 200))
    questions = ("What is it?", [one]), ("Describe both.", [one, two]), ("Hello?", [])
    prompts = [chat.encode_prompt(*question) for question in questions]
    replies = dict(chat.generate_replies(prompts, Sampling(max_new_tokens=8)))
    assert [replies[i].tokens for i in range(3)] == [
        (5, 5, 610, 339, 610, 415, 150, 247),
        (518, 505, 446, 505, 534, 518, 186, 518),
        (293, 124, 558, 390, 292, 504, 331, 408),
    ]


def test_images_come_first_in_a_prompt_without_placeholders(chat):
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


def test_no_prompts_no_answers(chat):
    assert chat.generate_answers([], SHORT) == []


def test_incomplete_characters_are_held_back(chat, monkeypatch):
    """A character may take several tokens; it is yielded when it is complete."""
    text = "a Ω😀 – ü"
    ids = [i for byte in text.encode() for i in byte_tokens(chat, byte)]
    eos = chat.processor.cfg.vlm_eos_token_id
    monkeypatch.setattr("engine.inference.chat.steps", lambda *_: fake_steps([*ids, eos]))
    chunks = list(chat.stream("What?", [], SHORT))
    assert "".join(chunks) == text and "\N{REPLACEMENT CHARACTER}" not in "".join(chunks)
    assert [p for p in chunks if p.strip()] == ["a", " Ω", "😀", " –", " ü"]


def fake_steps(ids: list[int]):
    """Steps of a model that generates `ids`."""
    return iter([Step(torch.tensor([i]), torch.zeros(1, 4)) for i in ids])


def byte_tokens(chat: Chat, byte: int) -> list[int]:
    """The token of one byte in a byte-level vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in printable]
    char = chr(byte) if byte in printable else chr(256 + hidden.index(byte))
    return [chat.processor.tokenizer.token_to_id(char)]


def test_an_incomplete_character_at_the_end_is_yielded(chat, monkeypatch):
    ids = [byte_tokens(chat, ord("a"))[0], byte_tokens(chat, 0xCE)[0]]  # half an Ω, then the end
    eos = chat.processor.cfg.vlm_eos_token_id
    monkeypatch.setattr("engine.inference.chat.steps", lambda *_: fake_steps([*ids, eos]))
    answer = "".join(chat.stream("What?", [], SHORT))
    assert answer == chat.processor.decode(ids) == "a\N{REPLACEMENT CHARACTER}"


def test_an_incomplete_character_before_a_stop_string_is_yielded(chat):
    ids = [byte_tokens(chat, b)[0] for b in (ord("a"), 0xCE, ord("."), ord("b"))]
    chunks = list(stream_text(chat.processor, fake_steps(ids), stop=(".",)))
    assert "".join(p.text for p in chunks) == "a\N{REPLACEMENT CHARACTER}"
    assert "".join(p.text for p in chunks) == answer_text(chat.processor, ids, stop=(".",))
    assert len(chunks) == 3, "nothing is generated after the stop string"


def test_a_run_folder_loads_its_newest_checkpoint(small_checkpoint, tmp_path):
    import shutil

    shutil.copytree(small_checkpoint, tmp_path / "step-000004")
    (tmp_path / "step-000004" / "state.pt").touch()
    chat, direct = Chat.load(tmp_path), Chat.load(small_checkpoint)
    assert not chat.model.training
    assert chat("What?", [RED], SHORT) == direct("What?", [RED], SHORT)


def test_prompt_of_several_turns(chat):
    turns = [Turn("user", "<image>What?"), Turn("assistant", "red"), Turn("user", "Sure?")]
    tokens = chat.processor.encode_prompt(turns, [RED])
    assert chat.generate_answers([tokens], SHORT) == [
        "".join(p.text for p in chat.stream_chunks(tokens, SHORT))
    ]


# --- Stop strings, log-probabilities, choices ----------------------------------------------------


def stream_fake_answer(chat: Chat, monkeypatch, text: str, stop: tuple[str, ...]) -> list[str]:
    ids = [*chat.processor.tokenizer.encode(text).ids, chat.processor.cfg.vlm_eos_token_id]
    monkeypatch.setattr("engine.inference.chat.steps", lambda *_: fake_steps(ids))
    tokens = chat.encode_prompt("What?")
    return [chunk.text for chunk in chat.stream_chunks(tokens, SHORT, stop)]


def test_no_part_of_a_stop_string_is_yielded(chat, monkeypatch):
    text = " one two, then three"
    assert "".join(stream_fake_answer(chat, monkeypatch, text, ())) == text.strip()
    chunks = stream_fake_answer(chat, monkeypatch, text, ("two, th", "three"))
    assert "".join(chunks) == "one" and len(chunks) < 12, "generation stops there"
    # Text that only begins like a stop string is delayed, not lost.
    chunks = stream_fake_answer(chat, monkeypatch, text, ("two, x", "threes"))
    assert "".join(chunks) == text.strip()


def test_stop_strings_in_a_batch(chat):
    prompts = [chat.encode_prompt(*question) for question in QUESTIONS]
    plain = {i: r.text for i, r in chat.generate_replies(prompts, SHORT)}
    stop = plain[0][3:5]
    cut = {i: r for i, r in chat.generate_replies(prompts, SHORT, (stop,))}
    assert {i: r.text for i, r in cut.items()} == {
        i: text.split(stop)[0].rstrip() for i, text in plain.items()
    }
    assert len(cut[0].tokens) < 16


def test_logprobs_match_a_forward_pass(chat):
    tokens = chat.encode_prompt(*QUESTIONS[0])
    ((_, reply),) = chat.generate_replies([tokens], SHORT)
    answer = torch.tensor([[*tokens.ids, *reply.tokens]])
    with torch.no_grad():
        logits, _ = chat.model(answer, chat.pixel_values(tokens))
    expected = logits[0, len(tokens) - 1 : -1].log_softmax(-1)
    expected = expected.gather(1, torch.tensor(reply.tokens)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(reply.logprobs), expected, atol=1e-4, rtol=1e-4)
    chunks = [p for p in chat.stream_chunks(tokens, SHORT) if p.token is not None]
    assert [p.token for p in chunks] == list(reply.tokens)
    (best, probability), *_ = top_tokens(chunks[0].logits, 3)
    assert best == chunks[0].token
    assert probability == pytest.approx(math.exp(reply.logprobs[0]), abs=1e-4)


def test_choice_probabilities_match_the_training_loss(chat):
    """They are the softmax of the negative losses of the complete answers."""
    tokens, choices = chat.encode_prompt(*QUESTIONS[0]), ["yes", "no", "a cross", "yes, it"]
    losses = []
    for choice in choices:
        turns = (Turn("user", "<image>" + QUESTIONS[0][0]), Turn("assistant", choice))
        sample = chat.processor.encode(Sample(turns, tuple(QUESTIONS[0][1])), 256, 9)
        row = collate([[sample]], chat.processor.cfg)
        with torch.no_grad():
            _, loss = chat.model(**row.tensors(), reduction="sum")
        losses.append(loss)
    # The newline at the end of the row is not supervised.
    expected = torch.softmax(-torch.stack(losses), 0).tolist()
    assert chat.choice_probabilities(tokens, choices) == pytest.approx(expected, abs=1e-5)
    assert len({round(p, 6) for p in expected}) > 2
    with pytest.raises(InputError, match="name at least one"):
        chat.choice_probabilities(tokens, [])
