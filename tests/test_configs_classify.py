"""Every field of a classifier's run is a flag with its docstring; errors are one sentence."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import configs_classify
from cli import parse_classify
from config_tools import InputError, from_dict, read_json, to_dict
from configs import LoopConfig, ViTConfig
from configs_classify import PRESETS, ClassifyConfig, ClassifyDataConfig, ClassifyTrainConfig

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        (ClassifyDataConfig, dict(batch_size=0), "batch_size = 0: must be greater than 0"),
        (ClassifyDataConfig, dict(val_fraction=1.0), "val_fraction"),
        (ClassifyDataConfig, dict(label_smoothing=-0.1), "label_smoothing"),
        (ClassifyDataConfig, dict(limit=-1), "limit = -1: must not be negative"),
        (ClassifyDataConfig, dict(mixup=-1.0), "mixup"),
        (
            ClassifyDataConfig,
            dict(horizontal_flip=1.5),
            "horizontal_flip = 1.5: must be between 0 and 1",
        ),
        (ClassifyDataConfig, dict(crop_min_scale=0.0), "crop_min_scale = 0.0: must be above 0"),
        (ClassifyDataConfig, dict(crop_max_ratio=0.5), "crop_max_ratio = 0.5: must be at least 1"),
        (ClassifyDataConfig, dict(randaugment_magnitude=11.0), "magnitude"),
        (ClassifyTrainConfig, dict(lr_head=-1.0), "lr_head"),
        (ClassifyTrainConfig, dict(freeze=("trunk", "head")), "leaves nothing to train"),
        (ClassifyTrainConfig, dict(freeze=("vision",)), "may name trunk, head"),
        (ClassifyTrainConfig, dict(ema=1.0), "ema = 1.0"),
        (ClassifyTrainConfig, dict(layer_decay=0.0), "layer_decay = 0.0"),
        (ClassifyConfig, dict(model=ViTConfig(vit_n_channels=4)), "vit_n_channels = 4"),
    ],
)
def test_errors_name_field_value_and_fix(cls, fields, message):
    with pytest.raises(InputError) as caught:
        cls(**fields)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name, tmp_path):
    cfg = parse_classify([name])
    assert cfg == PRESETS[name]
    (tmp_path / "run.json").write_text(json.dumps(to_dict(cfg)))
    assert parse_classify([str(tmp_path / "run.json")]) == cfg
    assert from_dict(ClassifyConfig, read_json(tmp_path / "run.json")) == cfg


def test_labels_with_spaces_survive_flags_and_json(tmp_path):
    flags = ["--model.vit-n-classes", "2", "--model.vit-labels", "a cat", "no cat"]
    cfg = parse_classify(["small", *flags])
    assert cfg.model.vit_labels == ("a cat", "no cat")
    assert from_dict(ClassifyConfig, json.loads(json.dumps(to_dict(cfg)))) == cfg


def test_help_shows_every_field_with_its_docstring():
    script = "import cli as c; c.parse_classify(['small', '--help'])"
    command = [sys.executable, "-c", script]
    out = subprocess.run(command, capture_output=True, text=True, cwd=ROOT,
                         env={"COLUMNS": "400", "NO_COLOR": "1", "PATH": "/usr/bin"})  # fmt: skip
    assert out.returncode == 0, out.stderr
    shown = " ".join(out.stdout.split())
    for part, cls in (("data", ClassifyDataConfig), ("train", ClassifyTrainConfig)):
        body = ast.parse(inspect.getsource(cls)).body[0].body
        words = {a.target.id: " ".join(b.value.value.split()) for a, b in zip(body, body[1:])
                 if isinstance(a, ast.AnnAssign)}  # fmt: skip
        own = {f.name for f in dataclasses.fields(cls)} - {
            f.name for f in dataclasses.fields(LoopConfig) if cls is ClassifyTrainConfig
        }
        assert set(words) - {"out"} == own - {"out"}
        for name, text in words.items():
            assert f"--{part}.{name.replace('_', '-')}" in shown and text in shown, name


def test_a_preset_for_every_size_and_patch():
    named = {f"{s}{p}" for s in ("ti", "s", "b", "l") for p in (8, 16, 32)}
    assert set(configs_classify.PRESETS) == {"small"} | named
