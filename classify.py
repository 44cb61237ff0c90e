"""The ViT alone: train it to classify pictures, fine-tune it, measure it, ask it.

python classify.py train small --data.source my-folder       one folder a class
python classify.py train --model.vit-model-type google/vit-base-patch16-224 --data.source my.csv
python classify.py train runs/classifier/config.json --train.resume auto
python classify.py evaluate runs/classifier --source my-other-folder
python classify.py predict runs/classifier 'pictures/*.jpg' --out answers.csv
python classify.py export runs/classifier --push user/name
python classify.py look runs/classifier cat.png --out where.png
"""

from __future__ import annotations

import csv
import glob
import io
import json
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
from config_tools import InputError, write_whole
from configs_classify import ClassesConfig, ClassifyConfig
from data.classification.dataset import Classes, balance, open_classes
from data.classification.loader import Viewer, ViewLoader, loader_config, open_picture
from data.sources.folders import PICTURES
from engine.publishing.classifier_card import CONFUSION, RESULT, prepare
from engine.training import checkpoint
from engine.training.distributed import autocast, compiles, fast_dtype, setup
from engine.training.loop import Best, train
from engine.training.optim import build_optimizer
from engine.vit import classification
from engine.vit.classification import Result, draw_confusion, open_classifier, table
from engine.vit.figures import draw_rollout
from models.classifier import Classifier
from models.inference.compile import compile_blocks
from models.pretrained import hub
from models.pretrained.load import open_vit
from models.vision_transformer import ViT

# --- train --------------------------------------------------------------------------------------


def build(cfg: ClassifyConfig, names: tuple[str, ...], weights: str = "") -> Classifier:
    """New, or with the trunk that `cfg` names, or what a checkpoint `weights` of the run holds."""
    fix = f"the data have {len(names)} classes; leave it out, or name them all in vit_labels"
    if cfg.model.vit_n_classes not in (0, len(names)):
        raise InputError(f"vit_n_classes = {cfg.model.vit_n_classes}: {fix}.")
    torch.manual_seed(cfg.train.seed)
    model = replace(cfg.model, vit_n_classes=len(names), vit_labels=names)
    named = weights or model.vit_model_type
    vit = ViT.from_pretrained(replace(model, vit_model_type=named)) if named else ViT(model)
    vit.cfg = replace(vit.cfg, vit_model_type=model.vit_model_type)
    return Classifier(vit)


def own_size(cfg: ClassifyConfig, argv: list[str]) -> ClassifyConfig:
    """Pretrained weights keep their picture size unless a flag or a file says another."""
    says = any(word.replace("_", "-").startswith("--model.vit-img-size") for word in argv)
    if not cfg.model.vit_model_type or says or (argv[:1] and argv[0].endswith(".json")):
        return cfg
    source = open_vit(cfg.model.vit_model_type).cfg
    sizes = {"vit_img_size": source.vit_img_size, "vit_patch_size": source.vit_patch_size}
    return replace(cfg, model=replace(cfg.model, **sizes))


def train_main(argv: list[str]) -> None:
    cfg = own_size(parse_classify(argv), argv)
    run = Path(cfg.train.out)
    found = checkpoint.folders(run) if cfg.train.resume == "auto" else []
    if cfg.train.push:
        hub.require_login()  # now rather than after hours
    source = open_classes(cfg.data, "train", cfg.model.vit_labels)
    val = open_classes(cfg.data, "val", source.names)
    dist = setup()
    model = build(cfg, source.names, str(found[-1]) if found else "").to(dist.device)
    cfg = replace(cfg, model=model.cfg)
    # Found by measuring, so one process does for all.
    wanted = checkpoint.precision_of(found, cfg.train.precision)
    dtype = dist.gather(fast_dtype(dist.device, wanted))[0]
    if compiles(dist.device, cfg.train.compile):
        compile_blocks(model)
    optimizer = build_optimizer(model.parts, cfg.train, dtype)
    numbers = {name: i for i, name in enumerate(source.names)}
    viewer = Viewer(cfg.model, cfg.data, numbers)
    loader = ViewLoader(
        source, viewer, loader_config(cfg.data), dist.rank, dist.world, run / "skipped.jsonl"
    )
    checkpoint.seed_generators(cfg.train.seed, dist.rank)
    step, best, data = 0, Best(), source.fingerprint
    if found:
        step, best = checkpoint.restore(found[-1], cfg, model, optimizer, loader, dist, data)
        best = Best(*best)
    if dist.is_main:
        lock = checkpoint.remember_config(cfg)  # ours while this function runs
        describe(cfg, model, source, val, step)
    region = autocast(dist.device, dtype)
    n_val = len(val)

    def asked(_step: int) -> dict:
        return classification.evaluate(model, val, region).values() if n_val else {}

    def write(model: Classifier, folder: Path) -> None:
        model.save_pretrained(folder)

    reached = train(cfg, model, write, loader, optimizer, dist, region, asked, step, best, data)
    dist.close()
    if not dist.is_main:
        return
    lock.close()
    if reached < cfg.train.steps:
        resume = f"python classify.py train {run}/config.json --train.resume auto"
        print(f"saved {run} at step {reached}; continue with: {resume}")
        return
    print(f"saved {run} at step {reached}")
    if n_val:
        with optimizer.averaged():
            show(classification.evaluate(model, val, region), run)
    if cfg.train.push:
        with tempfile.TemporaryDirectory() as folder:
            prepare(str(run), Path(folder), cfg.train.push)
            print(f"pushed to {hub.push(folder, cfg.train.push)}")


