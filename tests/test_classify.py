"""classify.py end to end on real files: train, stop, resume, measure, predict, export, look."""

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
def pictures(tmp_path_factory) -> Path:
    """Three classes told by their colour, with grain, in a folder a class."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, n in (("train", 24), ("val", 10)):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = np.array(colour) + rng.integers(-30, 30, (18 + i % 3, 20, 3))
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                image.save(root / split / name / f"{i}.png")
    return root


def words(pictures: Path, out: Path, steps: int, *more: object) -> list[str]:
    flags = f"small --data.source {pictures}/train --data.val {pictures}/val --train.out {out}"
    return [*flags.split(), *TINY.split(), "--train.steps", str(steps), *map(str, more)]


def go(*argv: object) -> None:
    command(classify.main, [str(a) for a in argv])


def refused(capsys, *argv: object) -> str:
    with pytest.raises(SystemExit) as stop:
        go(*argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in err
    return err.splitlines()[-1]


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "colours"
    go("train", *words(pictures, out, 40, "--train.eval-every", 20))
    return out


def test_validation_that_cannot_be_opened_loses_no_training(pictures, tmp_path, capsys):
    for colour in COLOURS:
        (tmp_path / "val" / colour).mkdir(parents=True)
        (tmp_path / "val" / colour / "a.png").write_bytes(b"no picture")
    flags = ["--data.val", tmp_path / "val", "--train.save-every", "0"]
    assert "no image can be opened" in refused(
        capsys, "train", *words(pictures, tmp_path / "run", 3, *flags)
    )
    assert (tmp_path / "run" / "step-000003").is_dir()


def test_colours_are_learned(trained):
    result = read_json(trained / "result.json")
    assert result["val_accuracy"] == 1.0 and result["images"] == 30
    assert {row["class"]: row["recall"] for row in result["classes"]} == dict.fromkeys(COLOURS, 1.0)
    events = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    losses = [e["loss"] for e in events if "loss" in e]
    assert len(losses) == 40 and losses[-1] < 0.3 * losses[0]
    assert [e["step"] for e in events if "val_accuracy" in e] == [20, 40]
    for name in ("loss.png", "confusion.png"):
        assert Image.open(trained / name).width > 300


def test_transformers_predicts_the_same(trained, pictures, tmp_path):
    """Its own image processor and model, from the checkpoint directory."""
    checkpoint = trained / "step-000040"
    processor = hf.ViTImageProcessorPil.from_pretrained(checkpoint)
    model = hf.AutoModelForImageClassification.from_pretrained(checkpoint).eval()
    files = sorted(map(str, (pictures / "val").rglob("*.png")))[::7]
    go("predict", trained, *files, "--k", 3, "--out", tmp_path / "a.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [line["image"] for line in lines] == files
    for line in lines:
        pixels = processor(Image.open(line["image"]), return_tensors="pt")
        with torch.no_grad():
            wanted = model(**pixels).logits.softmax(-1)[0]
        for answer in line["classes"]:
            k = model.config.label2id[answer["class"]]
            assert answer["probability"] == pytest.approx(wanted[k].item(), abs=1e-5)


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
def test_stopped_and_continued_is_the_same_run(pictures, tmp_path, monkeypatch, more, capsys):
    flags = [*more.split(), "--train.eval-every", "0"]
    go("train", *words(pictures, tmp_path / "whole", 6, *flags))
    original = loop.Logger.advance

    def stop_at_3(self):
        original(self)
        if self.bar.n == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop.Logger, "advance", stop_at_3)
    go("train", *words(pictures, tmp_path / "parts", 6, *flags))
    monkeypatch.setattr(loop.Logger, "advance", original)
    assert (tmp_path / "parts" / "step-000003").is_dir()
    assert "--train.resume auto" in capsys.readouterr().out
    go("train", tmp_path / "parts" / "config.json", "--train.resume", "auto")
    whole, parts = (load_file(tmp_path / run / "step-000006" / "model.safetensors")
                    for run in ("whole", "parts"))  # fmt: skip
    assert whole.keys() == parts.keys() and all(torch.equal(whole[k], parts[k]) for k in whole)


def test_a_linear_probe_moves_the_head_alone(trained, pictures, tmp_path):
    start = open_vit(str(trained))
    flags = ["--model.vit-model-type", trained, "--train.freeze", "trunk", "--train.lr-head", 0.01]
    argv = words(pictures, tmp_path / "probe", 3, *flags, "--train.optimizer", "adamw")
    go("train", *argv)
    probe = open_vit(str(tmp_path / "probe"))
    for name, tensor in start.state_dict().items():
        assert torch.equal(tensor, probe.state_dict()[name]) == (not name.startswith("head.")), name


def test_a_whole_models_eyes_are_probed_at_their_own_size(pictures, small_model, tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path / "vlm")
    go("train", "small", "--data.source", pictures / "train", "--model.vit-model-type",
       tmp_path / "vlm", "--train.steps", 2, "--train.out", tmp_path / "probe",
       "--train.freeze", "trunk", "--data.batch-size", 4)  # fmt: skip
    probe = open_classifier(str(tmp_path / "probe"))
    assert (probe.cfg.vit_img_size, probe.cfg.vit_pooling) == (model.cfg.vit_img_size, "mean")
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        wanted = model.eval().vision_encoder.patches(x)
        torch.testing.assert_close(probe.vit.eval().patches(x), wanted)


def test_the_circle_through_the_commands(trained, pictures, run_file, tmp_path):
    """A classifier's trunk trains as a VLM's encoder, which a classifier can load again."""

    def see(name: str) -> torch.Tensor:
        x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            return open_vit(name).patches(x)

    steps = ["--train.steps", "2", "--train.precision", "fp32"]
    for kind, more in (("frozen", ["--train.freeze", "vision"]), ("moved", [])):
        argv = [str(run_file(out=kind)), "--model.vit-model-type", str(trained), *steps, *more]
        command(train.main, argv)
    assert torch.equal(see(str(tmp_path / "frozen")), see(str(trained)))
    assert not torch.equal(see(str(tmp_path / "moved")), see(str(trained)))
    one = pictures / "val" / "red" / "1.png"
    go("rollout", tmp_path / "moved", one, "--out", tmp_path / "l.png")
    assert Image.open(tmp_path / "l.png").width > 450
    go("train", "small", "--data.source", pictures / "train", "--model.vit-model-type",
       tmp_path / "moved", "--train.freeze", "trunk", "--train.out", tmp_path / "probe",
       "--data.batch-size", 4, *steps)  # fmt: skip
    assert torch.equal(see(str(tmp_path / "probe")), see(str(tmp_path / "moved")))


def test_evaluate_needs_no_run(trained, pictures, tmp_path, capsys):
    go("evaluate", trained, "--source", pictures / "val", "--out", tmp_path)
    assert "accuracy 100.00%" in capsys.readouterr().out
    assert read_json(tmp_path / "result.json")["val_accuracy"] == 1.0


def test_answers_as_csv_with_corrupt_files_left_out(trained, pictures, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    good = pictures / "val" / "red" / "1.png"
    pattern = str(pictures / "val" / "green" / "[0-2].png")
    go("predict", trained, good, tmp_path, pattern, "--k", 2, "--out", tmp_path / "a.csv")
    out, err = capsys.readouterr()
    assert "broken.png" in err and "1 images skipped" in out
    rows = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    assert [row["class_1"] for row in rows] == ["red", "green", "green", "green"]
    assert all(float(row["p_1"]) > float(row["p_2"]) for row in rows)


def test_export_has_a_card_from_the_runs_record(trained, tmp_path, capsys):
    go("export", trained, "--out", tmp_path / "colours")
    card = (tmp_path / "colours" / "README.md").read_text()
    assert "ViTForImageClassification" in card and 'pipeline_tag: "image-classification"' in card
    assert "40 of 40, 8 images each" in card and "100.00% of 30 images" in card
    assert (tmp_path / "colours" / "confusion.png").is_file()
    assert open_classifier(str(tmp_path / "colours")).labels == ("blue", "green", "red")
    assert "already exists" in refused(capsys, "export", trained, "--out", tmp_path / "colours")
    assert "one of --out and --push" in refused(capsys, "export", trained)


def test_a_push_sends_what_export_writes(trained, tmp_path, capsys, monkeypatch):
    sent = {}

    def push(folder, repo_id, private=True):
        sent.update(names={p.name for p in Path(folder).iterdir()}, id=repo_id, private=private)
        return f"https://example.org/{repo_id}"

    monkeypatch.setattr(classify.hub, "push", push)
    monkeypatch.setattr(classify.hub, "require_login", lambda: None)
    go("export", trained, "--push", "me/colours")
    assert "https://example.org/me/colours" in capsys.readouterr().out
    go("export", trained, "--out", tmp_path / "same")
    assert sent["names"] == {p.name for p in (tmp_path / "same").iterdir()}
    assert {"README.md", "model.safetensors", "config.json", "preprocessor_config.json",
            "train_config.json"} <= sent["names"]  # fmt: skip
    assert (sent["id"], sent["private"]) == ("me/colours", True)


def test_a_run_ends_with_a_push(pictures, tmp_path, capsys, monkeypatch):
    cards = []

    def push(folder, repo_id, private=True):
        cards.append((Path(folder) / "README.md").read_text())
        return f"https://example.org/{repo_id}"

    monkeypatch.setattr(classify.hub, "push", push)
    monkeypatch.setattr(classify.hub, "require_login", lambda: None)
    go("train", *words(pictures, tmp_path / "r", 2, "--train.push", "me/colours"))
    assert "pushed to https://example.org/me/colours" in capsys.readouterr().out
    result = read_json(tmp_path / "r" / "result.json")
    assert len(cards) == 1 and f"{result['val_accuracy']:.2%} of 30 images" in cards[0]


def test_fashion_is_learned_from_a_sprite(shared, tmp_path):
    """900 real pictures of ten classes: a few steps are far from guessing's tenth."""
    prepare.sprite(shared / "datasets" / "fashion_mnist_sprite", tmp_path / "fashion")
    go("train", "small", "--data.source", tmp_path / "fashion", "--train.out", tmp_path / "run",
       *TINY.split(), "--model.vit-img-size", 28, "--model.vit-patch-size", 7,
       "--model.vit-n-channels", 1, "--data.batch-size", 32, "--train.steps", 60,
       "--train.eval-every", 0)  # fmt: skip
    result = read_json(tmp_path / "run" / "result.json")
    assert len(result["classes"]) == 10 and result["val_accuracy"] > 0.4
    assert result["val_top5"] > result["val_accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize(("label", "chance"), [("colour", 1 / 8), ("shape", 1 / 3)])
def test_easy_vqa_is_learned_by_its_labels(shared, tmp_path, label, chance):
    """Trained on 3,542 pictures, asked of 880 others: wrong at most half as often as a guess."""
    prepare.easy_vqa(shared / "datasets" / "easy_vqa", tmp_path)
    go("train", "small", "--data.source", tmp_path / "train.jsonl", "--data.val",
       tmp_path / "test.jsonl", "--data.label", label, "--train.out", tmp_path / "run",
       *TINY.split(), "--model.vit-img-size", 32, "--data.batch-size", 32,
       "--train.steps", 300, "--train.eval-every", 0)  # fmt: skip
    result = read_json(tmp_path / "run" / "result.json")
    assert result["images"] == 880 and len(result["classes"]) == round(1 / chance)
    assert 1 - result["val_accuracy"] < (1 - chance) / 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["noto_emoji_72", "flags"])
