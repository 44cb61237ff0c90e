"""classify.py end to end on image files: train, resume, evaluate, predict, export, rollout."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file

import classify
import train
from benchmarks.quality import duplicates, prepare
from cli import command
from config_tools import read_json
from engine.training import loop
from engine.vit.classification import open_classifier
from models.pretrained.load import open_vit

TINY = ("--model.vit-img-size 16 --model.vit-patch-size 4 --model.vit-hidden-dim 32 "
        "--model.vit-inter-dim 48 --model.vit-n-heads 2 --model.vit-n-blocks 2 "
        "--data.batch-size 8 --train.warmup 2 --train.log-every 1 "
        "--train.precision fp32")  # fmt: skip
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220)}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Three classes of noisy images in different colours, one folder per class."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, n in (("train", 24), ("val", 10)):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = np.array(colour) + rng.integers(-30, 30, (18 + i % 3, 20, 3))
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                image.save(root / split / name / f"{i}.png")
    return root


def train_flags(images: Path, out: Path, steps: int, *more: object) -> list[str]:
    flags = f"small --data.source {images}/train --data.val {images}/val --train.out {out}"
    return [*flags.split(), *TINY.split(), "--train.steps", str(steps), *map(str, more)]


def run(*argv: object) -> None:
    command(classify.main, [str(a) for a in argv])


def refused(capsys, *argv: object) -> str:
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in err
    return err.splitlines()[-1]


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "colours"
    run("train", *train_flags(images, out, 40, "--train.eval-every", 20))
    return out


def test_broken_validation_images_do_not_lose_the_training(images, tmp_path, capsys):
    for colour in COLOURS:
        (tmp_path / "val" / colour).mkdir(parents=True)
        (tmp_path / "val" / colour / "a.png").write_bytes(b"not an image")
    flags = ["--data.val", tmp_path / "val", "--train.save-every", "0"]
    assert "no image can be opened" in refused(
        capsys, "train", *train_flags(images, tmp_path / "run", 3, *flags)
    )
    assert (tmp_path / "run" / "step-000003").is_dir()


def test_training_learns_the_colours(trained):
    result = read_json(trained / "result.json")
    assert result["val_accuracy"] == 1.0 and result["images"] == 30
    assert {row["class"]: row["recall"] for row in result["classes"]} == dict.fromkeys(COLOURS, 1.0)
    events = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    losses = [e["loss"] for e in events if "loss" in e]
    assert len(losses) == 40 and losses[-1] < 0.3 * losses[0]
    assert [e["step"] for e in events if "val_accuracy" in e] == [20, 40]
    for name in ("loss.png", "confusion.png"):
        assert Image.open(trained / name).width > 300


def test_transformers_predicts_the_same(trained, images, tmp_path):
    """transformers' image processor and model load the checkpoint directory."""
    checkpoint = trained / "step-000040"
    processor = hf.ViTImageProcessorPil.from_pretrained(checkpoint)
    model = hf.AutoModelForImageClassification.from_pretrained(checkpoint).eval()
    files = sorted(map(str, (images / "val").rglob("*.png")))[::7]
    run("predict", trained, *files, "--k", 3, "--out", tmp_path / "a.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [line["image"] for line in lines] == files
    for line in lines:
        pixels = processor(Image.open(line["image"]), return_tensors="pt")
        with torch.no_grad():
            expected = model(**pixels).logits.softmax(-1)[0]
        for answer in line["classes"]:
            k = model.config.label2id[answer["class"]]
            assert answer["probability"] == pytest.approx(expected[k].item(), abs=1e-5)


@pytest.mark.parametrize(
    "more",
    [
        "",
        "--train.ema 0.9 --train.layer-decay 0.7 --train.optimizer adamw --model.vit-dropout 0.1 "
        "--model.vit-drop-path 0.2 --data.mixup 0.3 --data.cutmix 1 --data.randaugment 1 "
        "--data.random-erasing 0.3 --data.horizontal-flip 0.5 --data.label-smoothing 0.1",
    ],
    ids=["plain", "everything"],
)
def test_a_resumed_run_matches_an_uninterrupted_one(images, tmp_path, monkeypatch, more, capsys):
    flags = [*more.split(), "--train.eval-every", "0"]
    run("train", *train_flags(images, tmp_path / "whole", 6, *flags))
    original = loop.Logger.advance

    def stop_at_3(self):
        original(self)
        if self.bar.n == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop.Logger, "advance", stop_at_3)
    run("train", *train_flags(images, tmp_path / "parts", 6, *flags))
    monkeypatch.setattr(loop.Logger, "advance", original)
    assert (tmp_path / "parts" / "step-000003").is_dir()
    assert "--train.resume auto" in capsys.readouterr().out
    run("train", tmp_path / "parts" / "config.json", "--train.resume", "auto")
    whole, parts = (load_file(tmp_path / run / "step-000006" / "model.safetensors")
                    for run in ("whole", "parts"))  # fmt: skip
    assert whole.keys() == parts.keys() and all(torch.equal(whole[k], parts[k]) for k in whole)


