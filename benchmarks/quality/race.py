"""Accuracy on the world against time: picoVLM `tiny` and transformers' SmolVLM of its size.

python -m benchmarks.quality.race                          writes docs/race.png and a table into docs/

The same first weights, conversations in the same order, validation questions and greedy answers.
picoVLM trains as `python train.py` does, with AdamW's rates for a run of minutes; SmolVLM as its
users write it: padded batches, AdamW, linear decay, in fp32 or bf16, whichever its steps are faster
in. A few steps of each say how many fill its time.
Data, steps and checkpoints count, evaluations do not; benchmarks/speed/timing.py says by which clock.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from benchmarks.speed.peers import random_weights, their_model, their_step
from benchmarks.speed.timing import PAGE, clock, command_line, readable, where, write_block
from cli import command
from configs import PRESETS, RunConfig
from data import processor as processors
from data.batches.loader import Loader
from data.processor import Processor
from data.sources.open import open_source
from engine.evaluation.evaluate import evaluate
from engine.training.distributed import autocast, fast_dtype, setup
from engine.training.loop import due, train
from engine.training.optim import build_optimizer
from models.vision_language_model import VisionLanguageModel

CPU = torch.device("cpu")
WARM_UP = 0.03  # of their steps
SHORT = dict(lr_vision=0.003, lr_projector=0.003, lr_language=0.003)  # twice those of the preset


@dataclass(frozen=True)
class Point:
    seconds: float
    step: int
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Race:
    run: RunConfig
    folder: Path  # the first weights
    processor: Processor
    questions: int  # of an evaluation
    rate: float  # their peak learning rate
    rows: int  # conversations in a batch of theirs

    def loader(self, **changes) -> Loader:
        data = replace(self.run.data, **changes)
        return Loader(open_source(data, "train"), self.processor, data)


class Watch:
    """Seconds of training: it stands while something is evaluated, which gives a point."""

    def __init__(self, race: Race):
        self.race, self.points, self.spent, self.start = race, [], 0.0, clock()

    def evaluate(self, model: VisionLanguageModel, step: int) -> dict:
        self.spent += clock() - self.start
        race, region = self.race, autocast(CPU, fast_dtype(CPU, "auto"))
        found = evaluate(model, race.processor, race.run.data, race.questions, region)
        loss, accuracy = found["val_loss"], found["val_accuracy"]
        self.points.append(Point(self.spent, step, loss, accuracy))
        self.start = clock()
        return found


def ours(race: Race, steps: int, every: int, dtype: torch.dtype) -> list[Point]:
    """As train.py, whose functions these are."""
    torch.manual_seed(race.run.train.seed)
    dist = setup()
    model = VisionLanguageModel.from_pretrained(race.folder)
    with tempfile.TemporaryDirectory() as out:
        t = replace(race.run.train, out=out, steps=steps, eval_every=every, save_every=0, **SHORT)
        watch, optimizer = Watch(race), build_optimizer(model.parts, t, dtype)
        train(replace(race.run, train=t), model, lambda m, folder: m.save_pretrained(folder),
              race.loader(), optimizer, dist, autocast(CPU, dtype),
              lambda step: watch.evaluate(model, step))  # fmt: skip
    return watch.points


def theirs(race: Race, steps: int, every: int, dtype: torch.dtype) -> list[Point]:
    """A plain loop around transformers' model, AdamW and schedule."""
    from transformers import get_linear_schedule_with_warmup

    torch.manual_seed(race.run.train.seed)
    model, region = their_model(race.folder, torch.float32).train(), autocast(CPU, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=race.rate, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, round(WARM_UP * steps), steps)
    watch = Watch(race)
    batches = iter(race.loader(packing=False, batch_size=race.rows))
    for step in range(1, steps + 1):
        their_step(model, optimizer, next(batches), region, race.run.model.vlm_pad_token_id)
        schedule.step()
        if due(step, every, steps):
            watch.evaluate(opened(model), step)
    return watch.points


