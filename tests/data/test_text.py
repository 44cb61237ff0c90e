"""Ids encoded turn by turn equal those of the chat template on the whole conversation."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from config_tools import InputError
from configs import PRESETS, VLMConfig
from data import text
from data.types import Turn
from data.world import questions

U, A, S = "user", "assistant", "system"
CONVERSATIONS = [
    [(U, "<image>What is it?"), (A, "a cat")],
    [
        (U, "What is it?<image>"),
        (A, "a cat"),
        (U, "And here <image>, or <image>?"),
        (A, "42 dogs!"),
    ],
    [(S, "Be brief."), (U, "  hi\n"), (A, " \n hello  there "), (U, "1+1?"), (A, "2")],
    [(U, "no answer yet")],
    [(U, ""), (A, "")],
    [(U, "<image>"), (A, "7"), (A, "two answers in a row"), (U, "x"), (U, "y"), (A, "\n\nz\n\n")],
    [(U, "<image><image> both?"), (A, ":-) \N{SMILING FACE WITH SUNGLASSES} déjà vu 漢字 ١٢")],
    [(A, "the assistant begins"), (U, "so?"), (A, "'s answer")],
]


@pytest.fixture(scope="module", params=["tiny", "smollm2"])
def pair(request):
    """(tokenizer, config) of the presets tiny and 222m."""
    if request.param == "tiny":
        cfg = PRESETS["tiny"].model
        tokenizer = text.world_tokenizer(cfg.lm_vocab_size)
    else:
        shared = request.getfixturevalue("shared")
        cfg = replace(PRESETS["222m"].model, lm_tokenizer=str(shared / "tokenizers" / "smollm2"))
        tokenizer = text.load_tokenizer(cfg.lm_tokenizer)
    return text.add_special_tokens(tokenizer, cfg), cfg


@pytest.fixture(scope="module")
def reference(pair, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    pair[0].save(str(path))
    return PreTrainedTokenizerFast(tokenizer_file=str(path), chat_template=text.CHAT_TEMPLATE)


def as_strings(turns):
    return [{"role": role, "content": content.strip()} for role, content in turns]


def as_parts(turns):
    """Each `<image>` is a separate part, as in transformers."""
    messages = []
    for role, content in turns:
        parts = []
        for i, words in enumerate(content.strip().split(text.IMAGE)):
            parts += [{"type": "image"}] if i else []
            parts += [{"type": "text", "text": words}] if words else []
        messages.append({"role": role, "content": parts or [{"type": "text", "text": ""}]})
    return messages


def encode(tokenizer, turns, strings=None):
    n_images = sum(content.count(text.IMAGE) for _, content in turns)
    turns = [Turn(*turn) for turn in turns]
    runs = text.format_turns(turns, strings or [text.IMAGE] * n_images)
    ids, supervised = text.encode_spans(tokenizer, runs)
    return ids.tolist(), supervised.tolist()


def expected_supervised(tokenizer, turns):
    """The supervised text, computed without the code under test."""
    return [f" {content.strip()}{text.END_OF_TURN}" for role, content in turns if role == A]


def spans(ids, supervised):
    """Runs of supervised ids, split after every end of turn."""
    runs, run = [], []
    for i, (token, wanted) in enumerate(zip(ids, supervised)):
        if wanted:
            run.append(token)
        if run and (not wanted or i == len(ids) - 1):
            runs.append(run)
            run = []
    return runs


@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_ids_equal_those_of_the_chat_template(pair, reference, turns):
    ids, supervised = encode(pair[0], turns)
    for messages in (as_strings(turns), as_parts(turns)):
        rendered = reference.apply_chat_template(messages, tokenize=False)
        assert ids == reference(rendered, add_special_tokens=False)["input_ids"]
        assert ids == reference.apply_chat_template(messages, return_dict=False)
    decoded = [pair[0].decode(run, skip_special_tokens=False) for run in spans(ids, supervised)]
    assert decoded == expected_supervised(pair[0], turns)


def test_the_template_matches_smolvlm(pair, reference):
    """Expected text written by hand, with the generation prompt."""
    turns = [(S, "Be kind."), (U, "<image>Hi?"), (A, "Yes."), (U, "Why <image>")]
    want = (
        "<|im_start|>System: Be kind.<end_of_utterance>\nUser:<image>Hi?<end_of_utterance>\n"
        "Assistant: Yes.<end_of_utterance>\nUser: Why <image><end_of_utterance>\nAssistant:"
    )
    for messages in (as_strings(turns), as_parts(turns)):
        got = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert got == want


def test_image_strings_are_replaced_in_order(pair, reference):
    turns = [(U, "<image>a<image>"), (A, "b"), (U, "c <image> d"), (A, "e")]
    strings = [text.image_string(2, 1, 3), text.image_string(0, 0, 3), text.image_string(1, 2, 3)]
    ids, supervised = encode(pair[0], turns, strings)
    whole = reference.apply_chat_template(as_strings(turns), tokenize=False)
    for string in strings:
        whole = whole.replace(text.IMAGE, "\0" + string.replace(text.IMAGE, "\1"), 1)
    whole = whole.replace("\0", "").replace("\1", text.IMAGE)
    assert ids == reference(whole, add_special_tokens=False)["input_ids"]
    assert ids.count(pair[1].vlm_image_token_id) == 3 * (3 + 1 + 3)
    assert sum(supervised) == len(pair[0].encode(" b").ids) + len(pair[0].encode(" e").ids) + 2


def test_image_string_by_hand():
    tile, fake = "<image><image>", "<fake_token_around_image>"
    assert text.image_string(0, 0, 2) == f"{fake}<global-img>{tile}{fake}"
    assert text.image_string(2, 2, 2) == (
        f"{fake}<row_1_col_1>{tile}{fake}<row_1_col_2>{tile}\n"
        f"{fake}<row_2_col_1>{tile}{fake}<row_2_col_2>{tile}\n"
        f"\n{fake}<global-img>{tile}{fake}"
    )


# --- Any conversation ---------------------------------------------------------------------------

SPECIAL = {text.START, text.PAD, text.END_OF_TURN, text.FAKE, text.GLOBAL, *text.ROWS_COLS}
# SmolLM2 has no token for these bytes (control characters, planes 4 and up): it drops them.
LOST = {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2}
# Surrogates cannot be encoded as UTF-8 at all; test_processor tests them.
words = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
    st.text(alphabet=" \n\t:.'12aé\u00a0\u2028\x1c\u200b<>|", max_size=12),
    st.sampled_from(
        ["", " ", "\n", "Assistant: x", "User:", "'s", "  two", "9 9", "<", "<row", "\r\n"]
    ),
).filter(lambda s: not any(token in s for token in SPECIAL | {text.IMAGE, "<|"}))
user = st.lists(st.one_of(words, st.just(text.IMAGE)), max_size=5).map("".join)
conversations = st.lists(
    st.one_of(
        st.tuples(st.just(U), user), st.tuples(st.just(A), words), st.tuples(st.just(S), words)
    ),
    min_size=1,
    max_size=6,
)


@given(turns=conversations)
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_any_conversation_has_the_ids_of_its_rendered_text(pair, reference, turns):
    tokenizer = pair[0]
    n_images = sum(content.count(text.IMAGE) for _, content in turns)
    text.check_turns([Turn(*turn) for turn in turns], n_images, tokenizer, "row")
    ids, supervised = encode(tokenizer, turns)
    rendered = reference.apply_chat_template(as_strings(turns), tokenize=False)
    assert ids == tokenizer.encode(rendered, add_special_tokens=False).ids
    decoded = [tokenizer.decode(run, skip_special_tokens=False) for run in spans(ids, supervised)]
    lossy = pair[1].lm_tokenizer != "world" and LOST & set("".join(t for _, t in turns).encode())
    if not lossy:
        assert decoded == expected_supervised(tokenizer, turns)


# --- Errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "token", ["<|im_start|>", "<end_of_utterance>", "<row_1_col_1>", "<|im_end|>"]
)
@pytest.mark.parametrize("role", [U, A, S])
def test_special_tokens_in_text_are_an_error(pair, token, role):
    with pytest.raises(InputError, match=r"row 7: .*special token") as caught:
        text.check_turns([Turn(role, f"say {token}!")], 0, pair[0], "row 7")
    assert token in str(caught.value)


@pytest.mark.parametrize("content, n_images", [("none", 1), ("<image>", 0), ("<image><image>", 3)])
def test_wrong_image_count_is_an_error(pair, content, n_images):
    with pytest.raises(
        InputError, match=f"row 7: {content.count('<image>')} <image> .* {n_images} im"
    ):
        text.check_turns([Turn(U, content)], n_images, pair[0], "row 7")


def test_images_in_answers_and_unknown_roles_are_errors(pair):
    with pytest.raises(InputError, match="row 7: an answer contains <image>"):
        text.check_turns([Turn(U, "draw"), Turn(A, "<image>")], 1, pair[0], "row 7")
    with pytest.raises(InputError, match="'human'; expected system, user or assistant"):
        text.check_turns([Turn("human", "hi")], 0, pair[0], "row 7")


# --- Tokenizers ---------------------------------------------------------------------------------


def test_smollm2_gets_smolvlms_ids(shared):
    cfg = replace(PRESETS["222m"].model, lm_tokenizer=str(shared / "tokenizers" / "smollm2"))
    plain = text.load_tokenizer(cfg.lm_tokenizer)
    assert plain.get_vocab_size() == 49152
    before = plain.encode("Déjà vu: 2024\n\n\tx").ids
    tokenizer = text.add_special_tokens(plain, cfg)
    wanted = {1: text.START, 2: text.PAD, 49152: text.GLOBAL, 49189: text.FAKE, 49190: text.IMAGE}
    wanted[49279] = text.END_OF_TURN
    wanted |= {49153 + i: f"<row_{i // 6 + 1}_col_{i % 6 + 1}>" for i in range(36)}
    assert {i: tokenizer.id_to_token(i) for i in wanted} == wanted
    assert tokenizer.get_vocab_size() == 49280 == cfg.lm_vocab_size
    assert tokenizer.encode("Déjà vu: 2024\n\n\tx").ids == before
    again = text.add_special_tokens(tokenizer, cfg)  # adds nothing
    assert again.get_vocab_size() == 49280


def test_the_tiny_tokenizer(pair):
    tokenizer, cfg = pair
    if cfg.lm_vocab_size > 1000:
        pytest.skip("the tiny one only")
    assert [tokenizer.id_to_token(i) for i in range(6)] == text.WORLD_SPECIAL[:6]
    assert 400 < tokenizer.get_vocab_size() <= cfg.lm_vocab_size == 640
    sample = "Any bytes: \x00\x7f ü 漢 \N{PILE OF POO} 123"
    assert tokenizer.decode(tokenizer.encode(sample).ids) == sample
    assert len(tokenizer.encode("2024").ids) == 4  # one token per digit
    same = text.train_tokenizer(questions.corpus(), cfg.lm_vocab_size)
    merges = "".join(f"{a} {b}\n" for a, b in json.loads(same.to_str())["model"]["merges"])
    assert text.MERGES.read_text(encoding="utf-8") == merges, (
        "store these merges: the built-in data has changed"
    )
    assert same.to_str() == tokenizer.to_str()


def test_a_smaller_tokenizer_keeps_the_first_merges():
    trained, kept = text.train_tokenizer(questions.corpus(), 400), text.world_tokenizer(400)
    assert kept.get_vocab_size() == 400 and kept.to_str() == trained.to_str()


def test_ids_that_differ_from_the_config_are_an_error(shared):
    cfg = PRESETS["222m"].model

    def load():
        return text.load_tokenizer(shared / "tokenizers" / "smollm2")

    with pytest.raises(
        InputError, match=r"vlm_image_token_id = 5: the tokenizer's id of .* 49190; use 49190"
    ):
        text.add_special_tokens(load(), replace(cfg, vlm_image_token_id=5))
    with pytest.raises(InputError, match=r"vlm_eos_token_id = 60: .* 49191; use 49191"):
        text.add_special_tokens(load(), replace(cfg, vlm_eos_token_id=60))
    small = VLMConfig(lm_vocab_size=320)
    with pytest.raises(InputError, match="lm_vocab_size = 320: the tokenizer has 350 tokens"):
        text.add_special_tokens(text.train_tokenizer(questions.corpus(200), 350), small)


def test_files_without_a_tokenizer(tmp_path):
    with pytest.raises(InputError, match=r"tokenizer\.json: no such file"):
        text.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json: not a tokenizer"):
        text.load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="nobody/nothing: neither a directory nor"):
        text.load_tokenizer("nobody/nothing")
