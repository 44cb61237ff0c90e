"""Rows of a file become the expected Samples; errors name the row and the problem."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import pytest

from config_tools import InputError
from configs import DataConfig
from configs_classify import ClassifyDataConfig
from data.classification.dataset import open_classification
from data.sources.fetch import download
from data.sources.open import open_dataset
from data.types import Sample, Turn


def write(path: Path, rows: list) -> Path:
    """Write one row per line: bytes and str unchanged, others as JSON."""
    lines = [
        r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode()
        for r in rows
    ]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def qa(i: int) -> dict:
    return {"image": f"images/{i}.png", "question": f"question {i}?", "answer": f"answer {i}"}


def open_all(path: Path, split: str = "test", **changes):
    return open_dataset(DataConfig(source=str(path), **changes), split)


# --- Good rows ----------------------------------------------------------------------------------


def test_questions_and_captions_become_samples(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        [
            {"image": "images/1.png", "question": "What is it?", "answer": "a cat", "id": 7},
            {"image": "2.jpg", "caption": "a dog \N{DOG}, déjà vu"},
            "",
            {"question": "2+2?", "answer": "4"},
            {"image": None, "question": "3+3?", "answer": "6"},
            {"image": "/abs/5.png", "question": "Say.", "caption": "a hen"},
        ],
    )
    source = open_all(path)
    assert source.skipped == () and len(source) == 5

    def sample(question, answer, images, number):
        turns = (Turn("user", question), Turn("assistant", answer))
        return Sample(turns, images, f"{path} row {number}")

    at = tmp_path
    assert [source[i] for i in range(5)] == [
        sample("<image>What is it?", "a cat", (str(at / "images/1.png"),), 1),
        sample("<image>Describe the picture.", "a dog \N{DOG}, déjà vu", (str(at / "2.jpg"),), 2),
        sample("2+2?", "4", (), 4),
        sample("3+3?", "6", (), 5),
        sample("<image>Say.", "a hen", ("/abs/5.png",), 6),
    ]
    assert source[3] == source[3]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_line_endings(tmp_path, end, last):
    text = end.join(json.dumps(qa(i)) for i in range(3)) + (end if last else "")
    (tmp_path / "a.jsonl").write_bytes(text.encode())
    source = open_all(tmp_path / "a.jsonl")
    assert [source[i].turns[1].text for i in range(3)] == ["answer 0", "answer 1", "answer 2"]


def test_a_byte_order_mark_is_ignored(tmp_path):
    """Windows editors write one."""
    path = write(tmp_path / "a.jsonl", [b"\xef\xbb\xbf" + json.dumps(qa(0)).encode(), qa(1)])
    source = open_all(path)
    assert source.skipped == () and source[0].turns[1].text == "answer 0"


# --- Bad rows -----------------------------------------------------------------------------------

BAD = [
    ("{", "not JSON"),
    ("[1, 2]", "expected an object"),
    ("3", "expected an object"),
    ("null", "expected an object"),
    ({"image": "a.png"}, "'question'"),
    ({"image": "a.png", "question": "q"}, "'answer'"),
    ({"image": "a.png", "question": "", "answer": "a"}, "'question'"),
    ({"image": "a.png", "question": "q", "answer": "  "}, "'answer'"),
    ({"image": "a.png", "question": "q", "answer": 4}, "'answer'"),
    ({"image": "a.png", "question": ["q"], "answer": "a"}, "'question'"),
    ({"image": "a.png", "caption": None}, "'question'"),
    ({"image": 3, "question": "q", "answer": "a"}, "expected a path"),
    ({"image": ["a.png", 3], "caption": "c"}, "expected a path"),
    ({"image": "a.png", "images": ["b.png"], "caption": "c"}, "both 'image' and 'images'"),
    ({"caption": "of nothing"}, "'question'"),
    (b'{"question": "\xff\xfe", "answer": "a"}', "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b'{"question": "q", "answer": "a", "id": ' + b"1" * 5000 + b"}", "not JSON"),
]


@pytest.mark.parametrize("row, reason", BAD, ids=[str(i) for i in range(len(BAD))])
def test_a_bad_row_is_skipped_and_named(tmp_path, row, reason):
    path = write(tmp_path / "a.jsonl", [qa(0), qa(1), row, qa(3)])
    source = open_all(path)
    assert len(source) == 3 and source[2].turns[1].text == "answer 3"
    [message] = source.skipped
    assert message.startswith(f"{path} row 3: ") and reason in message and "\n" not in message


@pytest.mark.parametrize("n_rows, n_allowed", [(20, 5), (1000, 10)])
def test_five_bad_rows_or_one_percent_are_tolerated(tmp_path, n_rows, n_allowed):
    rows = [qa(i) for i in range(n_rows)]
    for i in range(n_allowed):
        rows[2 * i] = "broken"
    source = open_all(write(tmp_path / "a.jsonl", rows))
    assert len(source) == n_rows - n_allowed
    named = [message.split(": ")[0] for message in source.skipped]
    assert named == [f"{tmp_path / 'a.jsonl'} row {2 * i + 1}" for i in range(n_allowed)]
    rows[n_rows - 1] = "broken"
    with pytest.raises(InputError, match=f"{n_allowed + 1} of {n_rows} rows are unus.* row 1: not"):
        open_all(write(tmp_path / "a.jsonl", rows))


def test_skipped_rows_are_listed_in_every_split(tmp_path):
    path = write(tmp_path / "a.jsonl", [qa(i) for i in range(30)] + ["broken"])
    for split in ("train", "val", "test"):
        [message] = open_all(path, split, val_fraction=0.3).skipped
        assert "row 31" in message


# --- Bad files ----------------------------------------------------------------------------------


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(InputError, match=r"none\.jsonl: no such file"):
        open_all(tmp_path / "none.jsonl")
    (tmp_path / "dir.jsonl").mkdir()
    with pytest.raises(InputError, match=r"dir\.jsonl: no such file"):
        open_all(tmp_path / "dir.jsonl")
    for content in (b"", b"\n\n  \n"):
        (tmp_path / "empty.jsonl").write_bytes(content)
        with pytest.raises(InputError, match=r"empty\.jsonl: no rows"):
            open_all(tmp_path / "empty.jsonl", "train")


def test_unknown_sources(tmp_path):
    (tmp_path / "a.xlsx").write_text("image,caption\n")
    for name in (str(tmp_path / "a.xlsx"), "wrld", str(tmp_path / "none"), "owner/name"):
        with pytest.raises(InputError, match=r"data\.source = .*must be `world`, an existing fol"):
            open_dataset(DataConfig(source=name), "train")


@pytest.mark.parametrize("n_rows", [2, 50])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_utf_16_is_an_error(tmp_path, encoding, n_rows):
    text = "\n".join(json.dumps(qa(i)) for i in range(n_rows))
    (tmp_path / "a.jsonl").write_bytes(text.encode(encoding))
    with pytest.raises(InputError, match=r"a\.jsonl: not UTF-8 \(perhaps UTF-16"):
        open_all(tmp_path / "a.jsonl", "train")


def test_latin_1_rows_are_skipped_and_named(tmp_path):
    rows = [b'{"question": "caf\xe9?", "answer": "a"}', qa(1)]
    source = open_all(write(tmp_path / "a.jsonl", rows))
    assert len(source) == 1 and "row 1: not JSON ('utf-8' codec" in source.skipped[0]


# --- Splits -------------------------------------------------------------------------------------


def answers(source) -> list[str]:
    return [source[i].turns[1].text for i in range(len(source))]


def test_train_and_val_are_disjoint_and_complete(tmp_path):
    path = write(tmp_path / "a.jsonl", [qa(i) for i in range(600)])
    train, val, test = (open_all(path, s, val_fraction=0.2) for s in ("train", "val", "test"))
    assert not set(answers(train)) & set(answers(val))
    assert sorted(answers(train) + answers(val)) == sorted(answers(test))
    assert answers(test) == [f"answer {i}" for i in range(600)]
    assert 80 <= len(val) <= 160  # 120 +- 4 standard deviations
    assert answers(val) == answers(open_all(path, "val", val_fraction=0.2))
    assert len(open_all(path, "val", val_fraction=0.0)) == 0


def test_editing_other_rows_keeps_the_split_of_a_row(tmp_path):
    rows = [qa(i) for i in range(200)]
    path = write(tmp_path / "a.jsonl", rows)
    before = answers(open_all(path, "val", val_fraction=0.3))
    edited = [qa(1000 + i) for i in range(50)] + rows
    random.Random(0).shuffle(edited)
    (tmp_path / "sub").mkdir()
    after = answers(open_all(write(tmp_path / "sub/b.jsonl", edited), "val", val_fraction=0.3))
    kept = {answer for answer in after if int(answer.split()[1]) < 1000}
    assert kept == set(before)
    windows = b"\r\n".join(json.dumps(row).encode() for row in rows)
    path.write_bytes(windows)
    assert answers(open_all(path, "val", val_fraction=0.3)) == before


def test_equal_rows_are_in_the_same_split(tmp_path):
    path = write(tmp_path / "a.jsonl", [qa(i // 4) for i in range(200)])
    train, val = (set(answers(open_all(path, s, val_fraction=0.3))) for s in ("train", "val"))
    assert not train & val and train and val


def test_duplicates_are_in_the_same_split_and_counted(tmp_path):
    """Duplicates have equal texts and images; other columns and the spelling may differ."""
    rows = [{**qa(i % 100), "id": i} for i in range(200)]
    path = write(tmp_path / "a.jsonl", rows)
    train, val = (open_all(path, s, val_fraction=0.3) for s in ("train", "val"))
    assert not set(answers(train)) & set(answers(val)) and len(train) + len(val) == 200
    assert "duplicate rows: 100; duplicates are in the same split" in train.notes
    assert train.notes == val.notes
    (tmp_path / "reordered.json").write_text(json.dumps([dict(reversed(r.items())) for r in rows]))
    again = open_all(tmp_path / "reordered.json", "val", val_fraction=0.3)
    assert answers(again) == answers(val)


def test_images_in_both_splits_are_counted(tmp_path):
    rows = [{**qa(i), "image": f"{i % 50}.png"} for i in range(100)]
    path = write(tmp_path / "a.jsonl", rows)
    train, val = (open_all(path, s, val_fraction=0.3) for s in ("train", "val"))
    shown = {train[i].images for i in range(len(train))}
    n = sum(val[i].images in shown for i in range(len(val)))
    assert 0 < n < len(val)
    assert f"validation rows whose image is also in training rows: {n}" in val.notes
    alone = open_all(write(tmp_path / "b.jsonl", [qa(i) for i in range(100)]), "val")
    assert not any("also in training rows" in note for note in alone.notes)


def test_a_split_without_training_rows_is_an_error(tmp_path):
    path = write(tmp_path / "a.jsonl", [qa(0)])
    with pytest.raises(InputError, match="all 1 rows are for validation; lower data"):
        open_all(path, "train", val_fraction=0.999999)


def test_notes_describe_the_rows(tmp_path):
    rows = [qa(0), qa(1), {"image": "a.png", "caption": "c"}, {"question": "q", "answer": "a"}, "{"]
    path = write(tmp_path / "a.jsonl", rows)
    first, second = open_all(path, val_fraction=0.0).notes
    assert first == (
        f"{path}: 2 rows of image + question + answer; 1 rows of image + caption; 1 rows of "
        "question + answer; 0 of them for validation"
    )
    assert second.startswith(f"skipped: {path} row 5: not JSON")


def test_a_file_is_indexed_once_until_it_changes(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", [qa(i) for i in range(9)])
    before = open_all(path)
    monkeypatch.setattr("data.sources.open.open_rows", None)
    assert open_all(path, "val", val_fraction=0.5).rows is before.rows
    monkeypatch.undo()
    write(path, [qa(i) for i in range(8)])
    assert len(open_all(path)) == 8


# --- Other errors -------------------------------------------------------------------------------

CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def test_mixed_schemas_are_an_error(tmp_path):
    path = write(tmp_path / "a.jsonl", [qa(0), qa(1), CHAT])
    message = r"mixed schemas: .*row 1 has image \+ question \+ answer and .*row 3 has messages\["
    with pytest.raises(InputError, match=message):
        open_all(path)


def test_a_row_with_too_many_placeholders_is_skipped(tmp_path):
    rows = [qa(0)] * 3 + [{**qa(1), "question": "<image> or <image>?"}]
    [message] = open_all(write(tmp_path / "a.jsonl", rows)).skipped
    assert message == f"{tmp_path / 'a.jsonl'} row 4: 2 <image> placeholders for 1 images."


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_missing_column_is_named_with_the_existing_ones(tmp_path, suffix):
    lines = {"csv": "image,cap\n" + "a.png,x\n" * 9, "jsonl": '{"image": "a", "cap": "x"}\n' * 9}
    (tmp_path / f"a.{suffix}").write_text(lines[suffix])
    message = r"9 of 9 rows are unus.* row \d: no 'question' in the columns .image, cap"
    with pytest.raises(InputError, match=message):
        open_all(tmp_path / f"a.{suffix}")


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_an_empty_file_is_an_error(tmp_path, suffix):
    (tmp_path / f"a.{suffix}").touch()
    with pytest.raises(InputError, match=rf"a\.{suffix}: no rows"):
        open_all(tmp_path / f"a.{suffix}")


def test_a_csv_with_a_header_only_has_no_rows(tmp_path):
    (tmp_path / "a.csv").write_text("image,caption\n")
    with pytest.raises(InputError, match=r"a\.csv: no rows"):
        open_all(tmp_path / "a.csv", "train")


def test_urls_are_downloaded_only_if_allowed(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", [qa(0), {**qa(1), "image": "https://a.example/1.png"}])

    def never(*_, **__):
        raise AssertionError("the network was used")

    monkeypatch.setattr("urllib.request.urlopen", never)
    source = open_all(path)
    assert len(source) == 1
    assert "https://a.example/1.png: is a URL; download the image" in source.skipped[0]
    asked = []

    def answer(address, timeout):
        asked.append(address)
        return io.BytesIO(b"bytes of an image")

    monkeypatch.setattr("urllib.request.urlopen", answer)
    source = open_all(path, fetch_images=True)
    assert asked == [] and len(source) == 2  # opening the source downloads nothing
    assert source[1].images == (b"bytes of an image",) and asked == ["https://a.example/1.png"]
    monkeypatch.setattr("data.sources.fetch.MAX_DOWNLOAD", 5)
    with pytest.raises(InputError, match=r"row 2: https://a\.example/1\.png: more than"):
        source[1]
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"127\.0\.0\.1:9/x: cannot be fetched"):
        download("http://127.0.0.1:9/x")


@pytest.mark.parametrize("trouble", [TimeoutError("timed out"), 503])
def test_a_busy_server_is_retried(monkeypatch, trouble):
    import urllib.error
    import urllib.request

    from data.sources import fetch

    waits, left = [], [2]
    busy = urllib.error.HTTPError("http://x", trouble, "busy", {}, None) \
        if isinstance(trouble, int) else urllib.error.URLError(trouble)  # fmt: skip

    def answer(_address, timeout):
        left[0] -= 1
        if left[0] >= 0:
            raise busy
        return io.BytesIO(b"an image")

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    monkeypatch.setattr(fetch.time, "sleep", waits.append)
    assert download("http://x/a.png") == b"an image" and waits == [1, 4]
    left[0] = 9
    with pytest.raises(InputError, match=r"x/a\.png: cannot be fetched"):
        download("http://x/a.png")
    assert waits == [1, 4, 1, 4] and left[0] == 6


@pytest.mark.parametrize("image", ["data:image/png;base64,!!!", "data:nothing"])
def test_broken_base64_is_an_error_on_access(tmp_path, image, tiny_processor):
    source = open_all(write(tmp_path / "a.jsonl", [{**qa(0), "image": image}]))
    with pytest.raises(InputError, match="row 1"):
        tiny_processor.encode(source[0], 200, 9)


def test_paths_are_not_mistaken_for_base64(tmp_path):
    long = "Qk" + "a" * 90
    for path in (long + ".png", "a/" + "b" * 100, "/9j/" + "x" * 20):
        source = open_all(write(tmp_path / "a.jsonl", [{**qa(0), "image": path}]))
        assert source[0].images == (str(tmp_path / path),)


# --- Row numbers --------------------------------------------------------------------------------


def test_row_numbers_are_those_of_the_file(tmp_path):
    """From 1 and over all splits, as in messages; in a mixture, those of its members."""
    rows = ["broken"] + [qa(i) for i in range(40)]
    path = write(tmp_path / "a.jsonl", rows)
    val = open_all(path, "val", val_fraction=0.3)
    assert [val[i].row for i in range(len(val))] == [
        f"{path} row {val.row_number(i)}" for i in range(len(val))
    ]
    mixture = open_dataset(DataConfig(source=f"world=0.5 {path}=0.5", val_fraction=0.3), "val")
    assert mixture.row_number(2000) == val.row_number(0) and mixture.row_number(1999) == 2000
    assert mixture.n_rows == 2000 + len(rows)
    for i, row in enumerate(rows[1:]):
        row["label"] = "ab"[i % 2]
    write(path, rows)
    cfg = ClassifyDataConfig(source=str(path), val_fraction=0.3)
    classes = open_classification(cfg, "val")
    assert len(classes) and classes[0].row == f"{path} row {classes.row_number(0)}"
