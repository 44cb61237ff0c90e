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

import numpy as np
import torch
from torch import Tensor

from benchmarks.speed.peers import random_conversations
from benchmarks.speed.timing import (
    PAGE,
    alternate,
    command_line,
    count_flops,
    describe_run,
    format_seconds,
    write_block,
)
from cli import command
from configs import VLMConfig
from data.batches.packing import collate
from data.types import Batch, Tokens
from engine.training.distributed import set_malloc_thresholds
from models.ops.init import on_meta_device
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


def by_length(x: int) -> tuple[VLMConfig, Batch, float]:
    return BASE, collate([[make_conversation(BASE, x)]], BASE), x


def by_images(x: int) -> tuple[VLMConfig, Batch, float]:
    return BASE, collate([[make_conversation(BASE, 512, x)]], BASE), x


def by_packed(x: int) -> tuple[VLMConfig, Batch, float]:
    return BASE, collate([[make_conversation(BASE, PACKED_LENGTH)] * x], BASE), x


def by_batch(x: int) -> tuple[VLMConfig, Batch, float]:
    return BASE, collate([[make_conversation(BASE, 256)]] * x, BASE), x


def by_size(x: int) -> tuple[VLMConfig, Batch, float]:
    """x is the decoder's width; its position on the axis is the number of parameters."""
    cfg = replace(BASE, lm_hidden_dim=x, lm_inter_dim=2 * x, lm_n_heads=x // 32,
                  lm_n_kv_heads=x // 32)  # fmt: skip
    with on_meta_device():
        decoder = VisionLanguageModel(cfg).decoder
    n_params = sum(p.numel() for p in decoder.blocks.parameters())
    return cfg, collate([[make_conversation(cfg, 256)]], cfg), n_params


@dataclass(frozen=True)
class Axis:
    make: Callable[[int], tuple[VLMConfig, Batch, float]]
    values: Sequence[int]


AXES = {
    "tokens of one conversation": Axis(by_length, [128 << i for i in range(7)]),
    "images of a row of 512": Axis(by_images, [1 << i for i in range(5)]),
    f"packed conversations of {PACKED_LENGTH}": Axis(by_packed, [2 << i for i in range(7)]),
    "rows of 256 tokens": Axis(by_batch, [1 << i for i in range(6)]),
    "parameters of the decoder's blocks": Axis(by_size, [64 << i for i in range(5)]),
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
    for value in axis.values:
        cfg, batch, x = axis.make(value)
        torch.manual_seed(0)
        model = VisionLanguageModel(cfg).train()
        step = step_of(model, batch)
        _, attention = count_flops(step)
        seconds = alternate({"": step}, 0)[""].median
        points.append(Point(x, seconds, saved_for_backward(model, batch), attention))
        if seconds > max_seconds:
            break
    return points


def exponent(points: Sequence[Point], of: str) -> float:
    """Slope of the last three points in log-log scale, by least squares."""
    last = points[-3:]
    x = [math.log(p.x) for p in last]
    y = [math.log(max(getattr(p, of), 1e-12)) for p in last]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y)) / sum((a - mx) ** 2 for a in x)


def table(found: dict[str, list[Point]]) -> str:
    lines = ["| axis | from - to | step | exponent | saved for backward | exponent | attention | "
             "exponent |", "|---" * 8 + "|"]  # fmt: skip
    for name, points in found.items():
        a, b = points[0], points[-1]
        lines.append(
            f"| {name} | {a.x:,.0f} - {b.x:,.0f} | {format_seconds(a.seconds)} - "
            f"{format_seconds(b.seconds)} | {exponent(points, 'seconds'):.2f} | "
            f"{a.saved / 2**20:,.1f} - {b.saved / 2**20:,.1f} MiB | "
            f"{exponent(points, 'saved'):.2f} | {a.attention / 1e9:,.2f} - "
            f"{b.attention / 1e9:,.2f} GFLOP | {exponent(points, 'attention'):.2f} |"
        )
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.growth")
    parser.add_argument("--max-seconds", type=float, default=3, help="of the longest step")
    args = parser.parse_args(argv)
    set_malloc_thresholds()
    line = describe_run(command_line("benchmarks.speed.growth", argv))
    found = {}
    for name, axis in AXES.items():
        found[name] = measure(axis, args.max_seconds)
        print(
            f"{name}: {', '.join(f'{p.x:,.0f} {format_seconds(p.seconds)}' for p in found[name])}"
        )
    print(text := f"{line}\n\n{table(found)}")
    write_block(PAGE, "growth", text)


if __name__ == "__main__":
    command(main)