def test_emoji_and_flags_are_known_again(shared, tmp_path, name):
    """Each picture a class of its own, seen in parts only: the whole is known among 120."""
    files = sorted((shared / "datasets" / name / "images").glob("*.png"))
    files = files[:: len(files) // 120][:120]
    rows = duplicates.shrink(files, tmp_path / "small")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = str(tmp_path / "rows.jsonl")
    go("train", "small", "--data.source", source, "--data.val", source, "--train.out",
       tmp_path / "run", *TINY.split(), "--model.vit-img-size", 32, "--model.vit-patch-size", 8,
       "--data.batch-size", 32, "--train.steps", 300, "--train.eval-every", 0)  # fmt: skip
    result = read_json(tmp_path / "run" / "result.json")
    assert len(result["classes"]) == 120 and result["val_accuracy"] > 0.5


def test_rollout_sheets_for_all_three_jobs(trained, small_checkpoint, pictures, tmp_path):
    two = [pictures / "val" / "red" / f"{i}.png" for i in range(2)]
    for source in (trained, small_checkpoint):
        go("rollout", source, *two, "--out", tmp_path / "look.png")
        assert Image.open(tmp_path / "look.png").width > 900
        (tmp_path / "look.png").unlink()


# --- vit_mnist ----------------------------------------------------------------------------------


def test_vit_mnist_predicts_as_its_own_model(shared, tmp_path, capsys):
    """Trained elsewhere on MNIST's 0, 1 and 2: here on other people's digits, 8 x 8 scans."""
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
    go("evaluate", folder, "--source", tmp_path, "--out", tmp_path)
    theirs = hf.ViTForImageClassification.from_pretrained(folder).eval()
    x = (torch.from_numpy(pixels).float() / 255 - 0.1307) / 0.3081
    with torch.no_grad():
        found = theirs(x[:, None]).logits.argmax(-1).numpy()
    accuracy = float((found == digits.target[chosen]).mean())
    result = read_json(tmp_path / "result.json")
    assert result["val_accuracy"] == round(accuracy, 4) and accuracy > 0.8
    assert f"accuracy {accuracy:.2%}" in capsys.readouterr().out


# --- Bad input ----------------------------------------------------------------------------------


def test_wrong_commands_get_one_sentence(trained, pictures, tmp_path, capsys):
    assert "must be one of train, evaluate" in refused(capsys, "trian")
    assert "did you mean 's16'" in refused(capsys, "train", "s61")
    assert "--train.steps" in refused(capsys, "train", "small", "--train.stepz", "3")
    (tmp_path / "empty").mkdir()
    says = refused(capsys, "train", "small", "--data.source", tmp_path / "empty")
    assert "no images" in says
    shutil.copytree(pictures / "train" / "red", tmp_path / "one" / "red")
    says = refused(capsys, "train", "small", "--data.source", tmp_path / "one")
    assert "only one class ('red')" in says
    flags = words(pictures, tmp_path / "r", 2)
    says = refused(capsys, "train", *flags, "--model.vit-n-classes", 2)
    assert "vit_n_classes = 2: the data have 3 classes" in says
    says = refused(capsys, "train", *flags, "--model.vit-n-classes", 2, "--model.vit-labels",
                   "red", "green")  # fmt: skip
    assert "class 'blue' is none of the model's 2" in says
    says = refused(capsys, "train", *flags, "--model.vit-n-channels", 2)
    assert "vit_n_channels" in says
    assert not (tmp_path / "r").exists()
    says = refused(capsys, "predict", trained, tmp_path / "none.png")
    assert "no such image" in says
    says = refused(capsys, "predict", trained, pictures, "--out", tmp_path / "a.txt")
    assert ".csv or .jsonl" in says
    says = refused(capsys, "evaluate", trained, "--source", pictures / "val" / "red")
    assert "expected one folder per class" in says


def test_an_encoder_classifies_nothing(small_checkpoint, pictures, capsys):
    says = refused(capsys, "predict", small_checkpoint, pictures)
    assert "has no classifier head" in says


def test_settings_that_change_a_run_are_refused(trained, pictures, capsys):
    says = refused(capsys, "train", trained / "config.json", "--train.resume", "auto",
                   "--data.horizontal-flip", "0.5")  # fmt: skip
    assert "data.horizontal_flip: 0.0 then, 0.5 now" in says
    more = pictures / "train" / "red" / "more.png"
    Image.new("RGB", (20, 20), (250, 0, 0)).save(more)
    says = refused(capsys, "train", trained / "config.json", "--train.resume", "auto")
    more.unlink()
    assert "rows of the source: " in says
    says = refused(capsys, "train", trained / "config.json")
    assert "holds the checkpoints of an earlier run" in says
