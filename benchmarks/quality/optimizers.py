"""Muon against AdamW on the built-in world: same model, data, seed and steps.

python -m benchmarks.quality.optimizers [STEPS]    prints a table, draws docs/images/optimizers.png

AdamW runs with several learning rates, Muon with the preset's.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.speed.timing import ROOT, markdown

ADAMW_RATES = (0.0005, 0.001, 0.002, 0.004)


def variants() -> dict[str, list[str]]:
    """Name of each run -> its flags."""
    found = {"Muon, the preset": []}
    for rate in ADAMW_RATES:
        rates = [f"--train.lr-{part}={rate}" for part in ("vision", "projector", "language")]
        found[f"AdamW, {rate}"] = ["--train.optimizer=adamw", *rates]
    return found


def run(flags: list[str], out: Path, steps: int) -> list[dict]:
    """Train once; returns the evaluation lines of its log."""
    every = max(1, steps // 5)
    command = [sys.executable, "train.py", "tiny", f"--train.out={out}", f"--train.steps={steps}"]
    command += [f"--train.eval-every={every}", "--train.eval-samples=400", "--train.save-every=0"]
    subprocess.run(command + flags, cwd=ROOT, check=True)
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [line for line in lines if "val_accuracy" in line]


def draw(curves: dict[str, list[dict]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="tight")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, key in zip(axes, ("step", "seconds")):
        for name, points in curves.items():
            values = [point["val_accuracy"] for point in points]
            axis.plot([point[key] for point in points], values, marker="o", label=name)
        axis.set_xlabel(key)
    axes[0].set_ylabel("accuracy on validation questions")
    axes[0].legend()
    figure.savefig(path, dpi=110)


def main(argv: list[str]) -> None:
    steps = int(argv[0]) if argv else 600
    out = ROOT / "runs" / "optimizers"
    curves = {name: run(flags, out / str(i), steps)
              for i, (name, flags) in enumerate(variants().items())}  # fmt: skip
    draw(curves, ROOT / "docs" / "images" / "optimizers.png")
    rows = [(name, f"{x['val_loss']:.3f}", f"{x['val_accuracy']:.1%}", f"{x['seconds']:.0f}")
            for name, (*_, x) in curves.items()]  # fmt: skip
    print(markdown(("optimizer", "val_loss", "val_accuracy", "seconds"), rows))


if __name__ == "__main__":
    main(sys.argv[1:])
