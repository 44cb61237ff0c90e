"""Published row formats give the conversation, ids and loss mask written by hand."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from config_tools import InputError
from configs import DataConfig
from data.images import open_image
from data.sources.open import open_dataset
from data.sources.schemas import parse_conversation
from data.text import START
from data.types import Turn

TILE = "<fake_token_around_image><global-img>" + 9 * "<image>" + "<fake_token_around_image>"


def png(red: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (red, 0, 0)).save(file, "png")
    return file.getvalue()


def base64_of(red: int) -> str:
    return base64.b64encode(png(red)).decode()


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with two images, which differ in their red value."""
    (tmp_path / "images").mkdir()
    for red in (50, 200):
        (tmp_path / "images" / f"{red}.png").write_bytes(png(red))
    return tmp_path


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def expected_ids_and_mask(tokenizer, marked: str) -> tuple[list[int], list[bool]]:
    """Ids and mask of a rendered conversation, from the character offsets of the [[ ]]."""
    plain, spans = "", []
    for part in re.split(r"(\[\[.*?\]\])", marked, flags=re.S):
        if part.startswith("[["):
            spans.append((len(plain), len(plain) + len(part) - 4))
        plain += part.removeprefix("[[").removesuffix("]]")
    encoded = tokenizer.encode(plain, add_special_tokens=False)
    inside = [any(a <= at < b for a, b in spans) for at, _ in encoded.offsets]
    return encoded.ids, inside


def reds(sample) -> list[int]:
    return [open_image(image).getpixel((0, 0))[0] for image in sample.images]


# Each file follows the documentation of its format. Expected: the rendered conversation, with TILE
# for an image and supervised text in [[ ]], and the red values of its images.

LLAVA = [
    {
        "id": "997bb945-628d-4724-b370-b84de974a19f",
        "image": "images/50.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is this?"},
            {"from": "gpt", "value": "A dark red sheet."},
            {"from": "human", "value": "Are you sure?"},
            {"from": "gpt", "value": "Yes."},
        ],
    },
    {
        "id": "2",
        "image": ["images/200.png", "images/50.png"],
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "Here <image> or\n<image>\nthere?\n"},
            {"from": "gpt", "value": "here"},
            {"from": "human", "value": "left over"},
        ],
    },
    {
        "id": "3",
        "conversations": [
            {"from": "human", "value": "2 + 2?"},
            {"from": "gpt", "value": "4"},
        ],
    },
]
LLAVA_WANTED = [
    (f"User:{TILE}What is this?<end_of_utterance>\nAssistant:[[ A dark red sheet."
     "<end_of_utterance>]]\nUser: Are you sure?<end_of_utterance>\nAssistant:[[ Yes."
     "<end_of_utterance>]]\n", [50]),
    (f"System: Be brief.<end_of_utterance>\nUser: Here {TILE} or\n{TILE}there?"
     "<end_of_utterance>\nAssistant:[[ here<end_of_utterance>]]\n", [200, 50]),
    ("User: 2 + 2?<end_of_utterance>\nAssistant:[[ 4<end_of_utterance>]]\n", []),
]  # fmt: skip

CAULDRON = [
    {
        "images": [
            {"bytes": png(200), "path": None},
            {"bytes": None, "path": "images/50.png"},
        ],
        "texts": [
            {"user": "Which is darker?\nBriefly.", "assistant": "The second.", "source": "x"},
            {"user": "And lighter?", "assistant": "The first.", "source": "x"},
        ],
    },
    {"images": [], "texts": [{"user": "Hi!", "assistant": "Hello.", "source": "x"}]},
]
CAULDRON_WANTED = [
    (f"User:{TILE}{TILE}Which is darker?\nBriefly.<end_of_utterance>\nAssistant:"
     "[[ The second.<end_of_utterance>]]\nUser: And lighter?<end_of_utterance>\nAssistant:"
     "[[ The first.<end_of_utterance>]]\n", [200, 50]),
    ("User: Hi!<end_of_utterance>\nAssistant:[[ Hello.<end_of_utterance>]]\n", []),
]  # fmt: skip

