"""Speed of the data loader, alone and compared with the model: packing, images/s, share of a step.

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

from benchmarks.speed.peers import without_pretrained
from benchmarks.speed.timing import clock, markdown
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


def packing(cfg: RunConfig, processor: Processor) -> tuple[str, float, float]:
    """A table of fill and tiles of rows, seconds per batch, and seconds of packing per batch.

    Both times are those of packed rows.
    """
    source, rows = open_dataset(cfg.data, "train"), []
    original, spent = loaders.fill_rows, 0.0

    def timed(*args):
        nonlocal spent
        start = clock()
        found = original(*args)
        spent += clock() - start
        return found

    loaders.fill_rows = timed
    for name in ("no", "yes"):
        data = replace(cfg.data, packing=name == "yes", workers=0)
        batches = iter(open_loader(source, processor, data))
        next(batches)
        start, spent = clock(), 0.0
        found = list(islice(batches, BATCHES))
        seconds, packing_seconds = (clock() - start) / BATCHES, spent / BATCHES
        full = sum(b.n_tokens for b in found) / (
            data.max_length * sum(len(b.input_ids) for b in found)
        )
        is_image = [b.input_ids == processor.cfg.vlm_image_token_id for b in found]
        tiles = torch.cat([x.sum(1) // processor.cfg.tokens_per_tile for x in is_image])
        rows.append([name, f"{full:.1%}", f"{int(tiles.min())} - {int(tiles.max())}",
                     f"{seconds:.4f}", f"{packing_seconds * 1000:.2f} ms"])  # fmt: skip
    loaders.fill_rows = original
    head = ["packing", "rows full", "tiles per row", "s per batch", "packing alone"]
    return markdown(head, rows), seconds, packing_seconds


def image_rates(processor: Processor) -> str:
    """Images/s on one core, from the bytes of a file to tiles and tokens."""
    rng, rows = np.random.default_rng(0), []
    turns = (Turn("user", "<image>What is this?"), Turn("assistant", "a picture"))
    for name in FORMATS:
        rows.append([name])
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
            rows[-1].append(f"{n / (clock() - start):.0f}")
    return markdown(["format", *(f"{side} x {side}" for side in SIDES)], rows)


def compare_with_model(
    cfg: RunConfig, processor: Processor, seconds: float, packing_seconds: float
) -> str:
    """One line: seconds of the model (forward and backward) and of the loader for a batch."""
    device = setup().device
    model = VisionLanguageModel(cfg.model).to(device)
    region = autocast(device, choose_dtype(device, cfg.train.precision))
    data = replace(cfg.data, workers=0)
    batch = next(iter(open_loader(open_dataset(data, "train"), processor, data))).to(device)
    times = []
    for _ in range(2):
        start = clock()
        with region:
            _, loss = model(**batch.tensors())
        loss.backward()
        times.append(clock() - start)
    step, n_tiles = min(times), len(batch.images)
    return (
        f"{data.batch_size} rows of {batch.input_ids.shape[1]} tokens, {n_tiles} "
        f"tiles: the model takes {step:.2f} s, {n_tiles / step:.1f} tiles/s; the loader "
        f"on one core {seconds:.3f} s, {n_tiles / seconds:.1f} tiles/s: "
        f"{step / seconds:.0f} times as fast; packing is {packing_seconds / step:.2%} of the step"
    )


def main(argv: list[str]) -> None:
    cfg = without_pretrained(parse_run(argv))
    processor = processors.build(cfg.model)
    table, *seconds = packing(cfg, processor)
    print(table, image_rates(processor), sep="\n\n", end="\n\n", flush=True)
    print(compare_with_model(cfg, processor, *seconds))


if __name__ == "__main__":
    command(main)
