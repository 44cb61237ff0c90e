"""ViT benchmarks compare like with like, and prepared labels match the images."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.quality import digits, duplicates, prepare, small_data, transfer

RGB = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "black": (0, 0, 0),
       "gray": (128, 128, 128), "teal": (0, 128, 128), "brown": (165, 42, 42),
       "yellow": (255, 255, 0)}  # fmt: skip


def test_both_vits_have_equal_logits_after_training_from_the_same_weights():
    """After three steps with the same data, optimizer and rates both give the same logits."""
    pixels, target = digits.digits()
    source = digits.source_of(pixels[:200], target[:200], digits.DATA)
    cfg, logits = replace(digits.TRAIN, steps=3, warmup=1), {}
    for name in ("picoVLM", "transformers, same weights"):
        torch.manual_seed(0)
        model = digits.MODELS[name]()
        digits.fit(model, digits.loader_of(source, digits.MODEL, digits.DATA), cfg)
        x = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            logits[name] = model.eval()(x)[0]
    assert logits["picoVLM"].std() > 0.1
    torch.testing.assert_close(*logits.values(), rtol=0, atol=1e-3)


def test_compared_models_have_the_same_number_of_parameters():
    count = lambda model: sum(p.numel() for p in model.parameters())  # noqa: E731
    assert len({count(make()) for make in digits.MODELS.values()}) == 1
    vit, cnn = (count(make()) for make in small_data.MODELS.values())
    assert abs(cnn / vit - 1) < 0.02


def test_every_digit_is_tested_once():
    _, target = digits.digits()
    found = list(digits.folds(target))
    assert len(found) == 5
    assert sorted(np.concatenate([test for _, test in found])) == list(range(1797))
    for train, test in found:
        assert not set(train) & set(test)


@pytest.mark.parametrize(
    ("question", "answer", "labels"),
    [
        ("what is the blue shape?", "circle", {"colour": "blue", "shape": "circle"}),
        ("what color is the triangle?", "teal", {"colour": "teal", "shape": "triangle"}),
        ("is there a red shape?", "yes", {"colour": "red"}),
        ("is there a red shape?", "no", {}),
        ("does the image not contain a circle?", "no", {"shape": "circle"}),
        ("does the image not contain a circle?", "yes", {}),
    ],
)
def test_questions_give_labels(question, answer, labels):
    assert prepare.parse_answer(question, answer) == labels


def test_colours_of_the_questions_match_the_pixels(shared, tmp_path):
    prepare.easy_vqa(shared / "datasets" / "easy_vqa", tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    assert len(rows) == 880 and {len(row) for row in rows} == {4}
    for row in rows[::11]:
        pixels = np.asarray(Image.open(row["image"]).convert("RGB")).astype(int)
        away = np.abs(pixels - pixels[0, 0]).sum(-1)  # from the background
        colour = np.median(pixels[away > 0.6 * away.max()], 0)
        near = min(RGB, key=lambda name: np.abs(np.array(RGB[name]) - colour).sum())
        assert near == row["colour"] and row["label"] == f"{near} {row['shape']}"


def test_near_duplicates_belong_to_their_original_and_equal_images_are_one(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "set" / "images"
    folder.mkdir(parents=True)
    for name in ("a", "b", "c"):
        pixels = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((80, 60)).save(folder / f"{name}.png")
    (folder / "d.png").write_bytes((folder / "b.png").read_bytes())
    shows = duplicates.plant(sorted(folder.glob("*.png")), tmp_path / "out", every=2)
    sizes = {Path(f).stem: Image.open(f).size for f in shows}
    assert len(shows) == 10 and sizes["set-a-resized"] == (48, 36)
    assert sizes["set-c-cropped"] == (76, 56) and sizes["set-c-jpeg"] == (80, 60)
    assert shows[str(tmp_path / "out" / "set-d.png")] == "set-b"
    cosine, same = duplicates.scores(np.eye(10, dtype=np.float32), list(shows.values()))
    assert not cosine.any() and len(same) == 45 and same.sum() == 6 + 6 + 1
    cosine, same = np.array([0.9, 0.8, 0.3, 0.2]), np.array([True, False, True, True])
    assert duplicates.rates(cosine, same, 0.5) == (1 / 2, 1 / 3)


def test_learning_rates_are_not_chosen_on_test_images(tmp_path, monkeypatch):
    """Each method is tested at its best rate, on images that no choice was made on."""
    lines = [json.dumps({"n": n}) + "\n" for n in range(700)]
    (tmp_path / "train.jsonl").write_text("".join(lines))
    transfer.split(tmp_path)
    learn, choose = ((tmp_path / f"{name}.jsonl").read_text() for name in ("learn", "choose"))
    assert learn + choose == "".join(lines) and choose.count("\n") == 500
    calls = []

    def run(kind, rate, seed, val, given):
        calls.append((kind, rate, seed, val))
        return 1 - abs(rate - (0.016 if kind == "fine-tuned" else 0.01)) + seed / 1000

    monkeypatch.setattr(transfer, "run", run)
    found = transfer.compare({})
    tested = {(kind, rate) for kind, rate, _, val in calls if val == "test"}
    assert tested == {("from scratch", 0.008), ("fine-tuned", 0.016), ("linear probe", 0.01)}
    assert [len(values) for values in found.values()] == [5, 5, 5]
    assert all(val == "choose" for _, _, seed, val in calls if seed == transfer.TRIAL)


def test_thumbnails_of_equal_names_get_different_files(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name / "images").mkdir(parents=True)
        Image.new("RGB", (200, 100), "red").save(tmp_path / name / "images" / "a.png")
    rows = duplicates.shrink(sorted(tmp_path.rglob("a.png")), tmp_path / "small", side=50)
    assert [row["label"] for row in rows] == ["one-a", "two-a"]
    assert {Image.open(row["image"]).size for row in rows} == {(50, 25)}
