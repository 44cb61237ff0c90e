"""embed.py on real pictures: orientations, near-duplicates, resume, corrupt files, engines."""

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
    """Random weights: pictures that are equal to the eye must be near for any trunk."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    cfg = ViTConfig(**SIZES, vit_cls_flag=True, vit_hidden_act="gelu")
    lively(ViT(cfg)).save_pretrained(folder)
    return folder


@pytest.fixture
def pictures(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for i in range(11):
        pixels = rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((60 + i, 50), Image.Resampling.BICUBIC)
        image.save(tmp_path / "in" / ("deep" if i % 2 else "") / f"{i:02d}.png")
    return tmp_path / "in"


def go(capsys, *argv: object) -> str:
    command(embed.main, [str(a) for a in argv])
    return capsys.readouterr().out


def refused(capsys, *argv: object) -> str:
    with pytest.raises(SystemExit) as stop:
        command(embed.main, [str(a) for a in argv])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in err
    return err.splitlines()[-1]


@pytest.mark.parametrize("pool", ["auto", "cls", "mean"])
def test_rows_are_the_encoders_of_length_one(encoder, pictures, tmp_path, capsys, pool):
    out = tmp_path / "index"
    go(capsys, "build", pictures, "--model", encoder, "--out", out, "--pool", pool, "--npz",
       "--batch-size", 4)  # fmt: skip
    index = open_index(out)
    assert index.files == sorted(map(str, pictures.rglob("*.png")))
    vit = embedding.open_encoder(str(encoder), pool)
    pixels = [np.asarray(Image.open(f).resize((32, 32), 2)) / 127.5 - 1 for f in index.files]
    x = torch.tensor(np.stack(pixels), dtype=torch.float32).permute(0, 3, 1, 2)
    with torch.no_grad():
        tokens = vit.forward_features(x)
    wanted = tokens[:, 1:].mean(1) if pool == "mean" else tokens[:, 0]
    wanted = wanted / wanted.norm(dim=-1, keepdim=True)
    np.testing.assert_allclose(index.rows, wanted.numpy(), atol=1e-5)
    kept = np.load(out / "embeddings.npz")
    assert np.array_equal(kept["embeddings"], index.rows) and list(kept["files"]) == index.files
    assert not (out / "embeddings.part").exists()


def test_a_stopped_build_goes_on_and_a_whole_one_grows(encoder, pictures, tmp_path, capsys,
                                                       monkeypatch):  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    go(capsys, "build", pictures, "--model", encoder, "--out", whole)
    original, calls = embedding.embed, []

    def fail_at_third(vit, files):
        calls.append(list(files))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(vit, files)

    monkeypatch.setattr(embedding, "embed", fail_at_third)
    argv = ("build", pictures, "--model", encoder, "--out", parts, "--batch-size", 3)
    with pytest.raises(SystemExit) as stop:
        command(embed.main, [str(a) for a in argv])
    assert stop.value.code == 130
    assert "not finished" in refused(capsys, "duplicates", parts)
    with open(parts / "embeddings.part", "ab") as file:
        file.write(b"half a row")  # as a crash leaves it
    with open(parts / "index.jsonl", "a", encoding="utf-8") as file:
        file.write('{"file": "cut of')
    calls.append("no more failures")
    go(capsys, *argv)
    assert [len(c) for c in calls[4:]] == [3, 2]  # only the five that were missing
    assert open_index(parts).files == open_index(whole).files
    np.testing.assert_allclose(open_index(parts).rows, open_index(whole).rows, atol=1e-6)
    shutil.copy(pictures / "00.png", pictures / "zz.png")
    go(capsys, *argv)
    assert calls[6:] == [[str(pictures / "zz.png")]]
    assert len(open_index(parts).files) == 12


def test_an_encoder_that_learned_more_is_another(encoder, pictures, tmp_path, capsys):
    """The same name with other weights: neither may grow the index nor search it."""
    moved, out = tmp_path / "encoder", tmp_path / "i"
    shutil.copytree(encoder, moved)
    go(capsys, "build", pictures, "--model", moved, "--out", out)
    go(capsys, "build", pictures, "--model", encoder, "--out", tmp_path / "copy")
    go(capsys, "duplicates", out, tmp_path / "copy")  # the same weights by another name
    vit = open_vit(str(moved))
    with torch.no_grad():
        vit.blocks[0].mlp.fc1.weight[0, 0] += 0.01
    vit.save_pretrained(moved)
    for argv in (("build", pictures, "--model", moved, "--out", out),
                 ("search", out, "--image", pictures / "00.png")):  # fmt: skip
        assert "built otherwise (weights: '" in refused(capsys, *argv)


def test_corrupt_files_are_listed_and_passed_over(encoder, pictures, tmp_path, capsys):
    (pictures / "broken.png").write_bytes(b"no picture")
    out = go(capsys, "build", pictures, "--model", encoder, "--out", tmp_path / "i")
    assert "11 images with 48 dimensions" in out and "1 skipped" in out
    line = json.loads((tmp_path / "i" / "skipped.jsonl").read_text())
    assert line["file"].endswith("broken.png") and "not a readable image" in line["reason"]
    out = go(capsys, "build", pictures, "--model", encoder, "--out", tmp_path / "i")
    assert "1 skipped" in out
    assert len((tmp_path / "i" / "skipped.jsonl").read_text().splitlines()) == 1


def test_a_mended_picture_is_added_and_a_changed_one_refused(encoder, pictures, tmp_path, capsys):
    (pictures / "broken.png").write_bytes(b"no picture")
    odd = pictures / "line\u2028break.png"
    shutil.copy(pictures / "00.png", odd)
    shutil.copy(pictures / "00.png", os.fsencode(pictures) + b"/half\xff.png")
    argv = ("build", pictures, "--model", encoder, "--out", tmp_path / "i")
    assert "13 images" in go(capsys, *argv)
    Image.new("RGB", (40, 40), "teal").save(pictures / "broken.png")
    assert "14 images" in go(capsys, *argv)
    assert (
        not (tmp_path / "i" / "skipped.jsonl").exists()
        and str(odd) in open_index(tmp_path / "i").files
    )
    Image.new("RGB", (41, 40), "pink").save(odd)
    assert "has changed since it was indexed; build the index again" in refused(capsys, *argv)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("index.jsonl", "[1]\n", "not the lines of an index"),
        ("index.jsonl", "{}\n", "not the lines of an index"),
        ("about.json", "{}", "names no encoder"),
    ],
)
def test_a_damaged_index_is_told(encoder, pictures, tmp_path, capsys, name, content, says):
    go(capsys, "build", pictures, "--model", encoder, "--out", tmp_path / "i")
    (tmp_path / "i" / name).write_text(content)
    assert says in refused(capsys, "duplicates", tmp_path / "i")
    file = tmp_path / "file"
    file.touch()
    assert "is a file; name a folder" in refused(
        capsys, "build", pictures, "--model", encoder, "--out", file
    )


def test_search_finds_itself_first(encoder, pictures, tmp_path, capsys):
    out = tmp_path / "i"
    go(capsys, "build", pictures, "--model", encoder, "--out", out)
    query = pictures / "deep" / "03.png"
    said = go(capsys, "search", out, "--image", query, "-k", 4,
              "--contact-sheet", tmp_path / "s.png")  # fmt: skip
    lines = [line.split() for line in said.splitlines()[1:5]]
    assert lines[0] == ["1.0000", str(query)]
    scores = [float(score) for score, _ in lines]
    assert scores == sorted(scores, reverse=True) and len(scores) == 4
    assert Image.open(tmp_path / "s.png").width > 5 * 160


def test_nearest_and_alike_are_the_full_sort():
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
    wanted = {(i, j) for i in range(50) for j in range(i + 1, 50) if scores[i, j] >= 0.4}
    assert set(found) == wanted and len(wanted) > 20
    assert between == {(i, j) for i in range(20) for j in range(30) if scores[i, 20 + j] >= 0.4}


def test_faiss_finds_the_same():
    pytest.importorskip("faiss")
    rows = np.random.default_rng(0).normal(size=(300, 16)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    exact, faiss = (find(rows[:20], rows, 3) for find in embedding.ENGINES.values())
    assert np.array_equal(exact[0], faiss[0])
    np.testing.assert_allclose(exact[1], faiss[1], atol=1e-5)


def test_one_scene_in_eight_orientations_is_one_scene(encoder, shared, tmp_path, capsys):
    """Each is its seven siblings' nearest neighbour, among pictures of another shape and theme."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for path in sorted((shared / "images" / "exif_orientation").glob("*.jpg")):
        shutil.copy(path, folder)
    for path in sorted((shared / "images" / "skimage").glob("*.png"))[:12]:
        shutil.copy(path, folder)
    go(capsys, "build", folder, "--model", encoder, "--out", tmp_path / "i")
    index = open_index(tmp_path / "i")
    names = [Path(f).stem for f in index.files]
    scene = {f"Landscape_{i}" for i in range(1, 9)}
    queries = [i for i, name in enumerate(names) if name in scene]
    assert len(queries) == 8
    found, _ = search_exact(index.rows[queries], index.rows, 9)
    for row in found:  # Landscape_0 is the same scene without the tag
        assert {names[i] for i in row} == scene | {"Landscape_0"}


