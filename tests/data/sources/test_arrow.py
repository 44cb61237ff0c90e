"""Parquet files, saved datasets and Hub datasets: equal rows, with images as encoded bytes."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from config_tools import InputError
from configs import DataConfig
from data.images import open_image
from data.sources import fetch
from data.sources.fetch import hash_image, image_identity
from data.sources.open import open_dataset, open_rows

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def noise(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 10 + seed, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def cauldron(n: int) -> Dataset:
    """Lists of images and of texts, as in The Cauldron and FineVision."""
    texts = List({"user": Value("string"), "assistant": Value("string"), "source": Value("string")})
    rows = {
        "images": [[noise(i), noise(i + 1)] if i % 3 else [] for i in range(n)],
        "texts": [[{"user": f"q{i}", "assistant": f"a{i}", "source": "s"}] for i in range(n)],
    }
    return Dataset.from_dict(rows, Features({"images": List(ImageFeature()), "texts": texts}))


def check_cauldron(source, n: int) -> None:
    assert len(source) == n and source.skipped == ()
    for i in range(n):
        sample = source[i]
        places = "<image><image>" if i % 3 else ""
        assert sample.turns == (("user", f"{places}q{i}"), ("assistant", f"a{i}"))
        assert sample.row.endswith(f"row {i + 1}")
        for image, seed in zip(sample.images, (i, i + 1)):
            assert isinstance(image, bytes)
            assert open_image(image).tobytes() == noise(seed).tobytes()
        assert len(sample.images) == (2 if i % 3 else 0)


def test_parquet_saved_datasets_and_splits(tmp_path):
    data = cauldron(7)
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "saved")
    DatasetDict({"train": data, "test": data.select(range(2))}).save_to_disk(tmp_path / "parts")
    (tmp_path / "shards").mkdir()
    for k in range(2):
        part = data.select(range(4 * k, min(7, 4 * k + 4)))
        part.to_parquet(tmp_path / "shards" / f"{k}.parquet")
    names = ("a.parquet", "saved", "parts", "parts@train", "shards")
    for name, n in (*((name, 7) for name in names), ("parts@test", 2)):
        check_cauldron(open_dataset(DataConfig(source=str(tmp_path / name)), "test"), n)


def test_class_numbers_become_names(tmp_path):
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["cat", "dog"])})
    data = Dataset.from_dict({"image": [noise(0), noise(1)], "label": [1, 0]}, features)
    data.save_to_disk(tmp_path / "pets")
    source = open_dataset(DataConfig(source=str(tmp_path / "pets")), "test")
    assert [source[i].turns[1].text for i in range(2)] == ["dog", "cat"]
    assert source.notes[0].endswith("2 rows of image + label; 0 of them for validation")


def test_scan_replaces_image_bytes_by_hashes(tmp_path, monkeypatch):
    """The hash equals that of the image, so both select the same split."""
    monkeypatch.setattr(fetch, "MAX_HASHED", 100)
    cauldron(5).save_to_disk(tmp_path / "saved")
    reader = pickle.loads(pickle.dumps(open_rows(str(tmp_path / "saved"))))
    for k, scanned in enumerate(reader.scan()):
        whole = reader[k]
        assert scanned["texts"] == whole["texts"]
        for a, b in zip(scanned["images"], whole["images"], strict=True):
            assert a["bytes"] == hash_image(b["bytes"]) and len(a["bytes"]) == 16


def test_images_with_equal_last_bytes_have_different_hashes():
    """For example, uncompressed images with a white margin."""
    one, two = (Image.new("L", (150, 150)) for _ in range(2))
    one.putpixel((9, 9), 255)
    for kind in ("bmp", "ppm", "tiff"):
        files = [io.BytesIO() for _ in range(2)]
        for image, file in zip((one, two), files, strict=True):
            image.save(file, kind)
        a, b = (file.getvalue() for file in files)
        assert a[-64:] == b[-64:] and len(a) == len(b) and hash_image(a) != hash_image(b), kind
    assert hash_image(b"\xff" * 20_000) != hash_image(b"\xff" * 20_001)
    assert hash_image(hash_image(b"\xff" * 20_000)) == hash_image(b"\xff" * 20_000)
    assert image_identity(one) != image_identity(two) and image_identity(one) == image_identity(
        one.copy()
    )


def test_values_that_datasets_stores_as_json(tmp_path):
    """`datasets` stores a JSONL column with texts and lists as JSON."""
    mixed = [[{"role": "user", "content": [{"type": "text", "text": "q"}]},
              {"role": "assistant", "content": "cat"}],
             [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}]]  # fmt: skip
    Dataset.from_dict({"messages": mixed}, on_mixed_types="use_json").save_to_disk(tmp_path / "a")
    source = open_dataset(DataConfig(source=str(tmp_path / "a")), "test")
    assert source.skipped == () and [source[i].turns for i in range(2)] == [
        (("user", "q"), ("assistant", "cat")), (("user", "q"), ("assistant", "x"))
    ]  # fmt: skip


def test_images_in_both_splits_are_reported(tmp_path):
    rows = [{"image": {"bytes": png(i % 5), "path": None}, "caption": f"c{i}"} for i in range(40)]
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    source = open_dataset(DataConfig(source=str(tmp_path / "saved"), val_fraction=0.3), "val")
    assert f"also in training rows: {len(source)}" in source.notes[1] and len(source) > 3


def png(seed: int) -> bytes:
    file = io.BytesIO()
    noise(seed).save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize(
    "name, message",
    [
        ("parts@val", r"parts: no split 'val'; add @ and one of train, test"),
        ("no_train", r"no_train: no split named train; add @ and one of left, right"),
        ("saved@x", r"saved: has no splits; leave out @x"),
        ("bad.parquet", r"bad\.parquet: cannot be opened as a dataset \(Parquet magic bytes"),
        ("empty.parquet", r"empty\.parquet: no rows"),
        ("none.parquet", r"none\.parquet: no such file"),
        ("other.parquet", r"4 rows are unus.*row 1: no 'question' in the columns \(img, cap"),
    ],
)
def test_errors_on_opening_are_one_line(tmp_path, name, message):
    data = cauldron(3)
    data.save_to_disk(tmp_path / "saved")
    DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "parts")
    DatasetDict({"left": data, "right": data}).save_to_disk(tmp_path / "no_train")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1" + 99 * b"x")
    (tmp_path / "empty.parquet").touch()
    Dataset.from_dict({"img": ["a.png"] * 4 * 6, "cap": ["c"] * 4 * 6}).to_parquet(
        tmp_path / "other.parquet"
    )
    with pytest.raises(InputError, match=message) as caught:
        open_dataset(DataConfig(source=str(tmp_path / name)), "train")
    assert "\n" not in str(caught.value)


def test_hub_names_are_opened_by_datasets(monkeypatch):
    """Only `hf:` sources use the network; offline, the error names the source."""
    asked = []

    def load(repository, configuration):
        asked.append((repository, configuration))
        return DatasetDict({"train": cauldron(3), "validation": cauldron(2)})

    with pytest.raises(InputError, match=r"nobody/nothing: cannot be opened as a dataset \(Could"):
        open_dataset(DataConfig(source="hf:nobody/nothing"), "train")
    monkeypatch.setattr(datasets, "load_dataset", load)
    check_cauldron(open_dataset(DataConfig(source="hf:owner/name:ai2d"), "test"), 3)
    check_cauldron(open_dataset(DataConfig(source="hf:owner/name@validation"), "test"), 2)
    assert asked == [("owner/name", "ai2d"), ("owner/name", None)]


ALONE = """
import sys
sys.modules["datasets"] = sys.modules["pyarrow"] = sys.modules["pandas"] = None
import train
train.main(sys.argv[1:])
from configs import DataConfig
from config_tools import InputError
from data.sources.open import open_dataset
try:
    open_dataset(DataConfig(source="a.parquet"), "train")
except InputError as error:
    print(error)
"""


def test_jsonl_rows_train_without_datasets(tmp_path, run_file):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(run_file(steps=1))], cwd=tmp_path, text=True,
        capture_output=True, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "a.parquet: needs the package datasets; run `pip install datasets`." in done.stdout
