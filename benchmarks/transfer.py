"""Transfer: 100 labelled pictures, from scratch and from a trunk trained on the built-in world.

python -m benchmarks.transfer runs/demo PATH/TO/datasets/easy_vqa runs/transfer
The trunk is that of `make demo`: the eyes of a model that answers questions about drawn scenes. 100
pictures of easy-VQA, other shapes drawn by others, are learned five times over: each seed draws its
own 100. From scratch, the encoder has the same shape. Every training is a command of classify.py.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

import classify
from benchmarks.prepare import easy_vqa
from configs import read_json
from models.backbones import open_vit

TUNE = (
    "small --data.source {out}/train.jsonl --data.val {out}/test.jsonl --data.label {label} "
    "--data.limit 100 --data.seed {seed} --train.seed {seed} --data.batch-size 32 "
    "--train.steps {steps} --train.eval-every 0 --train.log-every 50 --train.warmup 20 "
    "--train.out {out}/{kind}-{label}-{seed} --model.no-vit-cls-flag {flags}"
)
SHAPE = "vit_img_size vit_patch_size vit_hidden_dim vit_inter_dim vit_n_heads vit_n_blocks"
KINDS = {
    "from scratch": "--model.vit-hidden-act {act} {shape}",
    "fine-tuned": "--model.vit-model-type {trunk} --train.lr-trunk 5e-4 --train.lr-muon 0.004",
    "linear probe": "--model.vit-model-type {trunk} --train.freeze trunk --train.lr-head 0.01",
}


def run(words: str) -> float:
    """Train as told unless that is done already; returns the accuracy on the test pictures."""
    argv = words.split()
    result = Path(argv[argv.index("--train.out") + 1]) / "result.json"
    if not result.is_file():
        classify.main(["train", *argv, "--train.resume", "auto"])
    return read_json(result)["val_accuracy"]


def draw(found: dict[str, dict[str, list[float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(4 * len(found), 4), sharey=True,
                                constrained_layout=True, squeeze=False)  # fmt: skip
    for axis, (label, kinds) in zip(axes[0], found.items()):
        means = [np.mean(v) for v in kinds.values()]
        spread = [np.std(v, ddof=1) for v in kinds.values()]
        axis.bar(range(len(kinds)), means, yerr=spread, capsize=6,
                 color=["tab:gray", "tab:blue", "tab:cyan"])  # fmt: skip
        for x, values in enumerate(kinds.values()):
            axis.plot([x] * len(values), values, "k.", ms=5)
        axis.set_xticks(range(len(kinds)), kinds)
        axis.set(title=f"100 pictures, told by {label}", ylim=(0, 1))
    axes[0][0].set_ylabel("accuracy on 880 others; bars: standard deviation")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trunk", help="a VLM or a classifier without CLS, as make demo trains")
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--labels", nargs="+", default=["shape"])
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    easy_vqa(args.source, args.out)
    eyes = open_vit(args.trunk).cfg
    sizes = {f"--model.{name.replace('_', '-')}": getattr(eyes, name) for name in SHAPE.split()}
    shape = " ".join(f"{flag} {value}" for flag, value in sizes.items())
    given = {"trunk": args.trunk, "act": eyes.vit_hidden_act, "shape": shape}
    flags = {kind: words.format(**given) for kind, words in KINDS.items()}
    found: dict[str, dict[str, list[float]]] = {}
    for label in args.labels:
        found[label] = {kind: [] for kind in KINDS}
        for seed in range(args.seeds):
            for kind, words in flags.items():
                given = {"label": label, "seed": seed, "steps": args.steps, "out": args.out}
                given |= {"kind": kind.replace(" ", "-"), "flags": words}
                found[label][kind].append(run(TUNE.format(**given)))
        for kind, values in found[label].items():
            mean, spread = np.mean(values), np.std(values, ddof=1)
            print(f"{label}, {kind}: {mean:.1%} ± {spread:.1%} {values}")
    (args.out / "transfer.json").write_text(json.dumps(found, indent=2) + "\n")
    if args.picture:
        draw(found, args.picture)


if __name__ == "__main__":
    main()
