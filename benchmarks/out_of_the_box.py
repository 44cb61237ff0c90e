"""Training as each project's own page says to do it, each in a process of its own, in turns.

python -m benchmarks.out_of_the_box                    writes its table into docs/

Ours is `python train.py 222m`, which packs, accumulates and chooses its optimizer. Theirs is the
loop of transformers' users around SmolVLM: padded conversations, AdamW, bf16 by autocast where that
is faster. Both see the world's conversations and start from random weights. A time is a
conversation's, pictures, optimizer and all, after the first step, by the wall clock; the share is
of the model's own arithmetic, padding left out.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from benchmarks.peers import ALONE, as_theirs, their_model
from benchmarks.timing import (
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
from configs import RunConfig, command, parse_run
from data import processor as processors
from data.loader import Loader
from data.sources import open_source
from engine.distributed import autocast, fast_dtype
from models.vision_language_model import VisionLanguageModel

CPU = torch.device("cpu")


def ours(argv: Sequence[str], steps: int) -> tuple[float, float]:
    """Seconds of a conversation of `train.py`, and its share of the peak of products.

    Each of the world's conversations has one picture.
    """
    later = watch_run(argv, steps).log[1:]
    each = [(1 / line["images_per_s"], line["mfu"]) for line in later]
    return tuple(sum(values) / len(later) for values in zip(*each, strict=True))


def theirs(run: RunConfig, folder: Path, rows: int, steps: int) -> float:
    """Seconds of a conversation of a plain loop; in a process of its own."""
    region = autocast(CPU, fast_dtype(CPU, "auto"))
    model = their_model(folder, torch.float32).train()
    model.lm_head.weight = model.get_input_embeddings().weight  # as ours; they read a copy
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    data = replace(run.data, packing=False, batch_size=rows)
    loader = Loader(open_source(data, "train"), processors.build(run.model), data)
    start = time.perf_counter()
    for step, batch in enumerate(itertools.islice(loader, steps)):
        with region:
            loss = model(**as_theirs(batch, run.model.vlm_pad_token_id)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            start = time.perf_counter()
    return (time.perf_counter() - start) / (steps - 1) / rows


def measure(argv: Sequence[str], turns: int, steps: int, rows: int) -> Row:
    """Both in turns."""
    run = parse_run(list(argv))
    sides, work = {"ours": Times([], []), "theirs": Times([], [])}, []
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        VisionLanguageModel(run.model).save_pretrained(folder)
        child = ["benchmarks.out_of_the_box", "--folder", folder, "--rows", str(rows)]
        for turn in range(turns):
            seconds, share = ours(argv, steps)
            work.append(seconds * share)  # of a conversation, in seconds of the peak
            sides["ours"].seconds.append(seconds)
            sides["theirs"].seconds.append(float(in_child([*child, "--", *argv])))
            print(turn, *(f"{side} {t.seconds[-1]:.3f} s" for side, t in sides.items()), flush=True)
    name = f"a conversation of training, {turns} turns"
    medians = [t.median for t in sides.values()]
    shares = ", ".join(f"{median(work) / m:.0%}" for m in medians)
    return Row(name, *map(readable, medians), ratios(*sides.values()), shares)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.out_of_the_box")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="of ours; the first is not timed")
    parser.add_argument("--rows", type=int, default=13, help="conversations in a batch of theirs")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("run", nargs="*", default=["222m", *ALONE], help="as train.py takes it")
    asked = parser.parse_args(argv)
    if asked.folder:
        print(theirs(parse_run(asked.run), asked.folder, asked.rows, 5))
        return
    line = where(command_line("benchmarks.out_of_the_box", argv))
    row = measure(asked.run, asked.turns, asked.steps, asked.rows)
    print(text := f"{line}\n\n{table([row])}")
    write_block(PAGE, "out of the box", text)


if __name__ == "__main__":
    command(main)
