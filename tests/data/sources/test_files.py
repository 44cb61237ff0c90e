"""Rows of text files and folders: exact values, and an error message for each problem."""

from __future__ import annotations

import csv
import json
import pickle
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from config_tools import InputError
from configs import DataConfig
from configs_classify import ClassifyDataConfig
from data.classification.dataset import open_classification
from data.sources.folders import find_images
from data.sources.open import open_dataset, open_rows


def rows_of(path: Path) -> list[dict]:
    """All rows, by scan and by index, after pickling (as for a worker)."""
    reader = pickle.loads(pickle.dumps(open_rows(str(path))))
    scanned = list(reader.scan())
    assert [reader[k] for k in reversed(range(len(reader)))] == scanned[::-1]
    return scanned


def errors_of(path: Path) -> list[str]:
    return [str(row) for row in open_rows(str(path)).scan() if isinstance(row, InputError)]


# --- JSON ---------------------------------------------------------------------------------------

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab[]{},\"\\", max_size=4),
                                                                inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
objects = st.dictionaries(st.text('xy"\\,]}', max_size=3), values, max_size=3)


@given(rows=st.lists(objects, min_size=1, max_size=5), indent=st.sampled_from([None, 1]),
       ascii_only=st.booleans())  # fmt: skip
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_any_json_list_is_split_into_its_rows(tmp_path_factory, rows, indent, ascii_only):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    assert rows_of(path) == rows


def test_json_lines_in_a_json_file_and_a_byte_order_mark(tmp_path):
    (tmp_path / "a.json").write_bytes(b'{"a": 1}\n\n{"a": 2}\n')
    assert rows_of(tmp_path / "a.json") == [{"a": 1}, {"a": 2}]
    (tmp_path / "b.json").write_bytes(b'\xef\xbb\xbf [{"a": 1} , {"a": [2, 3]}]')
    assert rows_of(tmp_path / "b.json") == [{"a": 1}, {"a": [2, 3]}]
    (tmp_path / "c.json").write_bytes(b'{"a": 1}')
    assert rows_of(tmp_path / "c.json") == [{"a": 1}]
    (tmp_path / "d.json").write_bytes(b" [ ] ")
    assert rows_of(tmp_path / "d.json") == []


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{\n "images": [1, 2]\n}', r"a\.json: expected a list of rows"),
        (b"   \n", r"a\.json: expected a list of rows"),
        (b'"text"', r"a\.json: expected a list of rows"),
        (b'[{"a": 1}, {"a": 2}', r"a\.json: not JSON \(the list is not closed"),
    ],
)
def test_json_without_a_list(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=message):
        open_rows(str(tmp_path / "a.json"))


def test_a_bad_row_of_a_json_list_is_named_and_the_others_are_read(tmp_path):
    (tmp_path / "a.json").write_text('[{"a": 1}, {"a": nope}, 7, {"a": 4}]')
    reader = open_rows(str(tmp_path / "a.json"))
    assert [row for row in reader.scan() if isinstance(row, dict)] == [{"a": 1}, {"a": 4}]
    [first, second] = errors_of(tmp_path / "a.json")
    assert "a.json row 2: not JSON" in first and "a.json row 3: expected an object" in second


# --- CSV ----------------------------------------------------------------------------------------

cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)


@given(rows=st.lists(st.tuples(cells, cells), max_size=5), mark=st.sampled_from(",;\t"),
       end=st.sampled_from(["\n", "\r\n"]))  # fmt: skip
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_any_csv_is_split_into_its_rows(tmp_path_factory, rows, mark, end):
    """Even with quotes, newlines and delimiters in cells; empty cells are left out."""
    path = tmp_path_factory.getbasetemp() / "any.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=mark, lineterminator=end, quoting=csv.QUOTE_ALL)
        writer.writerows([("one", "two"), *rows])
    wanted = [{name: cell for name, cell in zip(("one", "two"), row) if cell} for row in rows]
    assert rows_of(path) == wanted


def test_csv_rows_are_numbered_by_their_first_line(tmp_path):
    (tmp_path / "a.csv").write_text('image,caption\n1.png,"two\nlines"\n2.png,x,y\n\n3.png,z\n')
    reader = open_rows(str(tmp_path / "a.csv"))
    assert [reader.where(k).split("row ")[1] for k in range(3)] == ["2", "4", "6"]
    assert errors_of(tmp_path / "a.csv") == [
        f"{tmp_path / 'a.csv'} row 4: 3 cells; expected 2: image, caption."
    ]
    assert reader[0] == {"image": "1.png", "caption": "two\nlines"}


def test_a_cell_longer_than_the_default_limit(tmp_path):
    long = "x" * 500_000
    (tmp_path / "a.csv").write_text(f"image,caption\na.png,{long}\n")
    assert rows_of(tmp_path / "a.csv")[0]["caption"] == long