OPENAI = [
    {
        "messages": [
            {"role": "system", "content": "You identify colors."},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "What is in "},
                    {
                        "type": "image_url",
                        "image_url": {"url": f"data:image/png;base64,{base64_of(50)}"},
                    },
                    {"type": "text", "text": "?"},
                ],
            },
            {"role": "assistant", "content": "Dark red."},
        ]
    },
    {"messages": [{"role": "user", "content": "No image?"},
                  {"role": "assistant", "content": [{"type": "text", "text": "None."}]}]},
]  # fmt: skip
OPENAI_WANTED = [
    (f"System: You identify colors.<end_of_utterance>\nUser: What is in {TILE}?"
     "<end_of_utterance>\nAssistant:[[ Dark red.<end_of_utterance>]]\n", [50]),
    ("User: No image?<end_of_utterance>\nAssistant:[[ None.<end_of_utterance>]]\n", []),
]  # fmt: skip

TRL = [
    {
        "images": ["images/50.png", "images/200.png"],
        "messages": [
            {"role": "user", "content": [{"type": "image", "text": None},
                                         {"type": "text", "text": "First?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "dark"}]},
            {"role": "user", "content": [{"type": "text", "text": "Then "},
                                         {"type": "image", "text": None}]},
            {"role": "assistant", "content": [{"type": "text", "text": "light"}]},
        ],
    },
    {"images": ["images/200.png"], "messages": [{"role": "user", "content": "unplaced"},
                                                  {"role": "assistant", "content": "in front"}]},
]  # fmt: skip
TRL_WANTED = [
    (f"User:{TILE}First?<end_of_utterance>\nAssistant:[[ dark<end_of_utterance>]]\n"
     f"User: Then {TILE}<end_of_utterance>\nAssistant:[[ light<end_of_utterance>]]\n", [50, 200]),
    (f"User:{TILE}unplaced<end_of_utterance>\nAssistant:[[ in front<end_of_utterance>]]\n", [200]),
]  # fmt: skip

CHOICES = "\nA. red\nB. blue\nC. 1\nAnswer with the letter."
COLUMNS = [
    {"image": "images/50.png", "question": "Which color?", "answer": "red"},
    {"image": "images/50.png", "caption": "a red sheet"},
    {"image": base64_of(200), "question": "Which?", "choices": ["red", "blue", "1"], "answer": "1"},
    {"question": "Which?", "choices": ["red", "blue", "1"], "answer": 2},
    {"question": "Which?", "choices": '["red", "blue", "1"]', "answer": "A"},
    {"file_name": "images/200.png", "text": "bright"},
    {"images": ["images/50.png", "images/200.png"], "question": "<image>, then <image>?",
     "answer": "dark, light"},
    {"image": "images/50.png", "label": "sheet"},
]  # fmt: skip
COLUMNS_WANTED = [
    (f"User:{TILE}Which color?<end_of_utterance>\nAssistant:[[ red<end_of_utterance>]]\n", [50]),
    (f"User:{TILE}Describe the picture.<end_of_utterance>\nAssistant:[[ a red sheet"
     "<end_of_utterance>]]\n", [50]),
    (f"User:{TILE}Which?{CHOICES}<end_of_utterance>\nAssistant:[[ C<end_of_utterance>]]\n", [200]),
    (f"User: Which?{CHOICES}<end_of_utterance>\nAssistant:[[ C<end_of_utterance>]]\n", []),
    (f"User: Which?{CHOICES}<end_of_utterance>\nAssistant:[[ A<end_of_utterance>]]\n", []),
    (f"User:{TILE}Describe the picture.<end_of_utterance>\nAssistant:[[ bright"
     "<end_of_utterance>]]\n", [200]),
    (f"User:{TILE}, then {TILE}?<end_of_utterance>\nAssistant:[[ dark, light"
     "<end_of_utterance>]]\n", [50, 200]),
    (f"User:{TILE}What is this?<end_of_utterance>\nAssistant:[[ sheet<end_of_utterance>]]\n", [50]),
]  # fmt: skip


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)))


def write_json(path: Path, rows: list[dict]) -> None:
    path.write_text(json.dumps(rows, indent=2))


def write_parquet(path: Path, rows: list[dict]) -> None:
    pa.parquet.write_table(pa.Table.from_pylist(rows), path)


def write_csv(path: Path, rows: list[dict]) -> None:
    """Lists are stored as JSON in a cell."""
    names = sorted({name for row in rows for name in row})
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for row in rows:
            lists = {k: json.dumps(v) for k, v in row.items() if isinstance(v, list)}
            writer.writerow(row | lists)