def test_planted_copies_and_leaks_are_found(encoder, pictures, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    image = Image.open(pictures / "02.png")
    image.resize((45, 37)).save(other / "leak.jpg", quality=70)
    Image.effect_noise((40, 40), 60).convert("RGB").save(other / "new.png")
    shutil.copy(pictures / "04.png", pictures / "twin.png")
    for name, folder in (("a", pictures), ("b", other)):
        go(capsys, "build", folder, "--model", encoder, "--out", tmp_path / name)
    go(capsys, "duplicates", tmp_path / "a", "--threshold", 0.9999, "--out", tmp_path / "d.csv",
       "--contact-sheet", tmp_path / "d.png")  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "d.csv").read_text().splitlines()))
    pairs = [{Path(r["one"]).name, Path(r["other"]).name} for r in rows]
    assert pairs == [{"04.png", "twin.png"}] and Image.open(tmp_path / "d.png").width > 300
    out = go(capsys, "duplicates", tmp_path / "a", tmp_path / "b", "--threshold", 0.9)
    leaks = list(csv.DictReader(out.splitlines()))
    assert leaks and leaks[0]["one"].endswith("02.png") and leaks[0]["other"].endswith("leak.jpg")
    assert not any(leak["other"].endswith("new.png") for leak in leaks)


