"""How cost grows: a training step against length, images, samples of a row, batch, model size.

python -m benchmarks.speed.growth                     prints the table and writes it into docs/

Each axis doubles while a step stays under `--most` seconds. Beside the step stand what the backward
pass keeps in memory and the products of attention alone, both counted and not timed. The exponent
is the slope of the last three points in logarithms: 1 grows with the axis, 2 with its square.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from benchmarks.speed.peers import synthetic
from benchmarks.speed.timing import (
    PAGE,
    alternate,
    command_line,
    count,
    readable,
    where,
    write_block,
)
from cli import command
from configs import VLMConfig
from data.batches.packing import collate
from data.types import Batch, Tokens
from engine.training.distributed import keep_freed_memory
from models.ops.init import on_meta_device
from models.vision_language_model import VisionLanguageModel

BASE = VLMConfig(lm_max_position_embeddings=8192)
SAMPLE = 64  # tokens of a packed conversation


@dataclass(frozen=True)
class Point:
    """One step: its place on the axis, seconds, bytes kept for backward, FLOPs of attention."""

    x: float
    seconds: float
    kept: int
    attention: int


def of_length(cfg: VLMConfig, length: int, n_images: int = 1) -> Tokens:
    """A conversation of so many tokens, of which the pictures come first."""
    one = synthetic(cfg, [length])[0]
    n = n_images * cfg.tokens_per_tile
    ids = np.where(one.ids == cfg.vlm_image_token_id, cfg.vlm_eos_token_id, one.ids)
    ids[1 : 1 + n] = cfg.vlm_image_token_id
    supervised = np.arange(length) >= 1 + n
    return Tokens(ids, supervised, np.repeat(one.tiles, n_images, axis=0))


def by_length(x: int) -> tuple[VLMConfig, Batch, float]:
    return BASE, collate([[of_length(BASE, x)]], BASE), x


def by_images(x: int) -> tuple[VLMConfig, Batch, float]:
    return BASE, collate([[of_length(BASE, 512, x)]], BASE), x


def by_packed(x: int) -> tuple[VLMConfig, Batch, float]:
    return BASE, collate([[of_length(BASE, SAMPLE)] * x], BASE), x


def by_batch(x: int) -> tuple[VLMConfig, Batch, float]:
    return BASE, collate([[of_length(BASE, 256)]] * x, BASE), x


def by_size(x: int) -> tuple[VLMConfig, Batch, float]:
    """x is the decoder's width; its place on the axis is how many parameters that makes."""
    cfg = replace(BASE, lm_hidden_dim=x, lm_inter_dim=2 * x, lm_n_heads=x // 32,
                  lm_n_kv_heads=x // 32)  # fmt: skip
    with on_meta_device():
        decoder = VisionLanguageModel(cfg).decoder
    size = sum(p.numel() for p in decoder.blocks.parameters())
    return cfg, collate([[of_length(cfg, 256)]], cfg), size


@dataclass(frozen=True)
class Axis:
    make: Callable[[int], tuple[VLMConfig, Batch, float]]
    values: Sequence[int]


AXES = {
    "tokens of one conversation": Axis(by_length, [128 << i for i in range(7)]),
    "images of a row of 512": Axis(by_images, [1 << i for i in range(5)]),
    f"packed conversations of {SAMPLE}": Axis(by_packed, [2 << i for i in range(7)]),
    "rows of 256 tokens": Axis(by_batch, [1 << i for i in range(6)]),
    "parameters of the decoder's blocks": Axis(by_size, [64 << i for i in range(5)]),
}


def step_of(model: VisionLanguageModel, batch: Batch) -> Callable[[], None]:
    """Forward and backward, without the optimizer, whose cost is the model's alone."""

    def step() -> None:
        model.zero_grad()
        model(**batch.tensors())[1].backward()

    return step


def kept_for_backward(model: VisionLanguageModel, batch: Batch) -> int:
    """Bytes of all tensors that the forward pass leaves for the backward one, without weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        held[x.untyped_storage().data_ptr()] = x  # held, so that no address is used again
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(**batch.tensors())
    return sum(x.untyped_storage().nbytes() for at, x in held.items() if at not in weights)


def measure(axis: Axis, most: float) -> list[Point]:
    """Points along an axis, until a step takes longer than `most` seconds."""
    points = []
    for value in axis.values:
        cfg, batch, x = axis.make(value)
        torch.manual_seed(0)
        model = VisionLanguageModel(cfg).train()
        step = step_of(model, batch)
        _, attention = count(step)
        seconds = alternate({"": step}, 0)[""].median
        points.append(Point(x, seconds, kept_for_backward(model, batch), attention))
        if seconds > most:
            break
    return points


def exponent(points: Sequence[Point], of: str) -> float:
    """Slope of the last three points in logarithms, by least squares."""
    last = points[-3:]
    x = [math.log(p.x) for p in last]
    y = [math.log(max(getattr(p, of), 1e-12)) for p in last]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y)) / sum((a - mx) ** 2 for a in x)


def table(found: dict[str, list[Point]]) -> str:
    lines = ["| against | from - to | step | exponent | kept for backward | exponent | attention | "
             "exponent |", "|---" * 8 + "|"]  # fmt: skip
    for name, points in found.items():
        a, b = points[0], points[-1]
        lines.append(
            f"| {name} | {a.x:,.0f} - {b.x:,.0f} | {readable(a.seconds)} - {readable(b.seconds)} | "
            f"{exponent(points, 'seconds'):.2f} | {a.kept / 2**20:,.1f} - {b.kept / 2**20:,.1f} MiB"
            f" | {exponent(points, 'kept'):.2f} | {a.attention / 1e9:,.2f} - "
            f"{b.attention / 1e9:,.2f} GFLOP | {exponent(points, 'attention'):.2f} |"
        )
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.growth")
    parser.add_argument("--most", type=float, default=3, help="seconds of the longest step")
    asked = parser.parse_args(argv)
    keep_freed_memory()
    line = where(command_line("benchmarks.growth", argv))
    found = {}
    for name, axis in AXES.items():
        found[name] = measure(axis, asked.most)
        print(f"{name}: {', '.join(f'{p.x:,.0f} {readable(p.seconds)}' for p in found[name])}")
    print(text := f"{line}\n\n{table(found)}")
    write_block(PAGE, "growth", text)


if __name__ == "__main__":
    command(main)
