"""Image classification with the ViT: train, fine-tune, evaluate, predict, export.

python classify.py train --help                              all settings of training
python classify.py train small --data.source my-folder       one folder per class
python classify.py train --model.vit-model-type google/vit-base-patch16-224 --data.source my.csv
python classify.py train runs/classifier/config.json --train.resume auto
python classify.py evaluate runs/classifier --source my-other-folder
python classify.py predict runs/classifier 'images/*.jpg' --out predictions.csv
python classify.py export runs/classifier --push user/name
python classify.py rollout runs/classifier cat.png --out rollout.png
"""

from __future__ import annotations

import glob
import shutil
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro

from cli import command, parse, parse_classify, run_command
from config_tools import InputError, check
from configs_classify import ClassifyConfig, ClassifyDataConfig
from data.classification.dataset import open_classification
from data.classification.loader import open_for_vit
from data.sources.folders import find_images
from engine.publishing.classifier_card import write_repository
from engine.training.distributed import autocast, setup
from engine.vit import classification
from engine.vit.classification import open_classifier, report_result, write_predictions
from engine.vit.figures import draw_rollout
from engine.vit.training import train_classifier
from models.pretrained import hub
from models.pretrained.load import open_vit


def train_main(argv: list[str]) -> None:
    train_classifier(use_pretrained_size(parse_classify(argv), argv))


def use_pretrained_size(cfg: ClassifyConfig, argv: list[str]) -> ClassifyConfig:
    """Take image and patch size from the pretrained weights, unless a flag or file sets them."""
    is_set = any(word.replace("_", "-").startswith("--model.vit-img-size") for word in argv)
    if not cfg.model.vit_model_type or is_set or (argv[:1] and argv[0].endswith(".json")):
        return cfg
    source = open_vit(cfg.model.vit_model_type).cfg
    sizes = {"vit_img_size": source.vit_img_size, "vit_patch_size": source.vit_patch_size}
    return replace(cfg, model=replace(cfg.model, **sizes))


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure the accuracy of a classifier on labelled images."""

    checkpoint: Annotated[str, tyro.conf.Positional]
    """Checkpoint of picoVLM or transformers, run folder (its newest checkpoint), or Hub id."""
    source: str
    """Labelled images, as for --data.source."""
    label: str = "label"
    """Column with the class name."""
    out: Path | None = None
    """Existing folder for confusion.png and result.json."""


def evaluate_main(argv: list[str]) -> None:
    args = parse(Evaluate, argv)
    if args.out is not None and not args.out.is_dir():
        raise InputError(f"out = {args.out}: must be an existing folder.")
    device = setup().device
    model = open_classifier(args.checkpoint).to(device)
    data = ClassifyDataConfig(source=args.source, label=args.label, val_fraction=0.0)
    source = open_classification(data, "test", model.labels)
    no_autocast = autocast(device, torch.float32)
    report_result(classification.evaluate(model, source, no_autocast), args.out)


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Predict the most probable classes of images."""

    checkpoint: Annotated[str, tyro.conf.Positional]
    """Checkpoint of picoVLM or transformers, run folder (its newest checkpoint), or Hub id."""
    images: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Files, folders (all images in them), or patterns like 'holiday/*.jpg'."""
    k: int = 3
    """Number of classes per image."""
    out: Path | None = None
    """.csv or .jsonl file for the predictions; without it they are printed."""


def expand_paths(names: Iterable[str]) -> list[str]:
    """Image files for a list of files, folders and patterns; raises `InputError` for no match."""
    paths: list[str] = []
    for name in names:
        if Path(name).is_dir():
            matches = [str(Path(name) / p) for p in find_images(Path(name))]
        elif Path(name).exists():
            matches = [name]
        else:
            matches = sorted(glob.glob(name, recursive=True))
        if not matches:
            raise InputError(f"{name}: no such image; expected a file, a folder or a glob pattern.")
        paths += matches
    return list(dict.fromkeys(paths))


def predict_main(argv: list[str]) -> None:
    args = parse(Predict, argv)
    check(args.k >= 1, args, "k", "must be at least 1")
    if args.out is not None and args.out.suffix not in (".csv", ".jsonl"):
        raise InputError(f"out = {args.out}: must end in .csv or .jsonl.")
    if args.out is not None and (args.out.is_dir() or not args.out.absolute().parent.is_dir()):
        raise InputError(f"out = {args.out}: must be a file in an existing folder.")
    paths = expand_paths(args.images)
    model, rows, n_failed = open_classifier(args.checkpoint).to(setup().device), [], 0
    for path, classes, error in classification.predict(model, paths, args.k):
        if error:
            n_failed += 1
            print(f"skipped: {error}", file=sys.stderr)
        else:
            rows.append((path, classes))
            if args.out is None:
                print(f"{path}: " + ", ".join(f"{name} {p:.1%}" for name, p in classes))
    if not rows:
        raise InputError(f"none of {len(paths)} images can be opened; the errors are above.")
    if args.out is not None:
        write_predictions(rows, args.out)
        print(f"wrote {len(rows):,} predictions to {args.out}; {n_failed} images skipped")


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a classifier in transformers' format, or push it to the Hub, with a model card."""

    checkpoint: Annotated[str, tyro.conf.Positional]
    """Checkpoint, run folder (its newest checkpoint), or Hub id."""
    out: Path | None = None
    """New directory to write."""
    push: str = ""
    """Hub repository (user/name) to push to."""
    public: bool = False
    """Make the repository public if this push creates it."""


def export_main(argv: list[str]) -> None:
    args = parse(Export, argv)
    if (args.out is None) == (not args.push):
        raise InputError("classify.py export needs either --out or --push.")
    if args.out is not None and args.out.exists():
        raise InputError(f"{args.out}: already exists; name a new directory.")
    if args.out is not None and not args.out.absolute().parent.is_dir():
        raise InputError(f"{args.out}: its folder does not exist.")
    if args.push:
        hub.require_login()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        folder.mkdir()
        print(write_repository(args.checkpoint, folder, args.push or args.out.name))
        if args.push:
            print(hub.push(folder, args.push, private=not args.public))
        else:
            shutil.move(folder, args.out)  # only when it is complete
            print(f"wrote {args.out}")


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Draw the attention rollout of a classifier, a vision encoder or a VLM's encoder."""

    checkpoint: Annotated[str, tyro.conf.Positional]
    """Checkpoint of picoVLM or transformers, run folder (its newest checkpoint), or Hub id."""
    images: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Files, folders (all images in them), or patterns like 'holiday/*.jpg'."""
    out: Path = Path("rollout.png")
    """Image to write: each input next to its rollout map."""


def rollout_main(argv: list[str]) -> None:
    args = parse(Rollout, argv)
    vit = open_vit(args.checkpoint)
    names = expand_paths(args.images)
    images = [open_for_vit(name, vit.cfg, name) for name in names]
    draw_rollout(vit, images, args.out, names)
    print(f"wrote {args.out}")


COMMANDS = {"train": train_main, "evaluate": evaluate_main, "predict": predict_main,
            "export": export_main, "rollout": rollout_main}  # fmt: skip


def main(argv: list[str]) -> None:
    run_command(__doc__, COMMANDS, argv)


if __name__ == "__main__":
    command(main)
