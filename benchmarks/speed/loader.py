"""Speed of the data loader alone and against the model: packing, images/s, share of a step.

python -m benchmarks.speed.loader tiny
python -m benchmarks.speed.loader 222m --model.lm-tokenizer DIR --data.source my.jsonl
Arguments are those of train.py. Weights are random, as speed does not depend on them. With one
thread (OMP_NUM_THREADS=1) times are CPU time.
"""

from __future__ import annotations

import io
from dataclasses import replace
from itertools import islice

import numpy as np
import torch
from PIL import Image

from benchmarks.speed.timing import clock
from cli import command, parse_run
from configs import RunConfig
from data import processor as processors
from data.batches import loader as loaders
from data.batches.stream_loader import open_loader
from data.processor import Processor
from data.sources.open import open_dataset
from data.types import Sample, Turn
from engine.training.distributed import autocast, choose_dtype, setup
from models.vision_language_model import VisionLanguageModel

BATCHES = 12
FORMATS = ("JPEG", "PNG", "WEBP")
SIDES = (256, 512, 1024, 2048)


def packing(cfg: RunConfig, processor: Processor) -> tuple[str, float]:
    """A table of how full rows and how even their tiles are, and seconds per batch."""
    source, lines = open_dataset(cfg.data, "train"), []
    lines.append("| packing | rows full | tiles per row, from, to | s per batch | packing itself |")
    lines.append("|---|---|---|---|---|")
    seconds = 0.0
    for name, packed in (("no", False), ("yes", True)):
        data = replace(cfg.data, packing=packed, workers=0)
        spent, original = [0.0], loaders.fill_rows

        def timed(*args, spent=spent, original=original):
            start = clock()
            rows = original(*args)
            spent[0] += clock() - start
            return rows

        loaders.fill_rows = timed
        batches = iter(open_loader(source, processor, data))
        next(batches)
        start, spent[0] = clock(), 0.0
        found = list(islice(batches, BATCHES))
        seconds = (clock() - start) / BATCHES
        loaders.fill_rows = original
        n_slots = sum(b.input_ids.shape[0] * data.max_length for b in found)
        full = sum(b.n_tokens for b in found) / n_slots
        per_tile, image = processor.cfg.tokens_per_tile, processor.cfg.vlm_image_token_id
        tiles = torch.cat([(b.input_ids == image).sum(1) // per_tile for b in found])
        lines.append(
            f"| {name} | {full:.1%} | {int(tiles.min())} to {int(tiles.max())} | {seconds:.4f} | "
            f"{spent[0] / BATCHES * 1000:.2f} ms |"
        )
    return "\n".join(lines), seconds


def image_rates(processor: Processor) -> str:
    """Images/s on one core, from the bytes of a file to tiles and tokens."""
    rng = np.random.default_rng(0)
    lines = ["| format | " + " | ".join(f"{s} x {s}" for s in SIDES) + " |", "|---" * 5 + "|"]
    turns = (Turn("user", "<image>What is this?"), Turn("assistant", "a picture"))
    for name in FORMATS:
        cells = []
        for side in SIDES:
            # Smooth noise compresses about as well as a photo.
            small = Image.fromarray(rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
            file = io.BytesIO()
            small.resize((side, side), Image.Resampling.BICUBIC).save(file, name)
            sample = Sample(turns, (file.getvalue(),), "benchmark")
            n, start = 0, clock()
            while n < 2 or clock() - start < 0.4:
                processor.encode_whole(sample, 1 << 20)
                n += 1
            cells.append(f"{n / (clock() - start):.0f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def compare_with_model(cfg: RunConfig, processor: Processor, seconds: float) -> str:
    """Seconds of forward and backward for a batch, beside the loader's."""
    dist = setup()
    model = VisionLanguageModel(cfg.model).to(dist.device)
    region = autocast(dist.device, choose_dtype(dist.device, cfg.train.precision))
    batch = next(iter(open_loader(open_dataset(cfg.data, "train"), processor, cfg.data)))
    batch, times = batch.to(dist.device), []
    for _ in range(2):
        start = clock()
        with region:
            _, loss = model(**batch.tensors())
        loss.backward()
        times.append(clock() - start)
    step = min(times)
    return (
        f"{cfg.data.batch_size} rows of {batch.input_ids.shape[1]} tokens, {len(batch.images)} "
        f"tiles: the model takes {step:.2f} s, {len(batch.images) / step:.1f} tiles/s; the loader "
        f"on one core {seconds:.3f} s, {len(batch.images) / seconds:.1f} tiles/s: "
        f"{step / seconds:.0f} times as fast; packing is {{packing}} of the step"
    )


def main(argv: list[str]) -> None:
    cfg = parse_run(argv)
    cfg = replace(cfg, model=replace(cfg.model, vit_model_type="", lm_model_type=""))
    processor = processors.build(cfg.model)
    table, seconds = packing(cfg, processor)
    print(table, end="\n\n", flush=True)
    print(image_rates(processor), end="\n\n", flush=True)
    report = compare_with_model(replace(cfg, data=replace(cfg.data, workers=0)), processor, seconds)
    milliseconds = float(table.rsplit("| ", 1)[1].split()[0])
    step = float(report.partition("takes ")[2].split()[0])
    print(report.replace("{packing}", f"{milliseconds / 1000 / step:.2%}"))


if __name__ == "__main__":
    command(main)
