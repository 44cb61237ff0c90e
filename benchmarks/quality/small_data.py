"""Little data: a ViT and a CNN of the same size on 100, 500 and all digits.

python -m benchmarks.quality.small_data --plot docs/small_data.png --json docs/small_data.json
The CNN is transformers' ResNet with random weights. Each trains with and without mixup, CutMix and
weight decay, on three splits. Needs scikit-learn, and matplotlib for the plot.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.quality.digits import (
    DATA,
    MODEL,
    TRAIN,
    HFClassifier,
    digits,
    fit,
    folds,
    is_correct,
    loader_of,
)
from benchmarks.quality.digits import source_of as all_of
from data.classification.dataset import ClassificationDataset, from_rows
from models.classifier import Classifier
from models.vision_transformer import ViT

# Both get 32 x 32 pixels, as the CNN's stem halves the image twice before its first stage.
CFG = replace(MODEL, vit_img_size=32, vit_patch_size=8)
SIZES = (100, 500, 0)
RECIPES = {
    "plain": (replace(DATA, crop_min_scale=1.0, mixup=0.0), 0.0),
    "regularised": (replace(DATA, crop_min_scale=1.0, mixup=0.2, cutmix=1.0), 0.05),
}


def cnn(cfg) -> HFClassifier:
    """transformers' ResNet: three stages of one basic block."""
    import transformers

    config = transformers.ResNetConfig(
        num_channels=cfg.vit_n_channels, embedding_size=32, hidden_sizes=[32, 64, 128],
        depths=[1, 1, 1], layer_type="basic", num_labels=cfg.vit_n_classes,
    )  # fmt: skip
    return HFClassifier(transformers.ResNetForImageClassification(config), cfg, "classifier")


MODELS = {"ViT": lambda: Classifier(ViT(CFG)), "CNN": lambda: cnn(CFG)}


def subset(source: ClassificationDataset, n: int, seed: int, data) -> ClassificationDataset:
    """`n` rows, the same number per class; 0: all."""
    return from_rows(source.samples.rows, replace(data, limit=n, seed=seed), "train", source.names)


def measure(steps: int, seeds: int, results: Path) -> list[dict]:
    """All runs; those in the file `results` are not repeated, and it is written after each."""
    pixels, target = digits()
    rows = json.loads(results.read_text()) if results.is_file() else []
    done = {(row["model"], row["limit"], row["recipe"], row["seed"]) for row in rows}
    for seed, (train_rows, test_rows) in zip(range(seeds), folds(target)):
        test = all_of(pixels[test_rows], target[test_rows], DATA)
        for n in SIZES:
            for recipe, (data, decay) in RECIPES.items():
                whole = all_of(pixels[train_rows], target[train_rows], data)
                source = subset(whole, n, seed, data)
                for name, make in MODELS.items():
                    if (name, n, recipe, seed) in done:
                        continue
                    torch.manual_seed(seed)
                    model, start = make(), time.perf_counter()
                    cfg = replace(TRAIN, steps=steps, weight_decay=decay)
                    fit(model, loader_of(source, CFG, data), cfg)
                    row = {"model": name, "limit": n, "digits": len(source), "recipe": recipe,
                           "seed": seed,
                           "accuracy": float(is_correct(model, test).mean()),
                           "parameters": sum(p.numel() for p in model.parameters()),
                           "seconds": round(time.perf_counter() - start)}  # fmt: skip
                    print(json.dumps(row), flush=True)
                    rows.append(row)
                    results.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


def summary(rows: list[dict]) -> dict[tuple[str, str], list[tuple[int, float, float]]]:
    """(model, recipe) -> (digits, mean accuracy, standard deviation) by number of digits."""
    groups = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups[row["model"], row["recipe"]][row["digits"]].append(row["accuracy"])
    return {
        key: [(n, float(np.mean(v)), float(np.std(v, ddof=len(v) > 1)))
              for n, v in sorted(group.items())]
        for key, group in groups.items()
    }  # fmt: skip


def table(rows: list[dict]) -> str:
    found = summary(rows)
    sizes = [n for n, *_ in next(iter(found.values()))]
    head = " | ".join(f"{n:,} digits" for n in sizes)
    lines = [f"| | {head} |", "|---" * (1 + len(sizes)) + "|"]
    for (name, recipe), cells in sorted(found.items()):
        figures = " | ".join(f"{mean:.1%} ± {sd:.1%}" for _, mean, sd in cells)
        lines.append(f"| {name}, {recipe} | {figures} |")
    return "\n".join(lines)


def draw(rows: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for (name, recipe), cells in sorted(summary(rows).items()):
        n, mean, sd = zip(*cells)
        axis.errorbar(n, mean, sd, capsize=3, marker="o", label=f"{name}, {recipe}",
                      color="tab:blue" if name == "ViT" else "tab:orange",
                      ls="-" if recipe == "regularised" else "--")  # fmt: skip
    axis.set(xscale="log", xlabel="labelled digits", ylabel="test accuracy")
    axis.set_xticks(n, [f"{v:,}" for v in n])
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path, required=True, help="file of finished runs")
    args = parser.parse_args()
    rows = measure(args.steps, args.seeds, args.json)
    print(table(rows))
    if args.plot:
        draw(rows, args.plot)


if __name__ == "__main__":
    main()
