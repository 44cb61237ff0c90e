"""What a run will take, found out by taking one step with the largest batch it may meet.

Not here: training (loop.py). Nothing is written.
"""

from __future__ import annotations

import resource
import sys
import time

import numpy as np
import torch

from configs import DataConfig, RunConfig
from data.batches.loader import Loader
from data.batches.packing import collate
from data.preview import marked, use_color
from data.processor import Processor
from data.types import Batch, Tokens
from engine.training.distributed import Dist
from engine.training.meter import finish
from engine.training.optim import Optimizers


def worst_batch(processor: Processor, cfg: DataConfig) -> Batch:
    """Full rows with as many tiles as fit, every word to be learned.

    Nothing the loader makes has more tokens, tiles or targets.
    """
    model = processor.cfg
    per_tile = model.tokens_per_tile
    most = cfg.tiles_per_batch // cfg.batch_size or cfg.max_length
    n_tiles = min((cfg.max_length - 2) // per_tile, most, cfg.max_length if cfg.packing
                  else cfg.max_tiles)  # fmt: skip
    ids = np.full(cfg.max_length, model.vlm_eos_token_id, dtype=np.int32)
    ids[1 : 1 + n_tiles * per_tile] = model.vlm_image_token_id
    size = model.vit_img_size
    tiles = np.full((n_tiles, size, size, 3), 128, dtype=np.uint8)
    row = Tokens(ids, ids == model.vlm_eos_token_id, tiles, "the largest row")
    return collate([[row]] * cfg.batch_size, model)


def peak_memory(device: torch.device) -> str:
    """The most memory this process had so far."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB of the device"
    unit = 1 if sys.platform == "darwin" else 2**10
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB"


def dry_run(
    cfg: RunConfig,
    model: torch.nn.Module,
    processor: Processor,
    loader: Loader,
    optimizer: Optimizers,
    dist: Dist,
    region: torch.autocast,
) -> str:
    """Two steps, of the largest batch and of the first real one; what they say about the run."""
    wrapped, t = dist.wrap(model.train()), cfg.train
    first = next(iter(loader))

    def step(batch: Batch) -> float:
        batch = batch.to(dist.device)
        optimizer.set_lr(0.0)
        finish(dist.device)
        start = time.perf_counter()
        for i in range(t.accumulate):
            with dist.sync(wrapped, last=i == t.accumulate - 1), region:
                _, loss = wrapped(**batch.tensors(), reduction="sum")
            (loss / batch.n_targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        finish(dist.device)
        return time.perf_counter() - start

    worst = worst_batch(processor, cfg.data)
    slowest, memory = step(worst), peak_memory(dist.device)
    usual = step(first)
    lines = ["part        parameters     training"]
    for name, part in model.parts.items():
        n = sum(p.numel() for p in part.parameters())
        n_trained = sum(p.numel() for p in part.parameters() if p.requires_grad)
        lines.append(f"{name:10} {n:11,}  {n_trained:11,}")
    batches = t.accumulate * dist.world
    lines += [
        f"largest batch: {worst.input_ids.shape[0]} rows of {worst.input_ids.shape[1]} tokens, "
        f"{len(worst.images)} tiles: {slowest:.2f} s a step, {memory} at most",
        f"first batch: {first.n_samples} samples, {first.n_tokens:,} tokens, {len(first.images)} "
        f"tiles, {first.n_tokens / first.input_ids.numel():.1%} full: {usual:.2f} s a step, "
        f"{first.n_tokens * batches / usual:,.0f} tokens/s",
        f"{t.steps:,} steps of {batches} batches, about {first.n_samples * batches * t.steps:,} "
        f"samples: {clock(usual * t.steps)}, at most {clock(slowest * t.steps)}",
        "the first sample, what is learned marked:",
        marked(first_sample(first), processor, use_color()),
    ]
    return "\n".join(lines)


def clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60:02d} min" if hours else f"{rest // 60} min {rest % 60:02d} s"


def first_sample(batch: Batch) -> Tokens:
    """The first conversation of the first row, from what the model eats."""
    n = int(batch.input_ids.shape[1])
    if batch.segments is not None:
        n = int((batch.segments[0] == 1).sum())
    ids, targets = batch.input_ids[0, :n].numpy(), batch.targets[0, :n].numpy()
    learned = np.concatenate(([False], targets[:-1] >= 0))
    if batch.segments is None and not learned[-1]:  # the padding behind it
        n = int(np.flatnonzero(learned)[-1]) + 2
    return Tokens(ids[:n], learned[:n], np.zeros((0, 1, 1, 3), np.uint8))
