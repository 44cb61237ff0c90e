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
from pathlib import Path

import numpy as np

import classify
from benchmarks.quality.prepare import easy_vqa
from config_tools import read_json
from models.pretrained.load import open_vit

TUNE = (
    "small --data.source {out}/learn.jsonl --data.val {out}/{val}.jsonl --data.label shape "
    "--data.limit 100 --data.seed {seed} --train.seed {seed} --data.batch-size 32 "
    "--train.steps 120 --train.eval-every 0 --train.log-every 50 --train.warmup 20 "
    "--train.out {out}/{kind}-shape-{rate}-{seed} --model.no-vit-cls-flag "
    "{flags} {rate_of} {rate}"
)
SHAPE = "vit_img_size vit_patch_size vit_hidden_dim vit_inter_dim vit_n_heads vit_n_blocks"
RATES = (0.008, 0.016, 0.032)
N_CHOOSE, TRIAL = 500, 100  # images that rates are chosen on; the seed of the trials
METHODS = {  # its flags, the flag of its rate, rates to choose from
    "from scratch": ("--model.vit-hidden-act {act} {shape}", "--train.lr-muon", RATES),
    "fine-tuned": ("--model.vit-model-type {trunk}", "--train.lr-muon", RATES),
    "linear probe": ("--model.vit-model-type {trunk} --train.freeze trunk", "--train.lr-head",
                     (0.003, 0.01, 0.03)),
}  # fmt: skip


def split(out: Path) -> None:
    """Split training images into learn.jsonl, and choose.jsonl for learning rates."""
    lines = (out / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for name, part in (("learn", lines[:-N_CHOOSE]), ("choose", lines[-N_CHOOSE:])):
        (out / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")


def run(kind: str, rate: float, seed: int, val: str, given: dict) -> float:
    """Train unless the result exists; returns the accuracy on `val`.jsonl."""
    flags, rate_of, _ = METHODS[kind]
    given = given | {"kind": kind.replace(" ", "-"), "rate": rate, "seed": seed, "val": val}
    argv = TUNE.format(**given, flags=flags.format(**given), rate_of=rate_of).split()
    result = Path(argv[argv.index("--train.out") + 1]) / "result.json"
    if not result.is_file():
        classify.main(["train", *argv, "--train.resume", "auto"])
    return read_json(result)["val_accuracy"]


def compare(given: dict) -> dict[str, list[float]]:
    """Test accuracies of every method, one per seed, each at its own best learning rate."""
    found = {}
    for kind, (_, rate_of, rates) in METHODS.items():
        tried = {rate: run(kind, rate, TRIAL, "choose", given) for rate in rates}
        rate = max(tried, key=tried.get)
        print(f"{kind}: {rate_of} {rate} of {tried}")
        values = found[kind] = [run(kind, rate, seed, "test", given) for seed in range(5)]
        print(f"{kind}: {np.mean(values):.1%} ± {np.std(values, ddof=1):.1%} {values}", flush=True)
    return found


def draw(found: dict[str, list[float]], path: Path) -> None:
    from matplotlib.figure import Figure

    values = np.array(list(found.values()))  # [methods, seeds]
    figure = Figure(figsize=(4, 4), layout="constrained")
    axis = figure.subplots()
    axis.bar(range(len(found)), values.mean(1), yerr=values.std(1, ddof=1), capsize=6,
             color=["tab:gray", "tab:blue", "tab:cyan"])  # fmt: skip
    axis.plot(values, "k.", ms=5)
    axis.set_xticks(range(len(found)), found)
    axis.set(title="100 images, labels: shape", ylim=(0, 1))
    axis.set_ylabel("accuracy on 880 test images ± standard deviation")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trunk", help="a VLM or a classifier without CLS, as make demo trains")
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    easy_vqa(args.source, args.out)
    split(args.out)
    cfg = open_vit(args.trunk).cfg
    shape = " ".join(f"--model.{n.replace('_', '-')} {getattr(cfg, n)}" for n in SHAPE.split())
    found = compare(
        {"trunk": args.trunk, "act": cfg.vit_hidden_act, "shape": shape, "out": args.out}
    )
    (args.out / "transfer.json").write_text(json.dumps({"shape": found}, indent=2) + "\n")
    if args.plot:
        draw(found, args.plot)


if __name__ == "__main__":
    main()
