"""embed.py: building and resuming an index, search, near-duplicates, and error messages."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import embed
from cli import command
from config_tools import read_json
from configs import ViTConfig
from engine.vit import embedding
from engine.vit.embedding import open_index, search_exact, similar_pairs
from models.pretrained.load import open_vit
from models.vision_transformer import ViT

SIZES = dict(vit_img_size=32, vit_patch_size=8, vit_hidden_dim=48, vit_inter_dim=64, vit_n_heads=4,
             vit_n_blocks=2)  # fmt: skip


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, lively) -> Path:
    """Random weights, because near-duplicates must be close for any encoder."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    cfg = ViTConfig(**SIZES, vit_cls_flag=True, vit_hidden_act="gelu")
    lively(ViT(cfg)).save_pretrained(folder)
    return folder


@pytest.fixture
def images(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for i in range(11):
        pixels = rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((60 + i, 50), Image.Resampling.BICUBIC)
        image.save(tmp_path / "in" / ("deep" if i % 2 else "") / f"{i:02d}.png")
    return tmp_path / "in"


def run(capsys, *argv: object) -> str:
    command(embed.main, [str(a) for a in argv])
    return capsys.readouterr().out


def refused(capsys, *argv: object) -> str:
    with pytest.raises(SystemExit) as stop:
        command(embed.main, [str(a) for a in argv])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in err
    return err.splitlines()[-1]


@pytest.mark.parametrize("pool", ["auto", "cls", "mean"])
def test_embeddings_are_pooled_unit_vectors(encoder, images, tmp_path, capsys, pool):
    out = tmp_path / "index"
    run(capsys, "build", images, "--model", encoder, "--out", out, "--pool", pool, "--npz",
       "--batch-size", 4)  # fmt: skip
    index = open_index(out)
    assert index.files == sorted(map(str, images.rglob("*.png")))
    vit = embedding.open_encoder(str(encoder), pool)
    pixels = [np.asarray(Image.open(f).resize((32, 32), 2)) / 127.5 - 1 for f in index.files]
    x = torch.tensor(np.stack(pixels), dtype=torch.float32).permute(0, 3, 1, 2)
    with torch.no_grad():
        tokens = vit.forward_features(x)
    expected = tokens[:, 1:].mean(1) if pool == "mean" else tokens[:, 0]
    expected = expected / expected.norm(dim=-1, keepdim=True)
    np.testing.assert_allclose(index.rows, expected.numpy(), atol=1e-5)
    saved = np.load(out / "embeddings.npz")
    assert np.array_equal(saved["embeddings"], index.rows) and list(saved["files"]) == index.files
    assert not (out / "embeddings.part").exists()


def test_an_interrupted_build_resumes_and_images_can_be_added(encoder, images, tmp_path, capsys,
                                                       monkeypatch):  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(capsys, "build", images, "--model", encoder, "--out", whole)
    original, calls = embedding.embed, []

    def fail_at_third(vit, files):
        calls.append(list(files))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(vit, files)

    monkeypatch.setattr(embedding, "embed", fail_at_third)
    argv = ("build", images, "--model", encoder, "--out", parts, "--batch-size", 3)
    with pytest.raises(SystemExit) as stop:
        command(embed.main, [str(a) for a in argv])
    assert stop.value.code == 130
    assert "not finished" in refused(capsys, "duplicates", parts)
    with open(parts / "embeddings.part", "ab") as file:
        file.write(b"half a row")  # as after a crash
    with open(parts / "index.jsonl", "a", encoding="utf-8") as file:
        file.write('{"file": "cut of')
    calls.append("no more failures")
    run(capsys, *argv)
    assert [len(c) for c in calls[4:]] == [3, 2]  # only the five missing images
    assert open_index(parts).files == open_index(whole).files
    np.testing.assert_allclose(open_index(parts).rows, open_index(whole).rows, atol=1e-6)
    shutil.copy(images / "00.png", images / "zz.png")
    run(capsys, *argv)
    assert calls[6:] == [[str(images / "zz.png")]]
    assert len(open_index(parts).files) == 12


def test_an_encoder_with_other_weights_is_refused(encoder, images, tmp_path, capsys):
    """An encoder with changed weights can neither add to an index nor search it."""
    moved, out = tmp_path / "encoder", tmp_path / "i"
    shutil.copytree(encoder, moved)
    run(capsys, "build", images, "--model", moved, "--out", out)
    run(capsys, "build", images, "--model", encoder, "--out", tmp_path / "copy")
    run(capsys, "duplicates", out, tmp_path / "copy")  # another path, but the same weights
    vit = open_vit(str(moved))
    with torch.no_grad():
        vit.blocks[0].mlp.fc1.weight[0, 0] += 0.01
    vit.save_pretrained(moved)
    for argv in (("build", images, "--model", moved, "--out", out),
                 ("search", out, "--image", images / "00.png")):  # fmt: skip
        assert "built with other settings (weights: was '" in refused(capsys, *argv)


def test_corrupt_files_are_skipped_and_listed(encoder, images, tmp_path, capsys):
    (images / "broken.png").write_bytes(b"not an image")
    out = run(capsys, "build", images, "--model", encoder, "--out", tmp_path / "i")
    assert "11 images with 48 dimensions" in out and "1 skipped" in out
    line = json.loads((tmp_path / "i" / "skipped.jsonl").read_text())
    assert line["file"].endswith("broken.png") and "not a readable image" in line["reason"]
    out = run(capsys, "build", images, "--model", encoder, "--out", tmp_path / "i")
    assert "1 skipped" in out
    assert len((tmp_path / "i" / "skipped.jsonl").read_text().splitlines()) == 1


def test_repaired_images_are_added_and_changed_ones_refused(encoder, images, tmp_path, capsys):
    (images / "broken.png").write_bytes(b"not an image")
    odd = images / "line\u2028break.png"
    shutil.copy(images / "00.png", odd)
    shutil.copy(images / "00.png", os.fsencode(images) + b"/half\xff.png")
    argv = ("build", images, "--model", encoder, "--out", tmp_path / "i")
    assert "13 images" in run(capsys, *argv)
    Image.new("RGB", (40, 40), "teal").save(images / "broken.png")
    assert "14 images" in run(capsys, *argv)
    assert (
        not (tmp_path / "i" / "skipped.jsonl").exists()
        and str(odd) in open_index(tmp_path / "i").files
    )
    Image.new("RGB", (41, 40), "pink").save(odd)
    assert "has changed since it was indexed; build the index again" in refused(capsys, *argv)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("index.jsonl", "[1]\n", "index.jsonl: damaged"),
        ("index.jsonl", "{}\n", "index.jsonl: damaged"),
        ("about.json", "{}", "'model' or 'pool' is missing"),
    ],
)
def test_a_damaged_index(encoder, images, tmp_path, capsys, name, content, message):
    run(capsys, "build", images, "--model", encoder, "--out", tmp_path / "i")
    (tmp_path / "i" / name).write_text(content)
    assert message in refused(capsys, "duplicates", tmp_path / "i")
    file = tmp_path / "file"
    file.touch()
    assert "is a file; name a folder" in refused(
        capsys, "build", images, "--model", encoder, "--out", file
    )