def describe(cfg: ClassifyConfig, model: Classifier, source: Classes, val: Classes, step: int):
    """A few lines about what is going to happen."""
    print(model)
    frozen = f"; frozen: {', '.join(cfg.train.freeze)}" if cfg.train.freeze else ""
    start = f"; weights from {cfg.model.vit_model_type}" if cfg.model.vit_model_type else ""
    print(f"training on {balance(source)}; {len(val):,} to validate{frozen}{start}")
    print(f"steps {step} to {cfg.train.steps} into {cfg.train.out}")
    for note in source.notes:
        print(note)


def show(result: Result, folder: Path | None) -> None:
    """Print the figures; write them and the confusion matrix into a folder."""
    print(table(result))
    if folder is not None:
        draw_confusion(result, folder / CONFUSION)
        low, high = result.interval
        figures = result.values() | {"interval": [low, high], "pictures": len(result.expected)}
        figures |= {"classes": classification.by_class(result)}
        write_whole(folder / RESULT, json.dumps(figures, indent=2) + "\n")
        print(f"confusion matrix in {folder / CONFUSION}, figures in {folder / RESULT}")


# --- evaluate, predict --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Accuracy of a classifier on labelled pictures."""

    checkpoint: Annotated[str, tyro.conf.Positional]
    """Checkpoint directory, ours or one of transformers, run folder, or Hub id."""
    source: str
    """Labelled pictures, as for --data.source."""
    label: str = "label"
    """Column that names a row's class."""
    out: Path | None = None
    """Folder that gets confusion.png and result.json."""


def evaluate_main(argv: list[str]) -> None:
    args = parse(Evaluate, argv)
    if args.out is not None and not args.out.is_dir():
        raise InputError(f"out = {args.out}: must be a folder that exists.")
    device = setup().device
    model = open_classifier(args.checkpoint).to(device)
    data = ClassesConfig(source=args.source, label=args.label, val_fraction=0.0)
    source = open_classes(data, "test", model.labels)
    region = autocast(device, torch.float32)
    show(classification.evaluate(model, source, region), args.out)


