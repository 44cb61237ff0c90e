"""Images and their classes from every kind of source; an error message for each problem."""

from __future__ import annotations

import gzip
import json
import struct
from collections import Counter

import datasets
import numpy as np
import pytest
from PIL import Image

from config_tools import InputError
from configs_classify import ClassifyDataConfig
from data.classification.dataset import (
    balanced_subset,
    describe_balance,
    label_of,
    open_classification,
)
from data.images import open_image
from data.sources.idx import read_idx
from data.world import drawing, scenes

LABELS = ("10", "2", "2", "3b", "10", "2")


def save_image(path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (value, 0, 0)).save(path)


def idx(values: np.ndarray) -> bytes:
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()


def folder(tmp_path):
    for i, label in enumerate(LABELS):
        save_image(tmp_path / "f" / label / ("deep" if i % 2 else "") / f"{i}.png", 10 * i)
    (tmp_path / "f" / "notes.txt").write_text("no image")
    return tmp_path / "f"


def jsonl(tmp_path):
    for i in range(6):
        save_image(tmp_path / f"{i}.png", 10 * i)
    rows = [{"image": f"{i}.png", "label": x, "odd": i % 2} for i, x in enumerate(LABELS)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "rows.jsonl"


def table(tmp_path):
    jsonl(tmp_path)
    lines = ["file_name,label", *(f"{i}.png,{x}" for i, x in enumerate(LABELS))]
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    return tmp_path / "rows.csv"


def saved(tmp_path):
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["3b", "2", "10"])}
    )
    images = [Image.new("RGB", (6, 4), (10 * i, 0, 0)) for i in range(6)]
    rows = {"image": images, "label": [2, 1, 1, 0, 2, 1]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "set")
    return tmp_path / "set"


@pytest.mark.parametrize("make", [folder, jsonl, table, saved], ids=lambda f: f.__name__)
def test_every_format_gives_the_same_classes(make, tmp_path):
    cfg = ClassifyDataConfig(source=str(make(tmp_path)), val_fraction=0.0)
    source = open_classification(cfg, "train")
    assert source.names == ("10", "2", "3b") and Counter(source.labels) == Counter(LABELS)
    for i, label in enumerate(source.labels):
        sample = source[i]
        red = np.asarray(open_image(sample.images[0]))[0, 0, 0]
        assert label_of(sample) == label == LABELS[red // 10]


def test_idx_files_plain_and_gzip(tmp_path):
    pixels = np.arange(5 * 6 * 7, dtype=np.uint8).reshape(5, 6, 7)
    numbers = np.array([3, 0, 3, 11, 3], np.uint8)
    for part, write in (("train", lambda b: b), ("t10k", gzip.compress)):
        end = ".gz" if part == "t10k" else ""
        (tmp_path / f"{part}-images-idx3-ubyte{end}").write_bytes(write(idx(pixels)))
        (tmp_path / f"{part}-labels-idx1-ubyte{end}").write_bytes(write(idx(numbers)))
    for name in ("", "@t10k", "/train-images-idx3-ubyte"):
        cfg = ClassifyDataConfig(source=f"{tmp_path}{name}", val_fraction=0.0)
        source = open_classification(cfg, "train")
        assert source.names == ("0", "3", "11") and source.labels == ("3", "0", "3", "11", "3")
        assert np.array_equal(np.asarray(source[3].images[0]), pixels[3])


def test_another_label_column_and_validation_source(tmp_path):
    rows = jsonl(tmp_path)
    cfg = ClassifyDataConfig(source=str(rows), label="odd", val=str(rows))
    source = open_classification(cfg, "train")
    assert source.names == ("0", "1") and len(source) == 6
    val = open_classification(cfg, "val", source.names)
    assert len(val) == 6 and val.names == source.names


def test_splits_are_disjoint_and_complete(tmp_path):
    for i in range(60):
        save_image(tmp_path / "ab"[i % 2] / f"{i}.png", i)
    cfg = ClassifyDataConfig(source=str(tmp_path), val_fraction=0.3)
    parts = [open_classification(cfg, split) for split in ("train", "val", "test")]
    names = [{part[i].images[0] for i in range(len(part))} for part in parts]
    assert names[0] | names[1] == names[2] and not names[0] & names[1]
    assert 6 <= len(names[1]) <= 30 and len(names[2]) == 60


def test_a_limit_is_spread_over_the_classes(tmp_path):
    labels = ["a"] * 50 + ["b"] * 30 + ["c"] * 3
    chosen = balanced_subset(labels, 21, seed=0)
    assert Counter(labels[i] for i in chosen) == {"a": 9, "b": 9, "c": 3}
    assert list(chosen) == sorted(set(chosen))
    assert list(chosen) != list(balanced_subset(labels, 21, seed=1))
    for i in range(20):
        save_image(tmp_path / "ab"[i % 2] / f"{i}.png", i)
    cfg = ClassifyDataConfig(source=str(tmp_path), limit=6, val_fraction=0.0)
    source = open_classification(cfg, "train")
    assert Counter(source.labels) == {"a": 3, "b": 3}
    assert {label_of(source[i]) for i in range(6)} == {"a", "b"}
    assert len(open_classification(cfg, "test")) == 20


def test_the_class_of_a_scene_is_its_most_frequent_shape():
    source = open_classification(ClassifyDataConfig(), "train")
    assert isinstance(source.labels, range) and source.names == tuple(scenes.SHAPES)
    sample = source[5]
    scene = scenes.make_scene(0, "train", 5)
    assert label_of(sample) == scenes.label(scene)
    assert list(sample.images[0].getdata()) == list(drawing.draw(scene).getdata())
    val = open_classification(ClassifyDataConfig(), "val")
    assert val.labels[7] == label_of(val[7]) and set(val.labels) == set(scenes.SHAPES)


def test_imbalance_is_described(tmp_path):
    for i in range(13):
        save_image(tmp_path / ("rare" if i == 0 else "often") / f"{i}.png", i)
    source = open_classification(
        ClassifyDataConfig(source=str(tmp_path), val_fraction=0.0), "train"
    )
    assert "largest 'often' (12), smallest 'rare' (1); imbalance 12.0" in describe_balance(source)
    cfg = ClassifyDataConfig(source=str(tmp_path), val_fraction=0.0)
    with_more = open_classification(cfg, "train", ("often", "rare", "never"))
    assert "no images of never" in describe_balance(with_more)


def test_duplicates_are_in_the_same_split(tmp_path):
    for i in range(40):
        save_image(tmp_path / "ab"[i % 2] / f"{i}.png", i)
    rows = [{"image": f"{'ab'[i % 2]}/{i}.png", "label": "ab"[i % 2]} for i in range(40)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(r) for r in rows + rows))
    cfg = ClassifyDataConfig(source=str(tmp_path / "metadata.jsonl"), val_fraction=0.4)
    train, val = (open_classification(cfg, split) for split in ("train", "val"))
    shown = [{part[i].images[0] for i in range(len(part))} for part in (train, val)]
    assert not shown[0] & shown[1] and any("duplicate rows: 40" in note for note in train.notes)


