"""Images are upright, normalised and augmented differently in every epoch; resume is exact."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessorPil

from configs import ViTConfig
from configs_classify import ClassifyDataConfig
from data.classification.dataset import from_rows
from data.classification.loader import (
    ClassificationLoader,
    ClassificationProcessor,
    evaluation_batches,
    loader_config,
    normalise,
    open_for_vit,
    resize_square,
)
from data.sources.idx import ArrayRows

CFG = ViTConfig(vit_img_size=16, vit_patch_size=4)
GREY = ViTConfig(vit_img_size=16, vit_patch_size=4, vit_n_channels=1, vit_image_mean=(0.2,) * 3,
                 vit_image_std=(0.3,) * 3)  # fmt: skip


def source(n: int = 20, **fields):
    """Rows whose red value encodes their number, so that a view identifies its row."""
    pixels = np.zeros((n, 12, 10, 3), np.uint8)
    pixels[..., 0] = np.arange(n)[:, None, None] * 10
    cfg = ClassifyDataConfig(**dict(batch_size=3, val_fraction=0.0) | fields)
    return from_rows(ArrayRows(pixels, [str(i % 4) for i in range(n)], "rows"), cfg, "train"), cfg


def loader(n: int = 20, model: ViTConfig = CFG, **fields) -> ClassificationLoader:
    rows, cfg = source(n, **fields)
    numbers = {name: i for i, name in enumerate(rows.names)}
    return ClassificationLoader(
        rows, ClassificationProcessor(model, cfg, numbers), loader_config(cfg)
    )


def rows_of(batch) -> list[int]:
    return [round(float(x[0].mean() * 127.5 + 127.5) / 10) for x in batch.images]


@pytest.mark.parametrize("cfg", [CFG, GREY], ids=["colour", "grey"])
def test_an_unaugmented_image_matches_transformers(cfg):
    pixels = np.random.default_rng(0).integers(0, 256, (37, 21, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    opened = open_for_vit(image, cfg)
    n = cfg.vit_n_channels
    reference = ViTImageProcessorPil(
        size={"height": 16, "width": 16}, image_mean=list(cfg.vit_image_mean[:n]),
        image_std=list(cfg.vit_image_std[:n]), resample=2,
    )  # fmt: skip
    channels = np.asarray(opened) if n == 3 else np.asarray(opened)[..., None]
    wanted = reference(channels, return_tensors="pt", input_data_format="channels_last")
    found = normalise([resize_square(opened, cfg)], cfg)
    assert found.shape == (1, n, 16, 16)
    torch.testing.assert_close(found, wanted["pixel_values"], rtol=0, atol=1e-5)


def test_every_row_occurs_once_per_epoch_with_its_class():
    batches, seen = iter(loader()), []
    for _ in range(20):  # three epochs of 20 rows in batches of three
        batch = next(batches)
        assert batch.targets.tolist() == [i % 4 for i in rows_of(batch)]
        assert batch.n_targets == 3 and batch.n_tokens == 3 * 16
        seen += rows_of(batch)
    epochs = [seen[i : i + 20] for i in (0, 20, 40)]
    assert [sorted(e) for e in epochs] == [list(range(20))] * 3
    assert epochs[0] != epochs[1]


def test_each_epoch_augments_an_image_differently():
    rng = np.random.default_rng(0)
    cfg = ClassifyDataConfig(batch_size=1, crop_min_scale=0.3, val_fraction=0.0)
    rows = ArrayRows(rng.integers(0, 256, (2, 20, 20, 3), dtype=np.uint8), ["a", "b"], "rows")
    found = from_rows(rows, cfg, "train")
    batches = iter(
        ClassificationLoader(
            found, ClassificationProcessor(CFG, cfg, {"a": 0, "b": 1}), loader_config(cfg)
        )
    )
    views = [next(batches).images.numpy().tobytes() for _ in range(8)]
    assert len(set(views)) == 8


MIXED = dict(
    crop_min_scale=0.5,
    horizontal_flip=0.5,
    randaugment=1,
    random_erasing=0.3,
    mixup=0.5,
    cutmix=0.5,
)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_loader_gives_the_same_batches(workers):
    batches = iter(loader(**MIXED, workers=workers))
    first = [next(batches) for _ in range(9)]
    again = loader(**MIXED)
    again.load_state_dict(first[4].state)
    batches = iter(again)
    for wanted in first[5:]:
        found = next(batches)
        assert torch.equal(found.images, wanted.images)
        assert torch.equal(found.targets, wanted.targets) and found.state == wanted.state


def test_targets_are_probabilities_only_with_mixing_or_smoothing():
    assert next(iter(loader())).targets.dtype == torch.int64
    for fields in (dict(mixup=1.0), dict(cutmix=1.0), dict(label_smoothing=0.1)):
        targets = next(iter(loader(**fields))).targets
        assert targets.shape == (3, 4)
        torch.testing.assert_close(targets.sum(1), torch.ones(3))


def test_ranks_share_a_global_order():
    whole = iter(loader())
    rows, cfg = source()
    numbers = {name: i for i, name in enumerate(rows.names)}
    ranks = [
        iter(
            ClassificationLoader(
                rows, ClassificationProcessor(CFG, cfg, numbers), loader_config(cfg), rank, 2
            )
        )
        for rank in (0, 1)
    ]
    for _ in range(6):
        for rank in ranks:
            assert rows_of(next(rank)) == rows_of(next(whole))


def test_corrupt_images_are_skipped_and_listed_once(tmp_path):
    for i in range(8):
        Image.new("RGB", (5, 5), (10 * i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes(b"not an image")
    rows = [{"image": f"{i}.png", "label": "ab"[i % 2]} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    from data.classification.dataset import open_classification

    cfg = ClassifyDataConfig(source=str(tmp_path / "rows.jsonl"), batch_size=7, val_fraction=0.0)
    found = open_classification(cfg, "train")
    processor = ClassificationProcessor(CFG, cfg, {"a": 0, "b": 1})
    one = ClassificationLoader(
        found, processor, loader_config(cfg), skipped_file=tmp_path / "skipped.jsonl"
    )
    batches = iter(one)
    for _ in range(3):
        assert sorted(rows_of(next(batches))) == [0, 1, 2, 4, 5, 6, 7]
    assert one.skipped == [3]
    lines = (tmp_path / "skipped.jsonl").read_text().splitlines()
    assert len(lines) == 1 and "3.png" in lines[0]
    whole = list(evaluation_batches(found, CFG, ("a", "b"), batch_size=4))
    assert [len(batch.targets) for batch, _ in whole] == [3, 4]
    assert "3.png" in whole[0][1][0] and whole[1][1] == []


def test_augmentation_depends_only_on_the_index():
    """Not on the worker or on the global random state."""
    rows, cfg = source(crop_min_scale=0.4, horizontal_flip=0.5)
    processor = ClassificationProcessor(CFG, cfg, {str(i): i for i in range(4)})
    first = processor.encode((rows[3], 23))
    random.random()
    again = processor.encode((rows[3], 23))
    assert np.array_equal(first.pixels, again.pixels) and first.label == again.label == 3
