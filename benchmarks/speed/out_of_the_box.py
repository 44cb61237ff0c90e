"""Training time as each project documents it: both in their own process, alternating.

python -m benchmarks.speed.out_of_the_box                    writes its table into docs/

picoVLM runs `python train.py 222m` (packed, accumulating); transformers runs the usual loop around
SmolVLM: padded conversations, AdamW, bf16 autocast where it is faster. Both train on the built-in
world from (different) random weights. Times are wall time per conversation, without the first step.
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

from benchmarks.speed import peers, timing
from benchmarks.speed.timing import Row, Times, format_seconds
from cli import command, parse_run
from configs import RunConfig
from data import processor as processors
from data.batches.loader import Loader
from data.sources.open import open_dataset
from engine.training.distributed import autocast, choose_dtype
from models.vision_language_model import VisionLanguageModel

CPU, N_ROWS = torch.device("cpu"), 13  # conversations in a batch of transformers
MODULE = "benchmarks.speed.out_of_the_box"


def picovlm_seconds(argv: Sequence[str], steps: int) -> float:
    """Seconds per conversation of `train.py`; each of the world's has one image, one tile."""
    log = timing.run_training(argv, steps).log
    rates = [line["images_per_s"] for line in log if "loss" in line]
    return mean(1 / rate for rate in rates[1:])


def transformers_seconds(run: RunConfig, folder: Path, steps: int) -> float:
    """Seconds per conversation of a plain loop around transformers' model."""
    region = autocast(CPU, choose_dtype(CPU, "auto"))
    model = peers.load_hf_model(folder, torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    data = replace(run.data, packing=False, batch_size=N_ROWS)
    loader = Loader(open_dataset(data, "train"), processors.build(run.model), data)
    ends = []
    for batch in itertools.islice(loader, steps):
        peers.hf_train_step(model, optimizer, batch, region, run.model.vlm_pad_token_id)
        ends.append(time.perf_counter())
    return (ends[-1] - ends[0]) / (steps - 1) / N_ROWS


def measure(preset: str, turns: int) -> Row:
    """Per turn two steps of picoVLM, of minutes each, and five of transformers."""
    argv = [preset, *peers.OFFLINE_FLAGS]
    run, sides = parse_run(argv), {"picoVLM": Times(), "transformers": Times()}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        VisionLanguageModel(run.model).save_pretrained(folder)
        child = [MODULE, preset, f"--folder={folder}"]
        for turn in range(turns):
            sides["picoVLM"].seconds.append(picovlm_seconds(argv, 2))
            sides["transformers"].seconds.append(float(timing.run_in_process(child)))
            print(turn, *(f"{side} {t.seconds[-1]:.3f} s" for side, t in sides.items()), flush=True)
    medians = (format_seconds(t.median) for t in sides.values())
    ratio = timing.ratios(*sides.values())
    return Row(f"a conversation of training, {turns} turns", *medians, ratio)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}")
    parser.add_argument("preset", nargs="?", choices=["tiny", "222m"], default="222m")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.folder:
        run = parse_run([args.preset, *peers.OFFLINE_FLAGS])
        print(transformers_seconds(run, args.folder, 5))
        return
    line = timing.describe_run(MODULE, argv)
    table = timing.table([measure(args.preset, args.turns)])
    print(text := f"{line}\n\n{table}")
    timing.write_block("out of the box", text)


if __name__ == "__main__":
    command(main)