def test_digits_with_equal_last_rows_are_not_duplicates(tmp_path):
    """In MNIST, the last pixel rows of most digits are black."""
    pixels = np.zeros((60, 28, 28), np.uint8)
    pixels[np.arange(60), 3 + np.arange(60) % 20, 3 + np.arange(60) // 20] = 255
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(pixels))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.arange(60, dtype=np.uint8) % 2))
    cfg = ClassifyDataConfig(source=str(tmp_path), val_fraction=0.4)
    train, val = (open_classification(cfg, split) for split in ("train", "val"))
    assert len(train) + len(val) == 60 and min(len(train), len(val)) > 12
    assert set(train.labels) == set(val.labels) == {"0", "1"}
    assert not any("duplicate" in note for note in train.notes)


def spoil(tmp_path, kind: str) -> str:
    """A source with one problem."""
    made = tmp_path / "made"
    made.mkdir()
    if kind == "empty":
        return str(made)
    if kind == "loose":
        save_image(made / "a.png", 1)
    if kind in ("one class", "unknown"):
        save_image(made / "cat" / "a.png", 1)
        save_image(made / ("cat" if kind == "one class" else "dog") / "b.png", 2)
    if kind in ("no label", "no image"):
        row = {"image": "a.png", "breed": "cat"} if kind == "no label" else {"label": "cat"}
        (made / "rows.jsonl").write_text("\n".join([json.dumps(row)] * 9))
        return str(made / "rows.jsonl")
    if kind == "torn gzip":
        content = bytearray(gzip.compress(idx(np.zeros((3, 4, 4), np.uint8))))
        content[15] ^= 0xFF
        (made / "train-images-idx3-ubyte.gz").write_bytes(content)
        (made / "train-labels-idx1-ubyte.gz").write_bytes(content)
    if kind in ("torn", "no labels file", "not idx"):
        content = idx(np.zeros((3, 4, 4), np.uint8))
        content = {"torn": content[:-5], "not idx": b"GIF8"}.get(kind, content)
        (made / "train-images-idx3-ubyte").write_bytes(content)
        if kind != "no labels file":
            (made / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(3, np.uint8)))
    return str(made)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty", "no images"),
        ("loose", "a.png: expected one folder per class"),
        ("one class", "only one class ('cat')"),
        ("no label", "no class in column 'label'; set data.label to one of image, breed"),
        ("no image", "no image; expected it in column image"),
        ("unknown", "class 'dog' is none of the model's 2 classes (cat, bird)"),
        ("torn", "not a complete IDX file"),
        ("not idx", "not an"),
        ("torn gzip", "not an IDX file"),
        ("no labels file", "expected the labels in train-labels-idx1-ubyte"),
    ],
)
def test_error_messages(tmp_path, kind, message):
    source = spoil(tmp_path, kind)
    names = ("cat", "bird") if kind == "unknown" else ()
    with pytest.raises(InputError) as caught:
        open_classification(ClassifyDataConfig(source=source), "train", names)
    assert message in str(caught.value) and "\n" not in str(caught.value), caught.value


def test_a_model_without_the_classes_of_the_world():
    with pytest.raises(InputError, match="class 'circle' is none of the model's"):
        open_classification(ClassifyDataConfig(), "train", ("cat", "dog"))


def test_an_idx_file_of_floats_is_an_error(tmp_path):
    (tmp_path / "x-idx3").write_bytes(struct.pack(">HBBI", 0, 13, 1, 1) + b"\0\0\0\0")
    with pytest.raises(InputError, match="type 13"):
        read_idx(tmp_path / "x-idx3")
