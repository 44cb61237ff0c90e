"""`--train.dry-run`: measure the time and memory of a run in two steps, without writing files.

Not here: training (loop.py).
"""

from __future__ import annotations

import resource
import sys
import time

import numpy as np
import torch

from configs import DataConfig, RunConfig, VLMConfig
from data.batches.loader import Loader
from data.batches.packing import collate
from data.preview import mark_supervised, use_color
from data.processor import Processor
from data.types import Batch, Tokens
from engine.training.distributed import Dist, activation_bytes
from engine.training.loop import accumulate_gradients
from engine.training.meter import synchronize
from engine.training.optim import Optimizers
from models.vision_language_model import VisionLanguageModel


def max_tiles_per_row(model: VLMConfig, data: DataConfig) -> int:
    """Maximum number of tiles that the loader puts into a row."""
    limit = data.max_length if data.packing else data.max_tiles
    per_row = data.tiles_per_batch // data.batch_size or data.max_length
    return min((data.max_length - 2) // model.tokens_per_tile, per_row, limit)


def choose_checkpointing(cfg: RunConfig, dtype: torch.dtype, budget: float) -> tuple[str, ...]:
    """Names of the parts that need activation checkpointing.

    These are the parts named in `cfg`, and those whose activations exceed `budget` bytes with the
    largest batch.
    """
    m, d, named = cfg.model, cfg.data, cfg.train.activation_checkpointing
    n_patches = d.batch_size * max_tiles_per_row(m, d) * m.vit_n_patches
    sizes = {
        "vision": (m.vit_n_blocks, n_patches, m.vit_hidden_dim, m.vit_inter_dim),
        "language": (m.lm_n_blocks, d.batch_size * d.max_length, m.lm_hidden_dim, m.lm_inter_dim),
    }
    too_large = [part for part in sizes if activation_bytes(*sizes[part], dtype) > budget]
    return tuple(part for part in sizes if part in named or part in too_large)


def largest_batch(processor: Processor, cfg: DataConfig) -> Batch:
    """The largest batch the loader can make: full rows, maximum tiles, all text supervised."""
    model = processor.cfg
    n_tiles = max_tiles_per_row(model, cfg)
    ids = np.full(cfg.max_length, model.vlm_eos_token_id, dtype=np.int32)
    ids[1 : 1 + n_tiles * model.tokens_per_tile] = model.vlm_image_token_id
    size = model.vit_img_size
    tiles = np.full((n_tiles, size, size, 3), 128, dtype=np.uint8)
    row = Tokens(ids, ids == model.vlm_eos_token_id, tiles, "the largest row")
    return collate([[row]] * cfg.batch_size, model)


def peak_memory(device: torch.device) -> str:
    """Peak memory of this process so far: GPU memory, or resident memory on a CPU."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB of GPU memory"
    unit = 1 if sys.platform == "darwin" else 2**10
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB"


def dry_run(
    cfg: RunConfig, model: VisionLanguageModel, processor: Processor, loader: Loader,
    optimizer: Optimizers, dist: Dist, autocast_context: torch.autocast,
) -> str:  # fmt: skip
    """Run a step with the largest batch and one with the first real batch; return a summary.

    The learning rate is 0, so the weights do not change.
    """
    wrapped, t = dist.wrap(model.train()), cfg.train
    first = next(iter(loader))

    def step(batch: Batch) -> float:
        batch = batch.to(dist.device)
        optimizer.set_lr(0.0)
        synchronize(dist.device)
        start = time.perf_counter()
        accumulate_gradients(wrapped, [batch] * t.accumulate, dist, autocast_context)
        optimizer.step()
        optimizer.zero_grad()
        synchronize(dist.device)
        return time.perf_counter() - start

    worst = largest_batch(processor, cfg.data)
    slowest, memory = step(worst), peak_memory(dist.device)
    usual = step(first)
    lines = ["part        parameters     training"]
    for name, part in model.parts.items():
        n = sum(p.numel() for p in part.parameters())
        n_trained = sum(p.numel() for p in part.parameters() if p.requires_grad)
        lines.append(f"{name:10} {n:11,}  {n_trained:11,}")
    batches = t.accumulate * dist.world_size
    n_samples = first.n_samples * batches * t.steps
    n_rows = 0 if cfg.data.stream else len(loader.dataset)
    epochs = f"samples, {n_samples / n_rows:.1f} epochs" if n_rows else "samples"
    lines += [
        f"largest batch: {worst.input_ids.shape[0]} rows of {worst.input_ids.shape[1]} tokens, "
        f"{len(worst.images)} tiles: {slowest:.2f} s/step, peak memory {memory}",
        f"first batch: {first.n_samples} samples, {first.n_tokens:,} tokens, {len(first.images)} "
        f"tiles, {first.n_tokens / first.input_ids.numel():.1%} full: {usual:.2f} s/step, "
        f"{first.n_tokens * batches / usual:,.0f} tokens/s",
        f"{t.steps:,} steps of {batches} batches, about {n_samples:,} {epochs}; estimated time "
        f"{format_time(usual * t.steps)}, at most {format_time(slowest * t.steps)}",
        "first sample, with supervised tokens marked:",
        mark_supervised(first_sample(first), processor, use_color()),
    ]
    return "\n".join(lines)


def format_time(seconds: float) -> str:
    """For example `1 h 05 min` or `2 min 30 s`."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60:02d} min" if hours else f"{rest // 60} min {rest % 60:02d} s"


def first_sample(batch: Batch) -> Tokens:
    """The first conversation of a batch, without images."""
    n = batch.input_ids.shape[1]
    if batch.segments is not None:
        n = int((batch.segments[0] == 1).sum())
    ids, targets = batch.input_ids[0, :n].numpy(), batch.targets[0, :n].numpy()
    supervised = np.concatenate(([False], targets[:-1] >= 0))
    if batch.segments is None and not supervised[-1]:  # without segments, padding follows
        n = int(np.flatnonzero(supervised)[-1]) + 2
    return Tokens(ids[:n], supervised[:n], np.zeros((0, 1, 1, 3), np.uint8))
