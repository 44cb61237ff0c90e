"""How fast a run goes and what its gradients do: what the log says beside the loss.

Not here: where it is said (logger.py), when (loop.py).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor, nn

from engine.training.distributed import Dist


class Meter:
    """Tokens and images per second, use of the device, waiting for data, since last asked.

    All that the host does for data counts as waiting, what a GPU's work hides as well.
    """

    def __init__(self, model: nn.Module, region: torch.autocast):
        self.model = model
        one = torch.ones(1, 1, device=region.device)
        with region:
            self.dtype = (one @ one).dtype
        self.reset()

    def reset(self) -> None:
        self.start = time.perf_counter()
        self.waited = self.tokens = self.images = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time within is spent waiting for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def count(self, micro: list) -> None:
        self.tokens += sum(b.n_tokens for b in micro)
        self.images += sum(len(b.images) for b in micro)

    def rates(self, dist: Dist) -> dict[str, float]:
        seconds = time.perf_counter() - self.start
        tokens, images = dist.sum(self.tokens), dist.sum(self.images)
        most = matmul_peak(dist.device, self.dtype) * dist.world
        rates = {
            "tokens_per_s": round(tokens / seconds, 1),
            "images_per_s": round(images / seconds, 3),
            "mfu": round(flops(self.model, tokens, images) / seconds / most, 4),
            "data_wait": round(self.waited / seconds, 4),
        }
        self.reset()
        return rates


@cache
def matmul_peak(device: torch.device, dtype: torch.dtype, n: int = 1024) -> float:
    """Most products and sums per second of this device in `dtype`: the best of a few, measured.

    On an accelerator the matrices are larger, and many wait in line.
    """
    repeats, n = (20, 8 * n) if device.type == "cuda" else (1, n)
    # Random, as of equal numbers a GPU draws less power, which makes it faster than it will be.
    own = torch.Generator(device).manual_seed(0)  # a run's own numbers stay what they were
    a, best = torch.randn(n, n, generator=own, device=device).to(dtype), float("inf")
    for _ in range(4):
        finish(device)
        start = time.perf_counter()
        for _ in range(repeats):
            a @ a
        finish(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 * repeats / best


def finish(device: torch.device) -> None:
    """Wait for what an accelerator was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def flops(model: nn.Module, n_tokens: float, n_images: float) -> float:
    """Products and sums of a forward and a backward pass: 6 for each weight and token it meets.

    A part without gradients costs 2. Attention's own products, those of a language model's head,
    which meets supervised tokens alone, and what is computed again to save memory are not counted,
    so the share of the peak that follows is a lower bound.
    """
    cfg, total = model.cfg, 0.0
    patches = n_images * (cfg.vit_n_patches + cfg.vit_n_prefix)
    meets = {"vision": patches, "projector": n_images * getattr(cfg, "tokens_per_tile", 0),
             "language": n_tokens, "trunk": patches, "head": n_images}  # fmt: skip
    for name, part in model.parts.items():
        for key, p in part.named_parameters():
            apart = "embedding" in key.split(".")[0] or (name, key) == ("language", "head.weight")
            if p.ndim >= 2 and not apart:
                total += (6 if p.requires_grad else 2) * p.numel() * meets[name]
    return total


def part_norms(parts: dict[str, nn.Module]) -> dict[str, float]:
    """Norm of every part's gradient; a frozen part has none and is left out."""
    found = {}
    for name, part in parts.items():
        grads = [p.grad for p in part.parameters() if p.grad is not None]
        if grads:
            found[f"grad_norm_{name}"] = number(nn.utils.get_total_norm(grads))
    return found


def number(x: Tensor) -> float:
    """A scalar, whole where processes hold parts of it."""
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).item()
