"""How the cost of a training step grows with length, images, packing, batch and model size.

python -m benchmarks.speed.growth                     prints a table and writes it into docs/

Each axis doubles while a step takes under `--max-seconds`. Also counted: bytes saved for backward
and FLOPs of attention. The exponent is the slope of the last three points in log-log scale: 1 means
proportional, 2 quadratic.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import linear_regression

import numpy as np
import torch
from torch import Tensor

from benchmarks.speed import timing
from benchmarks.speed.peers import random_conversations
from benchmarks.speed.timing import format_seconds
from cli import command
from configs import VLMConfig
from data.batches.packing import collate
from data.types import Batch, Tokens
from engine.training.distributed import set_malloc_thresholds
from models.vision_language_model import VisionLanguageModel

BASE = VLMConfig(lm_max_position_embeddings=8192)
PACKED_LENGTH = 64  # tokens of a packed conversation


@dataclass(frozen=True)
class Point:
    """One step: position on the axis, seconds, bytes saved for backward, FLOPs of attention."""

    x: float
    seconds: float
    saved: int
    attention: int


def make_conversation(cfg: VLMConfig, length: int, n_images: int = 1) -> Tokens:
    """A conversation of `length` tokens that starts with its images."""
    one = random_conversations(cfg, [length])[0]
    n = n_images * cfg.tokens_per_tile
    ids = np.where(one.ids == cfg.vlm_image_token_id, cfg.vlm_eos_token_id, one.ids)
    ids[1 : 1 + n] = cfg.vlm_image_token_id
    supervised = np.arange(length) >= 1 + n
    return Tokens(ids, supervised, np.repeat(one.tiles, n_images, axis=0))


def widen(x: int) -> VLMConfig:
    return replace(BASE, lm_hidden_dim=x, lm_inter_dim=2 * x, lm_n_heads=x // 32,
                   lm_n_kv_heads=x // 32)  # fmt: skip


@dataclass(frozen=True)
class Axis:
    """What grows: `rows(cfg, x)` of the batch, or the decoder's width x, measured in parameters."""

    first: int
    n_points: int  # each twice the one before
    rows: Callable[[VLMConfig, int], list[list[Tokens]]]
    by_width: bool = False

    def build(self, x: int) -> tuple[VisionLanguageModel, Batch]:
        torch.manual_seed(0)
        cfg = widen(x) if self.by_width else BASE
        return VisionLanguageModel(cfg).train(), collate(self.rows(cfg, x), cfg)


def packed(cfg: VLMConfig, x: int) -> list[list[Tokens]]:
    return [[make_conversation(cfg, PACKED_LENGTH)] * x]


AXES = {
    "tokens of one conversation": Axis(128, 7, lambda cfg, x: [[make_conversation(cfg, x)]]),
    "images of a row of 512": Axis(1, 5, lambda cfg, x: [[make_conversation(cfg, 512, x)]]),
    f"packed conversations of {PACKED_LENGTH}": Axis(2, 7, packed),
    "rows of 256 tokens": Axis(1, 6, lambda cfg, x: [[make_conversation(cfg, 256)]] * x),
    "parameters of the decoder's blocks": Axis(
        64, 5, lambda cfg, x: [[make_conversation(cfg, 256)]], by_width=True
    ),
}


def step_of(model: VisionLanguageModel, batch: Batch) -> Callable[[], None]:
    """Forward and backward, without the optimizer: its cost depends on the model size only."""

    def step() -> None:
        model.zero_grad()
        model(**batch.tensors())[1].backward()

    return step


def saved_for_backward(model: VisionLanguageModel, batch: Batch) -> int:
    """Bytes of all tensors that forward saves for backward, without weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x  # kept alive, so that no address is reused
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(**batch.tensors())
    return sum(x.untyped_storage().nbytes() for at, x in saved.items() if at not in weights)


def measure(axis: Axis, max_seconds: float) -> list[Point]:
    """Points along an axis, until a step takes longer than `max_seconds`."""
    points = []
    for value in (axis.first << i for i in range(axis.n_points)):
        model, batch = axis.build(value)
        n_params = sum(p.numel() for p in model.decoder.blocks.parameters())
        step = step_of(model, batch)
        _, attention = timing.count_flops(step)
        seconds = timing.alternate({"": step}, 0)[""].median
        x = n_params if axis.by_width else value
        points.append(Point(x, seconds, saved_for_backward(model, batch), attention))
        if seconds > max_seconds:
            break
    return points


def exponent(points: Sequence[Point], of: str) -> float:
    """Slope of the last three points in log-log scale, by least squares."""
    last = points[-3:]
    y = [math.log(max(getattr(p, of), 1e-12)) for p in last]
    return linear_regression([math.log(p.x) for p in last], y).slope


SHOWN: dict[str, Callable[[float], str]] = {
    "seconds": format_seconds,
    "saved": lambda n_bytes: f"{n_bytes / 2**20:,.1f} MiB",
    "attention": lambda flops: f"{flops / 1e9:,.2f} GFLOP",
}


def table(found: dict[str, list[Point]]) -> str:
    head = ["axis", "from - to", "step", "exponent", "saved for backward", "exponent", "attention",
            "exponent"]  # fmt: skip
    rows = []
    for name, points in found.items():
        a, b = points[0], points[-1]
        row = [name, f"{a.x:,.0f} - {b.x:,.0f}"]
        for of, show in SHOWN.items():
            ends = f"{show(getattr(a, of))} - {show(getattr(b, of))}"
            row += [ends, f"{exponent(points, of):.2f}"]
        rows.append(row)
    return timing.markdown(head, rows)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.growth")
    parser.add_argument("--max-seconds", type=float, default=3, help="of the longest step")
    args = parser.parse_args(argv)
    set_malloc_thresholds()
    line, found = timing.describe_run("benchmarks.speed.growth", argv), {}
    for name, axis in AXES.items():
        found[name] = measure(axis, args.max_seconds)
        print(f"{name}:", ", ".join(f"{p.x:,.0f} {format_seconds(p.seconds)}" for p in found[name]))
    print(text := f"{line}\n\n{table(found)}")
    timing.write_block("growth", text)


if __name__ == "__main__":
    command(main)
