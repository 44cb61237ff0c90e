"""Muon against AdamW on the built-in world: same model, data, seed and steps.

python -m benchmarks.quality.optimizers [STEPS]     writes docs/optimizers.png and prints a table

AdamW runs with several learning rates, Muon with the preset's.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RATES = ("lr_vision", "lr_projector", "lr_language")
ADAMW_RATES = (0.0005, 0.001, 0.002, 0.004)


def variants() -> dict[str, list[str]]:
    """Name of each run -> its flags."""
    found = {"Muon, the preset": []}
    for rate in ADAMW_RATES:
        flags = [f"--train.{name.replace('_', '-')}={rate}" for name in RATES]
        found[f"AdamW, {rate}"] = ["--train.optimizer=adamw", *flags]
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
    for axis, key, label in ((axes[0], "step", "steps"), (axes[1], "seconds", "seconds")):
        for name, points in curves.items():
            values = [point["val_accuracy"] for point in points]
            axis.plot([point[key] for point in points], values, marker="o", label=name)
        axis.set_xlabel(label)
    axes[0].set_ylabel("accuracy on validation questions")
    axes[0].legend()
    figure.savefig(path, dpi=110)


def main(argv: list[str]) -> None:
    steps = int(argv[0]) if argv else 600
    curves = {
        name: run(flags, ROOT / "runs" / "optimizers" / str(i), steps)
        for i, (name, flags) in enumerate(variants().items())
    }
    draw(curves, ROOT / "docs" / "optimizers.png")
    print("| optimizer | loss | accuracy | seconds |\n|---|---|---|---|")
    for name, points in curves.items():
        last = points[-1]
        loss, accuracy = last["val_loss"], last["val_accuracy"]
        print(f"| {name} | {loss:.3f} | {accuracy:.1%} | {last['seconds']:.0f} |")


if __name__ == "__main__":
    main(sys.argv[1:])