def test_a_windows_csv_with_bom_semicolons_and_crlf(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfimage;caption\r\na.png;x\r\n")
    assert rows_of(tmp_path / "a.csv") == [{"image": "a.png", "caption": "x"}]


def test_an_unclosed_quote_is_an_error(tmp_path):
    (tmp_path / "a.csv").write_text('image,caption\n1.png,"a dog\n2.png,a cat\n3.png,x\n')
    with pytest.raises(InputError, match=r"a\.csv row 2: not CSV"):
        open_rows(str(tmp_path / "a.csv"))
    (tmp_path / "b.csv").write_text('image,caption\n1.png,a 5" screen\n2.png,a cat\n')
    assert [row["caption"] for row in rows_of(tmp_path / "b.csv")] == ['a 5" screen', "a cat"]


def test_latin_1_in_a_csv_is_an_error_with_the_row(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"image,caption\na.png,caf\xe9\nb.png,tea\n")
    [message] = errors_of(tmp_path / "a.csv")
    assert "a.csv row 2: not UTF-8" in message
    (tmp_path / "b.csv").write_bytes(b"image,l\xe9gende\na.png,tea\n")
    with pytest.raises(InputError, match=r"b\.csv row 1: not UTF-8"):
        open_rows(str(tmp_path / "b.csv"))


# --- Folders ------------------------------------------------------------------------------------


def fill(folder: Path, names: list[str]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / name)
    return folder


def test_caption_files(tmp_path):
    fill(tmp_path, ["b.PNG", "a.jpg", "sub/c.webp", ".hidden.png", "bare.png"])
    for name, text in (("a", "an a\n"), ("b", "ein ß"), ("sub/c", "a c")):
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    reader = open_rows(str(tmp_path))
    assert [row for row in reader.scan() if isinstance(row, dict)] == [
        {"image": "a.jpg", "caption": "an a\n"},
        {"image": "b.PNG", "caption": "ein ß"},
        {"image": "sub/c.webp", "caption": "a c"},
    ]
    assert errors_of(tmp_path) == [f"{tmp_path / 'bare.png'}: no caption file bare.txt."]
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    assert any("a.txt: not UTF-8 text" in message for message in errors_of(tmp_path))
    (tmp_path / "a.txt").unlink()
    (tmp_path / "bare.txt").write_text("   ")
    source = open_dataset(DataConfig(source=str(tmp_path)), "test")
    assert len(source) == 2 and len(source.skipped) == 2


def test_splits_of_plain_files_and_a_file_without_columns(tmp_path):
    (tmp_path / "a.csv").write_text("question,answer\na,b\n")
    (tmp_path / "bom.csv").write_bytes(b"\xef\xbb\xbf")
    (tmp_path / "in").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "in" / "cat.png")
    for source, message in (("a.csv@test", "a file has no splits; leave out @test"),
                         ("in@test", "has no splits; leave out @test"),
                         ("bom.csv", "no rows")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            open_dataset(DataConfig(source=str(tmp_path / source)), "train")


def test_file_names_as_labels(tmp_path):
    fill(tmp_path, ["red_panda-001.png", "red_panda-002.png", "Katze (3).png", "0001.png"])
    rows = {row["image"]: row["label"] for row in open_rows(str(tmp_path)).scan()
            if isinstance(row, dict)}  # fmt: skip
    assert rows == {"red_panda-001.png": "red panda", "red_panda-002.png": "red panda",
                    "Katze (3).png": "Katze"}  # fmt: skip
    [message] = errors_of(tmp_path)
    assert message.startswith(f"{tmp_path / '0001.png'}: the file name contains no label")
    assert "0001.txt" in message and "metadata.jsonl" in message


def test_folder_names_as_labels(tmp_path):
    names = ["red_panda/1.png", "cat/1.png", "cat/2.png", "boeing_737/1.png", "boeing_747/1.png"]
    fill(tmp_path, [*names, ".ipynb_checkpoints/1.png", "cat/.thumbs/1.png"])
    labels = [(row["image"], row["label"]) for row in rows_of(tmp_path)]
    assert labels[:2] == [("boeing_737/1.png", "boeing 737"), ("boeing_747/1.png", "boeing 747")]
    assert labels[2:] == [
        ("cat/1.png", "cat"), ("cat/2.png", "cat"), ("red_panda/1.png", "red panda")
    ]  # fmt: skip
    classes = open_classification(ClassifyDataConfig(source=str(tmp_path), val_fraction=0), "train")
    assert classes.names == ("boeing_737", "boeing_747", "cat", "red_panda")
    for other in names[3:]:
        (tmp_path / other).unlink()
    source = open_dataset(DataConfig(source=str(tmp_path)), "test")
    assert source[0].turns == (("user", "<image>What is this?"), ("assistant", "cat"))
    assert source[0].images == (str(tmp_path / "cat" / "1.png"),)


def test_the_first_folder_is_the_class_at_any_depth(tmp_path):
    """For VLMs and classifiers; hidden files and folders are skipped."""
    fill(tmp_path, ["red_panda/zoo/1.png", "red_panda/2.png", "cat/a/b/3.png", "cat/.t/4.png"])
    found = find_images(tmp_path)
    assert [str(f) for f in found] == ["cat/a/b/3.png", "red_panda/2.png", "red_panda/zoo/1.png"]
    assert [row["label"] for row in rows_of(tmp_path)] == ["cat", "red panda", "red panda"]
    classes = open_classification(ClassifyDataConfig(source=str(tmp_path), val_fraction=0), "train")
    assert classes.labels == ("cat", "red_panda", "red_panda")
    fill(tmp_path, ["loose.png"])
    [message] = errors_of(tmp_path)
    assert message.startswith(f"{tmp_path / 'loose.png'}: expected one folder per class")


def test_metadata_files_take_precedence_over_names(tmp_path):
    fill(tmp_path, ["cat-1.png"])
    (tmp_path / "metadata.csv").write_text("file_name,text\ncat-1.png,by csv\n")
    assert rows_of(tmp_path) == [{"file_name": "cat-1.png", "text": "by csv"}]
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "cat-1.png", "text": "by jsonl"}\n')
    assert rows_of(tmp_path) == [{"file_name": "cat-1.png", "text": "by jsonl"}]