def opened(model: nn.Module) -> VisionLanguageModel:
    """Their weights in our model, so that both answer through the same code."""
    with tempfile.TemporaryDirectory() as folder:
        tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.save_pretrained(folder, state_dict=tensors)
        return VisionLanguageModel.from_pretrained(folder)


SIDES: dict[str, Callable[[Race, int, int, torch.dtype], list[Point]]] = {
    "picoVLM": ours,
    "transformers": theirs,
}


def measure(race: Race, seconds: dict[str, float], every: float) -> dict[str, list[Point]]:
    """Both curves; the steps of each fill its time."""
    # Of questions, as most steps are: the descriptions that come first take an eighth less.
    data = replace(race.run.data, world_first=0)
    trial, n, found = replace(race, questions=1, run=replace(race.run, data=data)), 20, {}
    auto = fast_dtype(CPU, "auto")
    for side, side_of in SIDES.items():
        one = {}  # seconds of a step
        for dtype in {auto} if side == "picoVLM" else {auto, torch.float32}:
            first, later = side_of(trial, 2 * n, n, dtype)[-2:]  # the first steps take longer
            one[dtype] = (later.seconds - first.seconds) / n
        dtype = min(one, key=one.get)
        steps = max(1, round(seconds[side] / one[dtype]))
        print(f"{side}: {readable(one[dtype])} a step in {dtype}, so {steps:,} of them", flush=True)
        found[side] = side_of(race, steps, max(1, round(every / one[dtype])), dtype)
    return found


def table(curves: dict[str, list[Point]]) -> str:
    """Each curve's points, and when ours has reached the last of theirs."""
    lines = ["| | seconds | steps | validation loss | accuracy |", "|---|---|---|---|---|"]
    for side, points in curves.items():
        lines += [f"| {side} | {p.seconds:,.0f} | {p.step:,} | {p.loss:.3f} | {p.accuracy:.1%} |"
                  for p in points]  # fmt: skip
    goal = curves["transformers"][-1]
    first = next((p for p in curves["picoVLM"] if p.accuracy >= goal.accuracy), None)
    when = f"picoVLM is there after {first.seconds:,.0f} s" if first else "picoVLM is not there yet"
    reached = f"transformers reaches {goal.accuracy:.1%} in {goal.seconds:,.0f} s; {when}."
    return "\n".join([*lines, "", reached])


def draw(curves: dict[str, list[Point]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 3.2), layout="constrained")
    for side, points in curves.items():
        axis.plot([p.seconds for p in points], [p.accuracy for p in points], marker="o", label=side)
    axis.set(xlabel="seconds of training", ylabel="accuracy on validation questions", ylim=(0, 1))
    axis.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.race")
    parser.add_argument("--ours", type=float, default=178, help="seconds of picoVLM")
    parser.add_argument("--theirs", type=float, default=600, help="seconds of transformers")
    parser.add_argument("--every", type=float, default=30, help="seconds between evaluations")
    parser.add_argument("--questions", type=int, default=400, help="of an evaluation")
    parser.add_argument("--rate", type=float, default=0.001, help="AdamW's for transformers")
    parser.add_argument("--rows", type=int, default=64, help="conversations in their batch")
    asked = parser.parse_args(argv)
    line = where(command_line("benchmarks.race", list(argv)))
    run = random_weights(PRESETS["tiny"])
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(run.train.seed)
        VisionLanguageModel(run.model).save_pretrained(folder)
        race = Race(run, Path(folder), processors.build(run.model), asked.questions, asked.rate,
                    asked.rows)  # fmt: skip
        seconds = {"picoVLM": asked.ours, "transformers": asked.theirs}
        curves = measure(race, seconds, asked.every)
    print(text := f"{line}\n\n{table(curves)}")
    write_block(PAGE, "race", text)
    draw(curves, PAGE.with_name("race.png"))


if __name__ == "__main__":
    command(main)
