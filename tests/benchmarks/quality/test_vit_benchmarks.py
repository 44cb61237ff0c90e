"""What the ViT's benchmarks compare is comparable, and their labels are what the pictures show."""

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


def test_their_vit_learns_as_ours_from_the_same_weights():
    """Three steps each: the same views, optimizer and rates give the same weights."""
    pixels, target = digits.digits()
    source = digits.source_of(pixels[:200], target[:200], digits.DATA)
    cfg, logits = replace(digits.TRAIN, steps=3, warmup=1), {}
    for name in ("ours", "theirs, our first weights"):
        torch.manual_seed(0)
        model = digits.MODELS[name]()
        digits.fit(model, digits.loader_of(source, digits.MODEL, digits.DATA), cfg)
        x = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            logits[name] = model.eval()(x)[0]
    assert logits["ours"].std() > 0.1
    torch.testing.assert_close(*logits.values(), rtol=0, atol=1e-3)


def test_what_is_compared_has_as_many_parameters():
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
    ("question", "answer", "says"),
    [
        ("what is the blue shape?", "circle", {"colour": "blue", "shape": "circle"}),
        ("what color is the triangle?", "teal", {"colour": "teal", "shape": "triangle"}),
        ("is there a red shape?", "yes", {"colour": "red"}),
        ("is there a red shape?", "no", {}),
        ("does the image not contain a circle?", "no", {"shape": "circle"}),
        ("does the image not contain a circle?", "yes", {}),
    ],
)
def test_questions_tell_what_is_there(question, answer, says):
    assert prepare.told(question, answer) == says


def test_colours_that_questions_tell_are_the_pictures(shared, tmp_path):
    prepare.easy_vqa(shared / "datasets" / "easy_vqa", tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    assert len(rows) == 880 and {len(row) for row in rows} == {4}
    for row in rows[::11]:
        pixels = np.asarray(Image.open(row["image"]).convert("RGB")).astype(int)
        away = np.abs(pixels - pixels[0, 0]).sum(-1)  # from the background
        colour = np.median(pixels[away > 0.6 * away.max()], 0)
        near = min(RGB, key=lambda name: np.abs(np.array(RGB[name]) - colour).sum())
        assert near == row["colour"] and row["label"] == f"{near} {row['shape']}"


def test_plants_are_their_picture_and_twins_are_one(tmp_path):
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


def test_rates_are_chosen_apart_from_what_is_measured(tmp_path, monkeypatch):
    """Each way is tested at the rate that did best for it, on pictures nothing was chosen on."""
    lines = [json.dumps({"n": n}) + "\n" for n in range(700)]
    (tmp_path / "train.jsonl").write_text("".join(lines))
    transfer.split(tmp_path)
    learn, choose = ((tmp_path / f"{name}.jsonl").read_text() for name in ("learn", "choose"))
    assert learn + choose == "".join(lines) and choose.count("\n") == 500
    asked = []

    def run(way, kind, label, rate, seed, val, given):
        asked.append((kind, rate, seed, val))
        return 1 - abs(rate - (0.016 if kind == "fine-tuned" else 0.01)) + seed / 1000

    monkeypatch.setattr(transfer, "run", run)
    found = transfer.compare("shape", 2, {})
    tested = {(kind, rate) for kind, rate, _, val in asked if val == "test"}
    assert tested == {("from scratch", 0.008), ("fine-tuned", 0.016), ("linear probe", 0.01)}
    assert [len(values) for values in found.values()] == [2, 2, 2]
    assert all(val == "choose" for _, _, seed, val in asked if seed == transfer.TRIAL)


def test_shrunk_pictures_keep_their_names_apart(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name / "images").mkdir(parents=True)
        Image.new("RGB", (200, 100), "red").save(tmp_path / name / "images" / "a.png")
    rows = duplicates.shrink(sorted(tmp_path.rglob("a.png")), tmp_path / "small", side=50)
    assert [row["label"] for row in rows] == ["one-a", "two-a"]
    assert {Image.open(row["image"]).size for row in rows} == {(50, 25)}