def test_a_folder_with_images_and_parquet_files(tmp_path):
    """Like Hub datasets with images in their card."""
    fill(tmp_path, ["assets/teaser.png"])
    Dataset.from_list([{"question": "q", "answer": "a"}] * 2).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"both images \(assets/teaser\.png\) and Parquet"):
        open_rows(str(tmp_path))
    assert len(rows_of(tmp_path / "a.parquet")) == 2
    (tmp_path / "a.parquet").rename(tmp_path / "metadata.parquet")
    assert len(rows_of(tmp_path)) == 2


def test_a_folder_without_images(tmp_path):
    for name in ("", "notes.md", "a.gz"):
        if name:
            (tmp_path / name).write_text("x")
        with pytest.raises(InputError, match=r"no images .*no metadata\.jsonl, no Pa") as caught:
            open_rows(str(tmp_path))
        assert str(caught.value).startswith(str(tmp_path))


# --- Real data ----------------------------------------------------------------------------------


def test_real_scans_with_caption_files(shared, tiny_processor):
    folder = shared / "images" / "documents" / "tesseract"
    source = open_dataset(DataConfig(source=str(folder)), "test")
    by_name = {Path(sample.row).name: sample for sample in (source[i] for i in range(len(source)))}
    assert set(by_name) == {"8071_093.3B.tif", "8087_054.3B.tif", "eurotext.tif", "phototest.tif"}
    sample = by_name["phototest.tif"]
    assert sample.turns[1].text == (folder / "phototest.txt").read_text(encoding="utf-8")
    tokens = tiny_processor.encode(sample, 2000, 1)
    ids = tokens.ids[tokens.supervised]
    answer = tiny_processor.tokenizer.decode(ids, skip_special_tokens=False)
    assert answer.startswith(" This is a lot of 12 point text to test the\nocr code and see if")
    assert answer.endswith("<end_of_utterance>") and len(tokens.tiles) == 1


def test_real_flags_and_emoji_from_tables(shared, tmp_path, tiny_processor):
    """The published names.tsv with its columns renamed."""
    for name, header, n in (("flags", "image\tlabel", 246),
                            ("noto_emoji_72", "image\tchar\tlabel", 1405)):  # fmt: skip
        folder = shared / "datasets" / name
        _, *lines = (folder / "names.tsv").read_text(encoding="utf-8").splitlines()
        lines = [header] + [f"{folder / 'images'}/{line}" for line in lines]
        (tmp_path / f"{name}.tsv").write_text("\n".join(lines), encoding="utf-8")
        source = open_dataset(DataConfig(source=str(tmp_path / f"{name}.tsv")), "test")
        assert len(source) == n and source.skipped == ()
        tokens = tiny_processor.encode(source[0], 200, 1)
        answer = tiny_processor.decode(tokens.ids[tokens.supervised])
        assert answer == {"flags": "Andorra", "noto_emoji_72": "number sign"}[name]


def test_real_photos_from_a_json_file(shared, tmp_path):
    folder = shared / "datasets" / "coco_captions_cc_by"
    images = json.loads((folder / "annotations.json").read_text())["images"]
    rows = [{"image": str(folder / i["file_name"]), "caption": c} for i in images
            for c in i["captions"]]  # fmt: skip
    (tmp_path / "coco.json").write_text(json.dumps(rows))
    train, val = (
        open_dataset(DataConfig(source=str(tmp_path / "coco.json"), val_fraction=0.2), split)
        for split in ("train", "val")
    )
    assert len(train) + len(val) == 255
    leaked = {s.images for s in map(train.__getitem__, range(len(train)))}
    n_leaked = sum(val[i].images in leaked for i in range(len(val)))
    assert n_leaked and f"also in training rows: {n_leaked}" in val.notes[1]