def test_wrong_input_gets_one_sentence(encoder, pictures, small_checkpoint, tmp_path, capsys):
    out = tmp_path / "i"
    assert "no such folder" in refused(capsys, "build", tmp_path / "no", "--model", encoder,
                                       "--out", out)  # fmt: skip
    (tmp_path / "none").mkdir()
    assert "no images" in refused(capsys, "build", tmp_path / "none", "--model", encoder,
                                    "--out", out)  # fmt: skip
    assert not out.exists()
    assert "not an index" in refused(capsys, "search", tmp_path, "--image", pictures / "00.png")
    go(capsys, "build", pictures, "--model", encoder, "--out", out)
    changed = refused(capsys, "build", pictures, "--model", encoder, "--out", out, "--pool", "mean")
    assert "pool: 'cls' then, 'mean' now" in changed
    says = refused(capsys, "search", out, "--image", tmp_path / "gone.png")
    assert "gone.png: no such file" in says
    assert "between -1 and 1" in refused(capsys, "duplicates", out, "--threshold", 2)
    assert "must be one of build" in refused(capsys, "biuld")
    go(capsys, "build", pictures, "--model", small_checkpoint, "--out", tmp_path / "vlm")
    assert read_json(tmp_path / "vlm" / "about.json")["pool"] == "mean"  # a VLM's encoder
    assert "different encoders" in refused(capsys, "duplicates", out, tmp_path / "vlm")
    (out / "embeddings.safetensors").write_bytes(b"torn")
    assert "damaged" in refused(capsys, "duplicates", out)