def test_a_linear_probe_only_trains_the_head(trained, images, tmp_path):
    start = open_vit(str(trained))
    flags = ["--model.vit-model-type", trained, "--train.freeze", "trunk", "--train.lr-head", 0.01]
    argv = train_flags(images, tmp_path / "probe", 3, *flags, "--train.optimizer", "adamw")
    run("train", *argv)
    probe = open_vit(str(tmp_path / "probe"))
    for name, tensor in start.state_dict().items():
        assert torch.equal(tensor, probe.state_dict()[name]) == (not name.startswith("head.")), name


def test_a_probe_of_a_vlm_keeps_the_encoder_size(images, small_model, tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path / "vlm")
    run("train", "small", "--data.source", images / "train", "--model.vit-model-type",
       tmp_path / "vlm", "--train.steps", 2, "--train.out", tmp_path / "probe",
       "--train.freeze", "trunk", "--data.batch-size", 4)  # fmt: skip
    probe = open_classifier(str(tmp_path / "probe"))
    assert (probe.cfg.vit_img_size, probe.cfg.vit_pooling) == (model.cfg.vit_img_size, "mean")
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = model.eval().vision_encoder.patches(x)
        torch.testing.assert_close(probe.vit.eval().patches(x), expected)


def test_classifier_to_vlm_and_back(trained, images, run_file, tmp_path):
    """A classifier's trunk trains as a VLM's encoder, which a classifier can load again."""

    def encode(name: str) -> torch.Tensor:
        x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            return open_vit(name).patches(x)

    steps = ["--train.steps", "2", "--train.precision", "fp32"]
    for kind, more in (("frozen", ["--train.freeze", "vision"]), ("moved", [])):
        argv = [str(run_file(out=kind)), "--model.vit-model-type", str(trained), *steps, *more]
        command(train.main, argv)
    assert torch.equal(encode(str(tmp_path / "frozen")), encode(str(trained)))
    assert not torch.equal(encode(str(tmp_path / "moved")), encode(str(trained)))
    one = images / "val" / "red" / "1.png"
    run("rollout", tmp_path / "moved", one, "--out", tmp_path / "l.png")
    assert Image.open(tmp_path / "l.png").width > 450
    run("train", "small", "--data.source", images / "train", "--model.vit-model-type",
       tmp_path / "moved", "--train.freeze", "trunk", "--train.out", tmp_path / "probe",
       "--data.batch-size", 4, *steps)  # fmt: skip
    assert torch.equal(encode(str(tmp_path / "probe")), encode(str(tmp_path / "moved")))


def test_evaluate(trained, images, tmp_path, capsys):
    run("evaluate", trained, "--source", images / "val", "--out", tmp_path)
    assert "accuracy 100.00%" in capsys.readouterr().out
    assert read_json(tmp_path / "result.json")["val_accuracy"] == 1.0


