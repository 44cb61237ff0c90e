"""Little data: a ViT and a CNN of the same size on 100, 500 and all digits.

python -m benchmarks.quality.small_data --json runs/digits.json --plot docs/images/small_data.png
The CNN is transformers' ResNet with random weights. Each trains with and without mixup, CutMix and
weight decay, on three splits. Needs scikit-learn, and matplotlib for the plot.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import torch

from benchmarks.quality import digits
from benchmarks.quality.digits import DATA, HFClassifier
from benchmarks.speed.timing import markdown
from models.classifier import Classifier
from models.vision_transformer import ViT

# Both get 32 x 32 pixels, as the CNN's stem halves the image twice before its first stage.
CFG = replace(digits.MODEL, vit_img_size=32, vit_patch_size=8)
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
    return HFClassifier(transformers.ResNetForImageClassification(config), cfg)


MODELS = {"ViT": lambda: Classifier(ViT(CFG)), "CNN": lambda: cnn(CFG)}


def measure(seeds: int, results: Path) -> list[dict]:
    """All runs; those in the file `results` are not repeated, and it is written after each."""
    pixels, target = digits.digits()
    rows = json.loads(results.read_text()) if results.is_file() else []
    done = {(row["model"], row["limit"], row["recipe"], row["seed"]) for row in rows}
    for seed, (train_rows, test_rows) in zip(range(seeds), digits.folds(target)):
        test = digits.source_of(pixels[test_rows], target[test_rows], DATA)
        for n, recipe, name in product(SIZES, RECIPES, MODELS):
            if (name, n, recipe, seed) in done:
                continue
            data, decay = RECIPES[recipe]
            data = replace(data, limit=n, seed=seed)  # the same number per class; 0: all
            source = digits.source_of(pixels[train_rows], target[train_rows], data)
            torch.manual_seed(seed)
            model, start = MODELS[name](), time.perf_counter()
            loader = digits.loader_of(source, CFG, RECIPES[recipe][0])
            digits.fit(model, loader, replace(digits.TRAIN, steps=300, weight_decay=decay))
            rows.append({"model": name, "limit": n, "digits": len(source), "recipe": recipe,
                         "seed": seed, "accuracy": float(digits.is_correct(model, test).mean()),
                         "parameters": sum(p.numel() for p in model.parameters()),
                         "seconds": round(time.perf_counter() - start)})  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
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
    lines = [[f"{name}, {recipe}", *(f"{mean:.1%} ± {sd:.1%}" for _, mean, sd in cells)]
             for (name, recipe), cells in sorted(found.items())]  # fmt: skip
    return markdown(["", *(f"{n:,} digits" for n in sizes)], lines)


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
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path, required=True, help="file of finished runs")
    args = parser.parse_args()
    rows = measure(args.seeds, args.json)
    print(table(rows))
    if args.plot:
        draw(rows, args.plot)


if __name__ == "__main__":
    main()