WRITERS = {"jsonl": write_jsonl, "json": write_json, "csv": write_csv, "parquet": write_parquet}
FILES = [
    ("llava", LLAVA, LLAVA_WANTED, "jsonl"), ("llava", LLAVA, LLAVA_WANTED, "json"),
    ("cauldron", CAULDRON, CAULDRON_WANTED, "parquet"),
    ("openai", OPENAI, OPENAI_WANTED, "jsonl"), ("openai", OPENAI, OPENAI_WANTED, "json"),
    ("trl", TRL[:1], TRL_WANTED[:1], "parquet"), ("trl", TRL, TRL_WANTED, "jsonl"),
    ("trl", TRL, TRL_WANTED, "csv"),
    ("columns", COLUMNS, COLUMNS_WANTED, "jsonl"), ("columns", COLUMNS, COLUMNS_WANTED, "json"),
]  # fmt: skip


@pytest.mark.parametrize("name, rows, wanted, suffix", FILES, ids=[f"{f[0]}-{f[3]}" for f in FILES])
def test_a_file_gives_the_expected_conversation_ids_and_mask(
    tiny_processor, folder, name, rows, wanted, suffix
):
    path = folder / f"{name}.{suffix}"
    WRITERS[suffix](path, rows)
    source = open_dataset(DataConfig(source=str(path)), "test")
    assert source.skipped == () and len(source) == len(rows)
    for i, (marked, colors) in enumerate(wanted):
        sample = source[i]
        assert reds(sample) == colors, i
        tokens = tiny_processor.encode(sample, 1000, 9)
        ids, mask = expected_ids_and_mask(tiny_processor.tokenizer, START + marked)
        assert tokens.ids.tolist() == ids, i
        assert tokens.supervised.tolist() == mask, i
        assert len(tokens.tiles) == len(colors)


def test_an_integer_answer_is_always_the_index_of_a_choice():
    """As in ScienceQA; a text is first compared with the choices."""
    row = {"question": "How many?", "choices": ["1", "2", "3", "4"]}
    for answer, letter in ((2, "C"), (0, "A"), ("2", "B"), ("0", "A"), ("D", "D")):
        assert parse_conversation(row | {"answer": answer}).turns[-1].text == letter, answer


def test_csv_columns_give_the_same_conversation(tiny_processor, folder):
    """All of COLUMNS except the number: in a CSV it is text."""
    rows = COLUMNS[:3] + COLUMNS[4:]
    write_csv(folder / "a.csv", rows)
    source = open_dataset(DataConfig(source=str(folder / "a.csv")), "test")
    for i, (marked, colors) in enumerate(COLUMNS_WANTED[:3] + COLUMNS_WANTED[4:]):
        tokens = tiny_processor.encode(source[i], 1000, 9)
        ids, mask = expected_ids_and_mask(tiny_processor.tokenizer, START + marked)
        assert (tokens.ids.tolist(), tokens.supervised.tolist()) == (ids, mask), i
        assert reds(source[i]) == colors


def test_pil_images_and_rows_made_in_python(folder):
    import numpy as np

    from data.sources.split import index_rows, select_split
    from data.sources.streaming import ListRows

    rows = [{"image": Image.new("RGB", (9, 9), (50, 0, 0)), "caption": "dark"},
            {"image": png(200), "caption": "light"}]  # fmt: skip
    source = select_split(
        index_rows(ListRows(rows), "mine", DataConfig()), "mine", "test", DataConfig()
    )
    assert [reds(source[i]) for i in range(2)] == [[50], [200]]
    assert source[1].row == "row 2" and np.array_equal(source.indices, [0, 1])


# --- Error messages -----------------------------------------------------------------------------