@dataclass(frozen=True, kw_only=True)
class Predict:
    """The most probable classes of pictures."""

    checkpoint: Annotated[str, tyro.conf.Positional]
    """Checkpoint directory, ours or one of transformers, run folder, or Hub id."""
    pictures: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Files, folders (all pictures within), or patterns such as 'holiday/*.jpg'."""
    k: int = 3
    """Classes per picture."""
    out: Path | None = None
    """.csv or .jsonl file for the answers; else they are printed."""


def find_pictures(names: Iterable[str]) -> list[str]:
    """Files as they are, folders' pictures, patterns' matches; raises `InputError` on nothing."""
    found: list[str] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            inside = (p for p in sorted(path.rglob("*")) if p.suffix.lower() in PICTURES)
            new = [str(p) for p in inside]
        else:
            new = [name] if path.exists() else sorted(glob.glob(name, recursive=True))
        if not new:
            raise InputError(f"{name}: no such picture, and no folder or pattern with any.")
        found += new
    return list(dict.fromkeys(found))


def predict_main(argv: list[str]) -> None:
    args = parse(Predict, argv)
    if args.k < 1:
        raise InputError(f"k = {args.k}: must be at least 1.")
    if args.out is not None and args.out.suffix not in (".csv", ".jsonl"):
        raise InputError(f"out = {args.out}: must end in .csv or .jsonl.")
    if args.out is not None and (args.out.is_dir() or not args.out.absolute().parent.is_dir()):
        raise InputError(f"out = {args.out}: must be a file in a folder that exists.")
    pictures = find_pictures(args.pictures)
    model, rows, n_failed = open_classifier(args.checkpoint).to(setup().device), [], 0
    for picture, classes, problem in classification.predict(model, pictures, args.k):
        if problem:
            n_failed += 1
            print(f"left out: {problem}", file=sys.stderr)
        else:
            rows.append((picture, classes))
            if args.out is None:
                print(f"{picture}: " + ", ".join(f"{name} {p:.1%}" for name, p in classes))
    if not rows:
        raise InputError(f"none of {len(pictures)} pictures can be opened.")
    if args.out is not None:
        write_answers(rows, args.out)
        print(f"wrote {len(rows):,} answers to {args.out}; {n_failed} pictures left out")


def write_answers(rows: list[tuple[str, list[tuple[str, float]]]], path: Path) -> None:
    """A line a picture: its name, then classes and probabilities, the most probable first."""
    file = io.StringIO()
    if path.suffix == ".jsonl":
        for picture, classes in rows:
            answers = [{"class": name, "probability": round(p, 6)} for name, p in classes]
            file.write(json.dumps({"image": picture, "classes": answers}) + "\n")
    else:
        writer = csv.writer(file, lineterminator="\n")
        numbers = range(1, 1 + len(rows[0][1]))
        writer.writerow(["image", *(f"{what}_{i}" for i in numbers for what in ("class", "p"))])
        for picture, classes in rows:
            writer.writerow([picture, *(v for name, p in classes for v in (name, f"{p:.6f}"))])
    write_whole(path, file.getvalue())


# --- export, look -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a classifier for transformers, or push it to the Hub with a model card."""

    checkpoint: Annotated[str, tyro.conf.Positional]
    """Checkpoint directory, run folder (its newest checkpoint is used), or Hub id."""
    out: Path | None = None
    """New directory to write, with the card."""
    push: str = ""
    """Hub repository, user/name, that gets it."""
    public: bool = False
    """Make a repository that is created by this push public."""


def export_main(argv: list[str]) -> None:
    args = parse(Export, argv)
    if (args.out is None) == (not args.push):
        raise InputError("classify.py export needs one of --out and --push.")
    if args.out is not None and args.out.exists():
        raise InputError(f"{args.out}: exists already; name a new directory.")
    if args.out is not None and not args.out.absolute().parent.is_dir():
        raise InputError(f"{args.out}: its folder does not exist.")
    if args.push:
        hub.require_login()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "whole"
        folder.mkdir()
        print(prepare(args.checkpoint, folder, args.push or args.out.name))
        if args.push:
            print(hub.push(folder, args.push, private=not args.public))
        else:
            shutil.move(folder, args.out)  # only when all of it is there
            print(f"wrote {args.out}")


@dataclass(frozen=True, kw_only=True)
class Look:
    """Attention rollout: where the encoder of a classifier, an embedder or a whole VLM looks."""

    checkpoint: Annotated[str, tyro.conf.Positional]
    """Checkpoint directory, ours or one of transformers, run folder, or Hub id."""
    pictures: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Files, folders (all pictures within), or patterns such as 'holiday/*.jpg'."""
    out: Path = Path("rollout.png")
    """Picture to write: each picture, and beside it where the encoder looks."""


def look_main(argv: list[str]) -> None:
    args = parse(Look, argv)
    vit = open_vit(args.checkpoint)
    images = [open_picture(name, vit.cfg, name) for name in find_pictures(args.pictures)]
    draw_rollout(vit, images, args.out)
    print(f"wrote {args.out}")


COMMANDS = {"train": train_main, "evaluate": evaluate_main, "predict": predict_main,
            "export": export_main, "look": look_main}  # fmt: skip


def main(argv: list[str]) -> None:
    run_command(__doc__, COMMANDS, argv)


if __name__ == "__main__":
    command(main)
