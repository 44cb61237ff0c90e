"""Training as each project's own page says to do it, each in a process of its own, in turns.

python -m benchmarks.speed.out_of_the_box                    writes its table into docs/

Ours is `python train.py 222m`, which packs and accumulates. Theirs is the loop that transformers'
users write around SmolVLM: padded conversations, AdamW, bf16 by autocast where products are faster
in it. Both see the world's conversations and start from random weights, not from the same. A time
is that of a conversation, from its picture to its share of the optimizer's work, by the wall clock
and without the first step. Nothing holds their losses against each other: speed.py does.
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

from benchmarks.speed.peers import ALONE, their_model, their_step
from benchmarks.speed.timing import (
    PAGE,
    Row,
    Times,
    command_line,
    in_child,
    ratios,
    readable,
    table,
    watch_run,
    where,
    write_block,
)
from cli import command, parse_run
from configs import RunConfig
from data import processor as processors
from data.batches.loader import Loader
from data.sources.open import open_source
from engine.training.distributed import autocast, fast_dtype
from models.vision_language_model import VisionLanguageModel

CPU = torch.device("cpu")


def ours(argv: Sequence[str], steps: int) -> float:
    """Seconds of a conversation of `train.py`; each of the world's has one picture, one tile."""
    rates = [line["images_per_s"] for line in watch_run(argv, steps).log if "loss" in line]
    return mean(1 / rate for rate in rates[1:])


def theirs(run: RunConfig, folder: Path, rows: int, steps: int) -> float:
    """Seconds of a conversation of a plain loop; in a process of its own."""
    region = autocast(CPU, fast_dtype(CPU, "auto"))
    model = their_model(folder, torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    data = replace(run.data, packing=False, batch_size=rows)
    loader = Loader(open_source(data, "train"), processors.build(run.model), data)
    ends = []
    for batch in itertools.islice(loader, steps):
        their_step(model, optimizer, batch, region, run.model.vlm_pad_token_id)
        ends.append(time.perf_counter())
    return (ends[-1] - ends[0]) / (steps - 1) / rows


def measure(preset: str, turns: int, rows: int) -> Row:
    """Two steps of ours, of minutes each, and five of theirs in every turn."""
    argv = [preset, *ALONE]
    run, sides = parse_run(argv), {"ours": Times([], []), "theirs": Times([], [])}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        VisionLanguageModel(run.model).save_pretrained(folder)
        child = ["benchmarks.out_of_the_box", preset, "--folder", folder, "--rows", str(rows)]
        for turn in range(turns):
            sides["ours"].seconds.append(ours(argv, 2))
            sides["theirs"].seconds.append(float(in_child(child)))
            print(turn, *(f"{side} {t.seconds[-1]:.3f} s" for side, t in sides.items()), flush=True)
    medians = (readable(t.median) for t in sides.values())
    return Row(f"a conversation of training, {turns} turns", *medians, ratios(*sides.values()))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.out_of_the_box")
    parser.add_argument("preset", nargs="?", choices=["tiny", "222m"], default="222m")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--rows", type=int, default=13, help="conversations in a batch of theirs")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args(argv)
    if asked.folder:
        print(theirs(parse_run([asked.preset, *ALONE]), asked.folder, asked.rows, 5))
        return
    line = where(command_line("benchmarks.out_of_the_box", argv))
    row = measure(asked.preset, asked.turns, asked.rows)
    print(text := f"{line}\n\n{table([row])}")
    write_block(PAGE, "out of the box", text)


if __name__ == "__main__":
    command(main)