def test_predictions_as_csv_without_corrupt_files(trained, images, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    good = images / "val" / "red" / "1.png"
    pattern = str(images / "val" / "green" / "[0-2].png")
    run("predict", trained, good, tmp_path, pattern, "--k", 2, "--out", tmp_path / "a.csv")
    out, err = capsys.readouterr()
    assert "broken.png" in err and "1 images skipped" in out
    rows = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    assert [row["class_1"] for row in rows] == ["red", "green", "green", "green"]
    assert all(float(row["p_1"]) > float(row["p_2"]) for row in rows)


def test_export_writes_a_model_card(trained, tmp_path, capsys):
    run("export", trained, "--out", tmp_path / "colours")
    card = (tmp_path / "colours" / "README.md").read_text()
    assert "ViTForImageClassification" in card and 'pipeline_tag: "image-classification"' in card
    assert "40 of 40, 8 images each" in card and "100.00% of 30 images" in card
    assert (tmp_path / "colours" / "confusion.png").is_file()
    assert open_classifier(str(tmp_path / "colours")).labels == ("blue", "green", "red")
    assert "already exists" in refused(capsys, "export", trained, "--out", tmp_path / "colours")
    assert "either --out or --push" in refused(capsys, "export", trained)


def test_a_push_uploads_what_export_writes(trained, tmp_path, capsys, monkeypatch):
    sent = {}

    def push(folder, repo_id, private=True):
        sent.update(names={p.name for p in Path(folder).iterdir()}, id=repo_id, private=private)
        return f"https://example.org/{repo_id}"

    monkeypatch.setattr(classify.hub, "push", push)
    monkeypatch.setattr(classify.hub, "require_login", lambda: None)
    run("export", trained, "--push", "me/colours")
    assert "https://example.org/me/colours" in capsys.readouterr().out
    run("export", trained, "--out", tmp_path / "same")
    assert sent["names"] == {p.name for p in (tmp_path / "same").iterdir()}
    assert {"README.md", "model.safetensors", "config.json", "preprocessor_config.json",
            "train_config.json"} <= sent["names"]  # fmt: skip
    texts = [(tmp_path / "same" / name).read_text() for name in ("README.md", "train_config.json")]
    assert not any(str(trained.parent) in text for text in texts), "private folders"
    assert (sent["id"], sent["private"]) == ("me/colours", True)


def test_push_at_the_end_of_training(images, tmp_path, capsys, monkeypatch):
    cards = []

    def push(folder, repo_id, private=True):
        cards.append((Path(folder) / "README.md").read_text())
        return f"https://example.org/{repo_id}"

    monkeypatch.setattr(classify.hub, "push", push)
    monkeypatch.setattr(classify.hub, "require_login", lambda: None)
    run("train", *train_flags(images, tmp_path / "r", 2, "--train.push", "me/colours"))
    assert "pushed to https://example.org/me/colours" in capsys.readouterr().out
    result = read_json(tmp_path / "r" / "result.json")
    assert len(cards) == 1 and f"{result['val_accuracy']:.2%} of 30 images" in cards[0]


def test_training_on_fashion_mnist(shared, tmp_path):
    """900 images of ten classes; chance is 10 %."""
    prepare.sprite(shared / "datasets" / "fashion_mnist_sprite", tmp_path / "fashion")
    run("train", "small", "--data.source", tmp_path / "fashion", "--train.out", tmp_path / "run",
       *TINY.split(), "--model.vit-img-size", 28, "--model.vit-patch-size", 7,
       "--model.vit-n-channels", 1, "--data.batch-size", 32, "--train.steps", 60,
       "--train.eval-every", 0)  # fmt: skip
    result = read_json(tmp_path / "run" / "result.json")
    assert len(result["classes"]) == 10 and result["val_accuracy"] > 0.4
    assert result["val_top5"] > result["val_accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize(("label", "chance"), [("colour", 1 / 8), ("shape", 1 / 3)])
def test_training_on_easy_vqa_labels(shared, tmp_path, label, chance):
    """3,542 training images, 880 test images; at most half the error rate of guessing."""
    prepare.easy_vqa(shared / "datasets" / "easy_vqa", tmp_path)
    run("train", "small", "--data.source", tmp_path / "train.jsonl", "--data.val",
       tmp_path / "test.jsonl", "--data.label", label, "--train.out", tmp_path / "run",
       *TINY.split(), "--model.vit-img-size", 32, "--data.batch-size", 32,
       "--train.steps", 300, "--train.eval-every", 0)  # fmt: skip
    result = read_json(tmp_path / "run" / "result.json")
    assert result["images"] == 880 and len(result["classes"]) == round(1 / chance)
    assert 1 - result["val_accuracy"] < (1 - chance) / 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["noto_emoji_72", "flags"])
def test_training_with_one_class_per_image(shared, tmp_path, name):
    """120 images, each its own class; chance is below 1 %."""
    files = sorted((shared / "datasets" / name / "images").glob("*.png"))
    files = files[:: len(files) // 120][:120]
    rows = duplicates.shrink(files, tmp_path / "small")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = str(tmp_path / "rows.jsonl")
    run("train", "small", "--data.source", source, "--data.val", source, "--train.out",
       tmp_path / "run", *TINY.split(), "--model.vit-img-size", 32, "--model.vit-patch-size", 8,
       "--data.batch-size", 32, "--train.steps", 300, "--train.eval-every", 0)  # fmt: skip
    result = read_json(tmp_path / "run" / "result.json")
    assert len(result["classes"]) == 120 and result["val_accuracy"] > 0.5


def test_rollout_of_a_classifier_and_a_vlm(trained, small_checkpoint, images, tmp_path):
    two = [images / "val" / "red" / f"{i}.png" for i in range(2)]
    for source in (trained, small_checkpoint):
        run("rollout", source, *two, "--out", tmp_path / "rollout.png")
        assert Image.open(tmp_path / "rollout.png").width > 900
        (tmp_path / "rollout.png").unlink()


# --- vit_mnist ----------------------------------------------------------------------------------


def test_vit_mnist_matches_transformers(shared, tmp_path, capsys):
    """A ViT trained on MNIST's 0, 1 and 2 with other code, evaluated on sklearn's 8 x 8 digits."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    chosen = np.flatnonzero(digits.target < 3)
    # MNIST has a margin of four pixels around a digit of twenty.
    eight_bit = (digits.images[chosen] * 255 / 16).astype(np.uint8)
    pixels = np.stack([np.pad(Image.fromarray(x).resize((20, 20), 2), 4) for x in eight_bit])
    for kind, values in (("images-idx3", pixels), ("labels-idx1", digits.target[chosen])):
        values = values.astype(np.uint8)
        head = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
        (tmp_path / f"train-{kind}-ubyte").write_bytes(head + values.tobytes())
    folder = shared / "weights" / "vit_mnist" / "hf_3class"
    run("evaluate", folder, "--source", tmp_path, "--out", tmp_path)
    transformers_model = hf.ViTForImageClassification.from_pretrained(folder).eval()
    x = (torch.from_numpy(pixels).float() / 255 - 0.1307) / 0.3081
    with torch.no_grad():
        found = transformers_model(x[:, None]).logits.argmax(-1).numpy()
    accuracy = float((found == digits.target[chosen]).mean())
    result = read_json(tmp_path / "result.json")
    assert result["val_accuracy"] == round(accuracy, 4) and accuracy > 0.8
    assert f"accuracy {accuracy:.2%}" in capsys.readouterr().out


# --- Error messages -----------------------------------------------------------------------------


def test_error_messages(trained, images, tmp_path, capsys):
    assert "must be one of train, evaluate" in refused(capsys, "trian")
    assert "did you mean 's16'" in refused(capsys, "train", "s61")
    assert "--train.steps" in refused(capsys, "train", "small", "--train.stepz", "3")
    (tmp_path / "empty").mkdir()
    message = refused(capsys, "train", "small", "--data.source", tmp_path / "empty")
    assert "no images" in message
    shutil.copytree(images / "train" / "red", tmp_path / "one" / "red")
    message = refused(capsys, "train", "small", "--data.source", tmp_path / "one")
    assert "only one class ('red')" in message
    flags = train_flags(images, tmp_path / "r", 2)
    message = refused(capsys, "train", *flags, "--model.vit-n-classes", 2)
    assert "vit_n_classes = 2: the data has 3 classes" in message
    message = refused(capsys, "train", *flags, "--model.vit-n-classes", 2, "--model.vit-labels",
                   "red", "green")  # fmt: skip
    assert "class 'blue' is none of the model's 2" in message
    message = refused(capsys, "train", *flags, "--model.vit-n-channels", 2)
    assert "vit_n_channels" in message
    assert not (tmp_path / "r").exists()
    message = refused(capsys, "predict", trained, tmp_path / "none.png")
    assert "no such image" in message
    message = refused(capsys, "predict", trained, images, "--out", tmp_path / "a.txt")
    assert ".csv or .jsonl" in message
    message = refused(capsys, "evaluate", trained, "--source", images / "val" / "red")
    assert "expected one folder per class" in message


def test_an_encoder_without_a_head_is_refused(small_checkpoint, images, capsys):
    message = refused(capsys, "predict", small_checkpoint, images)
    assert "has no classifier head" in message


def test_resuming_with_other_settings_is_refused(trained, images, capsys):
    message = refused(capsys, "train", trained / "config.json", "--train.resume", "auto",
                   "--data.horizontal-flip", "0.5")  # fmt: skip
    assert "data.horizontal_flip: was 0.0, now 0.5" in message
    more = images / "train" / "red" / "more.png"
    Image.new("RGB", (20, 20), (250, 0, 0)).save(more)
    message = refused(capsys, "train", trained / "config.json", "--train.resume", "auto")
    more.unlink()
    assert "rows of the source: " in message
    message = refused(capsys, "train", trained / "config.json")
    assert "holds the checkpoints of an earlier run" in message