USER, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
BAD = [
    ({"texts": []}, "'texts': expected a list of objects"),
    ({"texts": [{"user": "q"}]}, "texts 1: 'assistant' is missing; expected text"),
    ({"texts": [{"user": "q", "assistant": " "}]}, "texts 1: 'assistant' is empty"),
    ({"conversations": "hello"}, "'conversations': expected a list of objects"),
    ({"conversations": "[1"}, "'conversations' is not JSON"),
    ({"conversations": [{"from": "bing", "value": "x"}]}, "'from' is 'bing'; expected one of"),
    ({"conversations": [USER]}, "expected a last turn of the assistant"),
    ({"conversations": [USER, GPT, {"from": "human", "value": "<image>"}], "image": "a.png"},
     "expected a last turn of the assistant"),
    ({"conversations": [USER, {"from": "gpt"}]}, "conversations 2: 'value' is missing"),
    ({"conversations": [{"from": "human", "value": "<image><image>"}, GPT], "image": "a.png"},
     "2 <image> placeholders for 1 images"),
    ({"conversations": [{"from": "human", "value": "<image>"}, GPT]},
     "1 <image> placeholders for 0 images"),
    ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "expected text, or a list"),
    ({"messages": [{"role": "user", "content": None}]}, "messages 1: 'content': expected text"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "'role' is 'tool'"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]},
                   {"role": "assistant", "content": "x"}], "images": ["a", "b"]},
     "1 <image> placeholders for 2 images"),
    ({"question": "q", "choices": ["a"], "answer": "a"}, "list of 2 to 26 texts"),
    ({"question": "q", "choices": ["a", "b"], "answer": "c"}, "expected a choice, its letter or"),
    ({"question": "q", "choices": ["a", "b"], "answer": 2}, "expected a choice, its letter or"),
    ({"question": "q", "choices": ["a", "b"], "answer": True}, "expected a choice, its letter or"),
    ({"question": "q", "choices": ["a", "b"]}, "expected a choice, its letter or"),
    ({"image": {"bytes": None, "path": None}, "caption": "c"}, "an image is empty; expected"),
    ({"image": "", "caption": "c"}, "an image is empty; expected"),
    ({"img": "a.png", "cap": "c"}, "no 'question' in the columns .img, cap.; expected"),
    ({"question": "q", "answer": ["a"]}, "^'answer' is a list; expected text.$"),
    ({"question": "q", "answer": 3}, "'answer' is a number; expected text"),
    ({"image": "a.png", "label": 3}, "'label' is a number; expected text"),
    ({"question": " ", "answer": "a"}, "'question' is empty; expected text"),
    ({}, "no 'question' in the columns .none."),
]  # fmt: skip


@pytest.mark.parametrize("row, message", BAD, ids=[str(i) for i in range(len(BAD))])
def test_an_unusable_row_has_a_one_line_message(row, message):
    with pytest.raises(InputError, match=message) as caught:
        parse_conversation(row)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


# --- Any conversation through any schema --------------------------------------------------------

words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda s: s.strip() and "<" not in s
)
user_turns = st.lists(st.one_of(words, st.just("<image>")), min_size=1, max_size=4).map("".join)
talks = st.lists(st.tuples(user_turns, words), min_size=1, max_size=4)


def as_parts(text: str) -> list[dict]:
    return [{"type": "image"} if part == "<image>" else {"type": "text", "text": part}
            for part in re.split("(<image>)", text) if part]  # fmt: skip


def forms(talk: list[tuple[str, str]], system: str, images: list[str]) -> list[dict]:
    """The same conversation in every schema."""
    turns = [turn for q, a in talk for turn in (("user", q), ("assistant", a))]
    turns = [("system", system), *turns]
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    return [
        {"image": images, "conversations": [{"from": names[r], "value": t} for r, t in turns]},
        {"images": images, "messages": [{"role": r, "content": t} for r, t in turns]},
        {"images": images, "messages": [{"role": r, "content": as_parts(t)} for r, t in turns]},
        {"images": images, "texts": [{"user": q, "assistant": a} for q, a in talk]},
    ]


@given(talk=talks, system=words)
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
def test_any_conversation_is_the_same_in_every_schema(talk, system):
    """Rows pass through JSON, as in a file. LLaVA's newline next to a placeholder is dropped."""
    images = [f"{i}.png" for i in range(sum(q.count("<image>") for q, _ in talk))]
    wanted = [Turn(r, t) for q, a in talk for r, t in (("user", q), ("assistant", a))]
    for i, row in enumerate(forms(talk, system, images)):
        found = parse_conversation(json.loads(json.dumps(row)))
        turns = [turn for turn in found.turns if turn.role != "system"]
        if i == 0:
            plain = [Turn(r, re.sub("<image>\n|\n<image>$", "<image>", t)) for r, t in wanted]
            assert turns == plain
        else:
            assert turns == wanted
        assert list(found.images) == images
        assert len(found.turns) == len(wanted) + (i < 3)