def test_search_returns_the_query_image_first(encoder, images, tmp_path, capsys):
    out = tmp_path / "i"
    run(capsys, "build", images, "--model", encoder, "--out", out)
    query = images / "deep" / "03.png"
    printed = run(capsys, "search", out, "--image", query, "-k", 4,
              "--contact-sheet", tmp_path / "s.png")  # fmt: skip
    lines = [line.split() for line in printed.splitlines()[1:5]]
    assert lines[0] == ["1.0000", str(query)]
    scores = [float(score) for score, _ in lines]
    assert scores == sorted(scores, reverse=True) and len(scores) == 4
    assert Image.open(tmp_path / "s.png").width > 5 * 160


def test_search_and_pairs_match_a_full_comparison():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(50, 8)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    numbers, cosines = search_exact(rows[:7], rows, 5)
    order = np.argsort(-(rows[:7] @ rows.T), axis=1)[:, :5]
    assert np.array_equal(numbers, order)
    np.testing.assert_allclose(cosines, np.take_along_axis(rows[:7] @ rows.T, order, 1))
    assert search_exact(rows[:1], rows[:3], 9)[0].shape == (1, 3)
    embedding_step = embedding.MAX_SIMILARITIES
    try:
        embedding.MAX_SIMILARITIES = 150  # three rows at a time
        found = {(i, j): c for i, j, c in similar_pairs(rows, None, 0.4)}
        between = {(i, j) for i, j, _ in similar_pairs(rows[:20], rows[20:], 0.4)}
    finally:
        embedding.MAX_SIMILARITIES = embedding_step
    scores = rows @ rows.T
    expected = {(i, j) for i in range(50) for j in range(i + 1, 50) if scores[i, j] >= 0.4}
    assert set(found) == expected and len(expected) > 20
    assert between == {(i, j) for i in range(20) for j in range(30) if scores[i, 20 + j] >= 0.4}


