"""Transfer: 100 labelled images, from scratch and from an encoder trained on the built-in world.

python -m benchmarks.quality.transfer runs/demo PATH/TO/datasets/easy_vqa runs/transfer
The encoder is the one `make demo` trains on questions about drawn scenes. It is fine-tuned on 100
images of easy-VQA; each of five seeds draws its own 100. From scratch, an encoder of the same shape
trains instead. The learning rate of each method is the best of three on 500 held-out training
images. Test images are evaluated once. Every training is a classify.py command.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import classify
from benchmarks.quality.prepare import easy_vqa
from config_tools import read_json
from models.pretrained.load import open_vit

TUNE = (
    "small --data.source {out}/learn.jsonl --data.val {out}/{val}.jsonl --data.label {label} "
    "--data.limit 100 --data.seed {seed} --train.seed {seed} --data.batch-size 32 "
    "--train.steps {steps} --train.eval-every 0 --train.log-every 50 --train.warmup 20 "
    "--train.out {out}/{kind}-{label}-{rate}-{seed} --model.no-vit-cls-flag "
    "{flags} {rate_of} {rate}"
)
SHAPE = "vit_img_size vit_patch_size vit_hidden_dim vit_inter_dim vit_n_heads vit_n_blocks"
RATES = (0.008, 0.016, 0.032)
N_CHOOSE, TRIAL = 500, 100  # images that rates are chosen on; the seed of the trials


@dataclass(frozen=True)
class Method:
    flags: str
    rate_of: str
    rates: tuple[float, ...]


METHODS = {
    "from scratch": Method("--model.vit-hidden-act {act} {shape}", "--train.lr-muon", RATES),
    "fine-tuned": Method("--model.vit-model-type {trunk}", "--train.lr-muon", RATES),
    "linear probe": Method("--model.vit-model-type {trunk} --train.freeze trunk", "--train.lr-head",
                        (0.003, 0.01, 0.03)),
}  # fmt: skip


def split(out: Path) -> None:
    """Split training images into learn.jsonl, and choose.jsonl for learning rates."""
    lines = (out / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for name, part in (("learn", lines[:-N_CHOOSE]), ("choose", lines[-N_CHOOSE:])):
        (out / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")


def run(
    method: Method, kind: str, label: str, rate: float, seed: int, val: str, given: dict
) -> float:
    """Train unless the result exists; returns the accuracy on `val`.jsonl."""
    fields = {
        "kind": kind.replace(" ", "-"),
        "label": label,
        "rate": rate,
        "seed": seed,
        "val": val,
    }
    flags = method.flags.format(**given)
    argv = TUNE.format(**given, **fields, flags=flags, rate_of=method.rate_of).split()
    result = Path(argv[argv.index("--train.out") + 1]) / "result.json"
    if not result.is_file():
        classify.main(["train", *argv, "--train.resume", "auto"])
    return read_json(result)["val_accuracy"]


def compare(label: str, n_seeds: int, given: dict) -> dict[str, list[float]]:
    """Test accuracies of every method, one per seed, each at its own best learning rate."""
    found = {}
    for kind, method in METHODS.items():
        tried = {r: run(method, kind, label, r, TRIAL, "choose", given) for r in method.rates}
        rate = max(tried, key=tried.get)
        print(f"{label}, {kind}: {method.rate_of} {rate} of {tried}")
        values = [run(method, kind, label, rate, seed, "test", given) for seed in range(n_seeds)]
        mean, spread = np.mean(values), np.std(values, ddof=1)
        print(f"{label}, {kind}: {mean:.1%} ± {spread:.1%} {values}", flush=True)
        found[kind] = values
    return found


def draw(found: dict[str, dict[str, list[float]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(found), 4), layout="constrained")
    axes = figure.subplots(1, len(found), sharey=True, squeeze=False)
    for axis, (label, kinds) in zip(axes[0], found.items()):
        means = [np.mean(v) for v in kinds.values()]
        spread = [np.std(v, ddof=1) for v in kinds.values()]
        axis.bar(range(len(kinds)), means, yerr=spread, capsize=6,
                 color=["tab:gray", "tab:blue", "tab:cyan"])  # fmt: skip
        for x, values in enumerate(kinds.values()):
            axis.plot([x] * len(values), values, "k.", ms=5)
        axis.set_xticks(range(len(kinds)), kinds)
        axis.set(title=f"100 images, labels: {label}", ylim=(0, 1))
    axes[0][0].set_ylabel("accuracy on 880 test images ± standard deviation")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trunk", help="a VLM or a classifier without CLS, as make demo trains")
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--labels", nargs="+", default=["shape"])
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    easy_vqa(args.source, args.out)
    split(args.out)
    cfg = open_vit(args.trunk).cfg
    sizes = {f"--model.{name.replace('_', '-')}": getattr(cfg, name) for name in SHAPE.split()}
    shape = " ".join(f"{flag} {value}" for flag, value in sizes.items())
    given = {"trunk": args.trunk, "act": cfg.vit_hidden_act, "shape": shape,
             "steps": args.steps, "out": args.out}  # fmt: skip
    found = {label: compare(label, args.seeds, given) for label in args.labels}
    (args.out / "transfer.json").write_text(json.dumps(found, indent=2) + "\n")
    if args.plot:
        draw(found, args.plot)


if __name__ == "__main__":
    main()
