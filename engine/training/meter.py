"""Throughput, device utilization and gradient norms for the log.

Not here: where they are logged (logger.py), when (loop.py).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator
from functools import cache
from typing import Any

import torch
from torch import nn

from engine.training.distributed import Dist


class Meter:
    """Tokens and images per second, model FLOPs utilization and data wait since the last `rates`.

    All time the host spends on data counts as waiting, even if a GPU computes meanwhile.
    """

    def __init__(self, model: nn.Module, autocast_context: torch.autocast) -> None:
        self.model = model
        one = torch.ones(1, 1, device=autocast_context.device)
        with autocast_context:
            self.dtype = (one @ one).dtype
        self.reset()

    def reset(self) -> None:
        """Start a new measurement."""
        self.start = time.perf_counter()
        self.waited = self.tokens = self.images = 0.0

    @contextlib.contextmanager
    def waiting_for_data(self) -> Generator[None]:
        """Count the time inside as data wait."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def count(self, micro_batches: list) -> None:
        """Add the tokens and images of a step."""
        self.tokens += sum(b.n_tokens for b in micro_batches)
        self.images += sum(len(b.images) for b in micro_batches)

    def rates(self, dist: Dist) -> dict[str, float]:
        """Rates over all processes since the last call; starts a new measurement."""
        seconds = time.perf_counter() - self.start
        tokens, images = dist.sum(self.tokens), dist.sum(self.images)
        peak = measure_peak_flops(dist.device, self.dtype) * dist.world_size
        rates = {
            "tokens_per_s": round(tokens / seconds, 1),
            "images_per_s": round(images / seconds, 3),
            "mfu": round(training_flops(self.model, tokens, images) / seconds / peak, 4),
            "data_wait": round(self.waited / seconds, 4),
        }
        self.reset()
        return rates


@cache
def measure_peak_flops(device: torch.device, dtype: torch.dtype, n: int = 1024) -> float:
    """Peak FLOP/s of this device in `dtype`: the best of four timed matrix products [n, n].

    On a GPU the matrices are larger and products are queued back to back.
    """
    repeats, n = (20, 8 * n) if device.type == "cuda" else (1, n)
    # Random values: with constant ones a GPU draws less power and clocks higher than in training.
    generator = torch.Generator(device).manual_seed(0)  # the run's generator stays untouched
    a = torch.randn(n, n, generator=generator, device=device).to(dtype)
    best = float("inf")
    for _ in range(4):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            a @ a
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 * repeats / best


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def training_flops(model: Any, n_tokens: float, n_images: float) -> float:
    """FLOPs of forward and backward: 6 per weight and token, 2 in frozen parts.

    Not counted: attention scores, the language model's head (it only sees supervised tokens), and
    recomputation by activation checkpointing. So the utilization is a lower bound.
    """
    cfg, total = model.cfg, 0.0
    patches = n_images * (cfg.vit_n_patches + cfg.vit_n_prefix)
    n_inputs = {"vision": patches, "projector": n_images * getattr(cfg, "tokens_per_tile", 0),
             "language": n_tokens, "trunk": patches, "head": n_images}  # fmt: skip
    for name, part in model.parts.items():
        for key, p in part.named_parameters():
            is_head = (name, key) == ("language", "head.weight")
            if p.ndim >= 2 and not is_head and "embedding" not in key.split(".")[0]:
                total += (6 if p.requires_grad else 2) * p.numel() * n_inputs[name]
    return total


def gradient_norms(parts: Any) -> dict[str, float]:
    """Gradient norm of every part, as `grad_norm_<part>`; frozen parts are omitted."""
    norms = {}
    for name, part in parts.items():
        grads = [p.grad for p in part.parameters() if p.grad is not None]
        if grads:
            norms[f"grad_norm_{name}"] = to_float(nn.utils.get_total_norm(grads))
    return norms


def to_float(x: Any) -> float:
    """Convert a scalar tensor to float; gather it first if it is sharded."""
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).item()