def test_faiss_finds_the_same_images():
    pytest.importorskip("faiss")
    rows = np.random.default_rng(0).normal(size=(300, 16)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    exact, faiss = (find(rows[:20], rows, 3) for find in embedding.ENGINES.values())
    assert np.array_equal(exact[0], faiss[0])
    np.testing.assert_allclose(exact[1], faiss[1], atol=1e-5)


def test_exif_orientations_of_a_photo_are_nearest_neighbours(encoder, shared, tmp_path, capsys):
    """Files of the same photo are each other's nearest neighbours, among other images."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for path in sorted((shared / "images" / "exif_orientation").glob("*.jpg")):
        shutil.copy(path, folder)
    for path in sorted((shared / "images" / "skimage").glob("*.png"))[:12]:
        shutil.copy(path, folder)
    run(capsys, "build", folder, "--model", encoder, "--out", tmp_path / "i")
    index = open_index(tmp_path / "i")
    names = [Path(f).stem for f in index.files]
    scene = {f"Landscape_{i}" for i in range(1, 9)}
    queries = [i for i, name in enumerate(names) if name in scene]
    assert len(queries) == 8
    found, _ = search_exact(index.rows[queries], index.rows, 9)
    for row in found:  # Landscape_0 is the same scene without the tag
        assert {names[i] for i in row} == scene | {"Landscape_0"}


def test_duplicates_and_leaks(encoder, images, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    image = Image.open(images / "02.png")
    image.resize((45, 37)).save(other / "leak.jpg", quality=70)
    Image.effect_noise((40, 40), 60).convert("RGB").save(other / "new.png")
    shutil.copy(images / "04.png", images / "twin.png")
    for name, folder in (("a", images), ("b", other)):
        run(capsys, "build", folder, "--model", encoder, "--out", tmp_path / name)
    run(capsys, "duplicates", tmp_path / "a", "--threshold", 0.9999, "--out", tmp_path / "d.csv",
       "--contact-sheet", tmp_path / "d.png")  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "d.csv").read_text().splitlines()))
    pairs = [{Path(r["one"]).name, Path(r["other"]).name} for r in rows]
    assert pairs == [{"04.png", "twin.png"}] and Image.open(tmp_path / "d.png").width > 300
    out = run(capsys, "duplicates", tmp_path / "a", tmp_path / "b", "--threshold", 0.9)
    leaks = list(csv.DictReader(out.splitlines()))
    assert leaks and leaks[0]["one"].endswith("02.png") and leaks[0]["other"].endswith("leak.jpg")
    assert not any(leak["other"].endswith("new.png") for leak in leaks)


def test_error_messages(encoder, images, small_checkpoint, tmp_path, capsys):
    out = tmp_path / "i"
    assert "no such folder" in refused(capsys, "build", tmp_path / "no", "--model", encoder,
                                       "--out", out)  # fmt: skip
    (tmp_path / "none").mkdir()
    assert "no images" in refused(capsys, "build", tmp_path / "none", "--model", encoder,
                                    "--out", out)  # fmt: skip
    assert not out.exists()
    assert "not an index" in refused(capsys, "search", tmp_path, "--image", images / "00.png")
    run(capsys, "build", images, "--model", encoder, "--out", out)
    changed = refused(capsys, "build", images, "--model", encoder, "--out", out, "--pool", "mean")
    assert "pool: was 'cls', now 'mean'" in changed
    message = refused(capsys, "search", out, "--image", tmp_path / "gone.png")
    assert "gone.png: no such file" in message
    assert "between -1 and 1" in refused(capsys, "duplicates", out, "--threshold", 2)
    assert "must be one of build" in refused(capsys, "biuld")
    run(capsys, "build", images, "--model", small_checkpoint, "--out", tmp_path / "vlm")
    assert read_json(tmp_path / "vlm" / "about.json")["pool"] == "mean"  # a VLM's encoder
    assert "different encoders" in refused(capsys, "duplicates", out, tmp_path / "vlm")
    (out / "embeddings.safetensors").write_bytes(b"damaged")
    assert "damaged" in refused(capsys, "duplicates", out)
