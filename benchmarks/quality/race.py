"""Accuracy over training time: picoVLM `tiny` and transformers' SmolVLM of the same size.

python -m benchmarks.quality.race           writes a table and a chart into docs/

Both start from the same weights, see the same conversations and answer the same questions greedily.
picoVLM trains as `python train.py` does, with AdamW rates for a run of minutes. SmolVLM trains as
its users usually do: padded batches, AdamW, linear decay, fp32 or bf16, whichever is faster. A few
trial steps set how many steps fill the time. Evaluations do not count.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from benchmarks.speed import timing
from benchmarks.speed.peers import hf_train_step, load_hf_model, without_pretrained
from benchmarks.speed.timing import clock
from cli import command
from configs import PRESETS, RunConfig
from data import processor as processors
from data.batches.loader import Loader
from data.processor import Processor
from data.sources.open import open_dataset
from engine.evaluation.evaluate import evaluate
from engine.training.distributed import autocast, choose_dtype, setup
from engine.training.loop import due, train
from engine.training.optim import build_optimizer
from models.vision_language_model import VisionLanguageModel

CPU = torch.device("cpu")
HF_RATE, HF_BATCH_SIZE, WARM_UP = 0.001, 64, 0.03  # peak rate; warm-up as a share of the steps
EVERY, N_QUESTIONS = 30, 400  # seconds between evaluations, and questions of each
# Twice those of the preset, as the run is short.
SHORT_RATES = dict(lr_vision=0.003, lr_projector=0.003, lr_language=0.003)


@dataclass(frozen=True)
class Point:
    seconds: float
    step: int
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Race:
    run: RunConfig
    folder: Path  # checkpoint of the initial weights
    processor: Processor
    n_questions: int  # of an evaluation

    def loader(self, **changes) -> Loader:
        data = replace(self.run.data, **changes)
        return Loader(open_dataset(data, "train"), self.processor, data)


class Stopwatch:
    """Seconds of training, stopped during evaluations, each of which adds a point."""

    def __init__(self, race: Race):
        self.race, self.points, self.spent, self.start = race, [], 0.0, clock()

    def evaluate(self, model: VisionLanguageModel, step: int) -> dict:
        self.spent += clock() - self.start
        race, region = self.race, autocast(CPU, choose_dtype(CPU, "auto"))
        found = evaluate(model, race.processor, race.run.data, race.n_questions, region)
        self.points.append(Point(self.spent, step, found["val_loss"], found["val_accuracy"]))
        self.start = clock()
        return found


def train_picovlm(race: Race, steps: int, every: int, dtype: torch.dtype) -> list[Point]:
    """Train with the functions of train.py."""
    torch.manual_seed(race.run.train.seed)
    dist, model = setup(), VisionLanguageModel.from_pretrained(race.folder)
    with tempfile.TemporaryDirectory() as out:
        t = replace(race.run.train, out=out, steps=steps, eval_every=every, save_every=0,
                    **SHORT_RATES)  # fmt: skip
        watch, optimizer = Stopwatch(race), build_optimizer(model.parts, t, dtype)
        train(replace(race.run, train=t), model, lambda m, folder: m.save_pretrained(folder),
              race.loader(), optimizer, dist, autocast(CPU, dtype),
              lambda step: watch.evaluate(model, step))  # fmt: skip
    return watch.points


def train_transformers(race: Race, steps: int, every: int, dtype: torch.dtype) -> list[Point]:
    """Train with a plain loop around transformers' model, AdamW and schedule."""
    from transformers import get_linear_schedule_with_warmup

    torch.manual_seed(race.run.train.seed)
    model, region = load_hf_model(race.folder, torch.float32).train(), autocast(CPU, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=HF_RATE, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, round(WARM_UP * steps), steps)
    watch = Stopwatch(race)
    batches = iter(race.loader(packing=False, batch_size=HF_BATCH_SIZE))
    for step in range(1, steps + 1):
        hf_train_step(model, optimizer, next(batches), region, race.run.model.vlm_pad_token_id)
        schedule.step()
        if due(step, every, steps):
            watch.evaluate(to_picovlm(model), step)
    return watch.points


def to_picovlm(model: nn.Module) -> VisionLanguageModel:
    """transformers' weights as a picoVLM model, so that both are evaluated by the same code."""
    with tempfile.TemporaryDirectory() as folder:
        tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.save_pretrained(folder, state_dict=tensors)
        return VisionLanguageModel.from_pretrained(folder)


SIDES = {"picoVLM": train_picovlm, "transformers": train_transformers}


def measure(race: Race, seconds: dict[str, float], every: float) -> dict[str, list[Point]]:
    """Both curves; the number of steps of each fills its time."""
    # Trial steps use questions, as most steps do: the captions trained on first are faster.
    data = replace(race.run.data, world_captions_first=0)
    trial, n, found = replace(race, n_questions=1, run=replace(race.run, data=data)), 20, {}
    auto = choose_dtype(CPU, "auto")
    for side, train_side in SIDES.items():
        per_step = {}  # seconds
        for dtype in {auto} if side == "picoVLM" else {auto, torch.float32}:
            first, later = train_side(trial, 2 * n, n, dtype)[-2:]  # without slow first steps
            per_step[dtype] = (later.seconds - first.seconds) / n
        dtype = min(per_step, key=per_step.get)
        steps = max(1, round(seconds[side] / per_step[dtype]))
        step = f"{timing.format_seconds(per_step[dtype])} a step in {dtype}"
        print(f"{side}: {step}, so {steps:,} of them", flush=True)
        found[side] = train_side(race, steps, max(1, round(every / per_step[dtype])), dtype)
    return found


def table(curves: dict[str, list[Point]]) -> str:
    """Points of both curves, and when picoVLM reaches the final accuracy of transformers."""
    rows = [(side, f"{p.seconds:,.0f}", f"{p.step:,}", f"{p.loss:.3f}", f"{p.accuracy:.1%}")
            for side, points in curves.items() for p in points]  # fmt: skip
    goal = curves["transformers"][-1]
    first = next((p for p in curves["picoVLM"] if p.accuracy >= goal.accuracy), None)
    when = f"picoVLM after {first.seconds:,.0f} s" if first else "picoVLM does not"
    reached = f"transformers reaches {goal.accuracy:.1%} in {goal.seconds:,.0f} s; {when}."
    head = ("", "seconds", "steps", "validation loss", "accuracy")
    return f"{timing.markdown(head, rows)}\n\n{reached}"


def draw(curves: dict[str, list[Point]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axis = figure.subplots()
    for side, points in curves.items():
        axis.plot([p.seconds for p in points], [p.accuracy for p in points], marker="o", label=side)
    axis.set(xlabel="seconds of training", ylabel="accuracy on validation questions", ylim=(0, 1))
    axis.legend()
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.race")
    parser.add_argument("--picovlm", type=float, default=178, help="seconds of training")
    parser.add_argument("--transformers", type=float, default=600, help="seconds of training")
    args = parser.parse_args(argv)
    line = timing.describe_run("benchmarks.quality.race", argv)
    run = without_pretrained(PRESETS["tiny"])
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(run.train.seed)
        VisionLanguageModel(run.model).save_pretrained(folder)
        race = Race(run, Path(folder), processors.build(run.model), N_QUESTIONS)
        seconds = {"picoVLM": args.picovlm, "transformers": args.transformers}
        curves = measure(race, seconds, EVERY)
    print(text := f"{line}\n\n{table(curves)}")
    timing.write_block("race", text)
    draw(curves, timing.IMAGES / "race.png")


if __name__ == "__main__":
    command(main)
