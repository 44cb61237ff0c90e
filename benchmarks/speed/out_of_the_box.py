"""Training time as each project documents it: both in their own process, alternating.

python -m benchmarks.speed.out_of_the_box                    writes its table into docs/

picoVLM runs `python train.py 222m` (packed, accumulating); transformers runs the usual loop around
SmolVLM: padded conversations, AdamW, bf16 autocast where it is faster. Both train on the built-in
world from (different) random weights. Times are wall time per conversation, optimizer included,
without the first step. Losses are not compared here; compare.py does.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch

from benchmarks.speed.peers import OFFLINE_FLAGS, hf_train_step, load_hf_model
from benchmarks.speed.timing import (
    PAGE,
    Row,
    Times,
    command_line,
    describe_run,
    format_seconds,
    ratios,
    run_in_process,
    run_training,
    table,
    write_block,
)
from cli import command, parse_run
from configs import RunConfig
from data import processor as processors
from data.batches.loader import Loader
from data.sources.open import open_dataset
from engine.training.distributed import autocast, choose_dtype
from models.vision_language_model import VisionLanguageModel

CPU = torch.device("cpu")


def picovlm_seconds(argv: Sequence[str], steps: int) -> float:
    """Seconds per conversation of `train.py`; each of the world's has one image, one tile."""
    rates = [line["images_per_s"] for line in run_training(argv, steps).log if "loss" in line]
    return mean(1 / rate for rate in rates[1:])


def transformers_seconds(run: RunConfig, folder: Path, n_rows: int, steps: int) -> float:
    """Seconds per conversation of a plain loop around transformers' model."""
    region = autocast(CPU, choose_dtype(CPU, "auto"))
    model = load_hf_model(folder, torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    data = replace(run.data, packing=False, batch_size=n_rows)
    loader = Loader(open_dataset(data, "train"), processors.build(run.model), data)
    ends = []
    for batch in itertools.islice(loader, steps):
        hf_train_step(model, optimizer, batch, region, run.model.vlm_pad_token_id)
        ends.append(time.perf_counter())
    return (ends[-1] - ends[0]) / (steps - 1) / n_rows


def measure(preset: str, turns: int, n_rows: int) -> Row:
    """Per turn two steps of picoVLM, of minutes each, and five of transformers."""
    argv = [preset, *OFFLINE_FLAGS]
    run, sides = parse_run(argv), {"picoVLM": Times([], []), "transformers": Times([], [])}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        VisionLanguageModel(run.model).save_pretrained(folder)
        child = ["benchmarks.speed.out_of_the_box", preset, "--folder", folder]
        child += ["--rows", str(n_rows)]
        for turn in range(turns):
            sides["picoVLM"].seconds.append(picovlm_seconds(argv, 2))
            sides["transformers"].seconds.append(float(run_in_process(child)))
            print(turn, *(f"{side} {t.seconds[-1]:.3f} s" for side, t in sides.items()), flush=True)
    medians = (format_seconds(t.median) for t in sides.values())
    return Row(f"a conversation of training, {turns} turns", *medians, ratios(*sides.values()))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.out_of_the_box")
    parser.add_argument("preset", nargs="?", choices=["tiny", "222m"], default="222m")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--rows", type=int, default=13, help="transformers' batch size")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.folder:
        print(
            transformers_seconds(
                parse_run([args.preset, *OFFLINE_FLAGS]), args.folder, args.rows, 5
            )
        )
        return
    line = describe_run(command_line("benchmarks.speed.out_of_the_box", argv))
    row = measure(args.preset, args.turns, args.rows)
    print(text := f"{line}\n\n{table([row])}")
    write_block(PAGE, "out of the box", text)


if __name__ == "__main__":
    command(main)
