"""Little data: a ViT and a small CNN of as many parameters on 100, 500 and all digits.

python -m benchmarks.quality.small_data --picture docs/small_data.png --json docs/small_data.json
The CNN is transformers' ResNet with random weights. Each is trained plainly, and with mixup, CutMix
and weight decay; three splits, each with its own test digits. Needs scikit-learn and matplotlib.
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
    Theirs,
    digits,
    fit,
    folds,
    loader_of,
    right,
)
from benchmarks.quality.digits import source_of as all_of
from data.classification.dataset import Classes, from_rows
from models.classifier import Classifier
from models.vision_transformer import ViT

# Both see 32 x 32 pixels: the CNN's stem halves a picture twice before its first stage.
CFG = replace(MODEL, vit_img_size=32, vit_patch_size=8)
SIZES = (100, 500, 0)
WAYS = {
    "plain": (replace(DATA, crop=1.0, mixup=0.0), 0.0),
    "regularised": (replace(DATA, crop=1.0, mixup=0.2, cutmix=1.0), 0.05),
}


def cnn(cfg) -> Theirs:
    """transformers' ResNet: three stages of one basic block."""
    import transformers

    config = transformers.ResNetConfig(
        num_channels=cfg.vit_n_channels, embedding_size=32, hidden_sizes=[32, 64, 128],
        depths=[1, 1, 1], layer_type="basic", num_labels=cfg.vit_n_classes,
    )  # fmt: skip
    return Theirs(transformers.ResNetForImageClassification(config), cfg, "classifier")


MODELS = {"ViT": lambda: Classifier(ViT(CFG)), "CNN": lambda: cnn(CFG)}


def part_of(source: Classes, n: int, seed: int, data) -> Classes:
    """`n` rows, as many of each class; 0: all."""
    return from_rows(source.rows.rows, replace(data, limit=n, seed=seed), "train", source.names)


def measure(steps: int, seeds: int, kept: Path) -> list[dict]:
    """Every run that `kept` does not have yet; it is written after each."""
    pixels, target = digits()
    rows = json.loads(kept.read_text()) if kept.is_file() else []
    done = {(row["model"], row["asked"], row["way"], row["seed"]) for row in rows}
    for seed, (train_rows, test_rows) in zip(range(seeds), folds(target)):
        test = all_of(pixels[test_rows], target[test_rows], DATA)
        for n in SIZES:
            for way, (data, decay) in WAYS.items():
                whole = all_of(pixels[train_rows], target[train_rows], data)
                source = part_of(whole, n, seed, data)
                for name, make in MODELS.items():
                    if (name, n, way, seed) in done:
                        continue
                    torch.manual_seed(seed)
                    model, start = make(), time.perf_counter()
                    cfg = replace(TRAIN, steps=steps, weight_decay=decay)
                    fit(model, loader_of(source, CFG, data), cfg)
                    row = {"model": name, "asked": n, "digits": len(source), "way": way,
                           "seed": seed,
                           "accuracy": float(right(model, test).mean()),
                           "parameters": sum(p.numel() for p in model.parameters()),
                           "seconds": round(time.perf_counter() - start)}  # fmt: skip
                    print(json.dumps(row), flush=True)
                    rows.append(row)
                    kept.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


def summary(rows: list[dict]) -> dict[tuple[str, str], list[tuple[int, float, float]]]:
    """(model, way) -> (digits, mean accuracy, standard deviation) by number of digits."""
    groups = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups[row["model"], row["way"]][row["digits"]].append(row["accuracy"])
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
    for (name, way), cells in sorted(found.items()):
        figures = " | ".join(f"{mean:.1%} ± {sd:.1%}" for _, mean, sd in cells)
        lines.append(f"| {name}, {way} | {figures} |")
    return "\n".join(lines)


def draw(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), constrained_layout=True)
    for (name, way), cells in sorted(summary(rows).items()):
        n, mean, sd = zip(*cells)
        axis.errorbar(n, mean, sd, capsize=3, marker="o", label=f"{name}, {way}",
                      color="tab:blue" if name == "ViT" else "tab:orange",
                      ls="-" if way == "regularised" else "--")  # fmt: skip
    axis.set(xscale="log", xlabel="labelled digits", ylabel="accuracy on digits not seen")
    axis.set_xticks(n, [f"{v:,}" for v in n])
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--json", type=Path, required=True, help="finished runs are kept here")
    args = parser.parse_args()
    rows = measure(args.steps, args.seeds, args.json)
    print(table(rows))
    if args.picture:
        draw(rows, args.picture)


if __name__ == "__main__":
    main()
