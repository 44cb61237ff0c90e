"""Logging of a run: progress bar, log.jsonl, loss.png, Weights & Biases."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from config_tools import InputError, import_optional, to_dict
from configs import RunConfig
from configs_classify import ClassifyConfig
from engine.figures.curves import run_figure
from engine.figures.style import plotting
from models.pretrained.save import unsupported_reason


def describe_run(cfg: RunConfig, model: Any, source: Any, step: int) -> None:
    """Print parameters, data and steps before training starts."""
    parts = ", ".join(
        f"{name} {sum(p.numel() for p in part.parameters()) / 1e6:.2f} M"
        f"{' (frozen)' if name in cfg.train.freeze else ''}"
        for name, part in model.parts.items()
    )
    rows = "a stream" if cfg.data.stream else f"{len(source):,} rows"
    print(f"model: {parts}; data: {rows} of {cfg.data.source}; "
          f"steps {step} to {cfg.train.steps}; run folder: {cfg.train.out}")  # fmt: skip
    if cfg.train.init_from and step == 0:
        print(f"weights: from {cfg.train.init_from}, with its model settings")
    backbones = [name for name in (cfg.model.vit_model_type, cfg.model.lm_model_type) if name]
    if backbones and step == 0 and not cfg.train.init_from:
        print(f"weights: from {' and '.join(backbones)}, the rest random")
    if reason := unsupported_reason(cfg.model):
        print(f"checkpoints: only picoVLM loads them; Idefics3 does not support {reason}")
    if cfg.train.warmup >= cfg.train.steps:
        effect = "the learning rates rise until the end and never decay; lower train.warmup"
        print(
            f"train.warmup = {cfg.train.warmup} reaches train.steps = {cfg.train.steps}: {effect}"
        )
    for note in source.notes:
        print(note)


def answer_sheet_path(run: str | Path, step: int) -> Path:
    """Where the answer sheet of an evaluation is written."""
    return Path(run, f"answers-{step:06d}.png")


class Logger:
    """Writes a run's log; on processes other than the main one every method does nothing."""

    def __init__(self, cfg: RunConfig | ClassifyConfig, is_main: bool, first_step: int = 0) -> None:
        self.is_main = is_main
        self.folder = Path(cfg.train.out)
        self.wandb = None
        self.bar = tqdm(total=cfg.train.steps, initial=first_step, disable=not is_main,
                        unit="step", dynamic_ncols=True, mininterval=1.0)  # fmt: skip
        if not is_main:
            return
        self.start = time.time()
        self.failed, self.path = False, self.folder / "log.jsonl"
        is_cut = self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n")
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        if is_cut:  # the process was killed while writing
            self.file.write("\n")
        if cfg.train.wandb:
            self.wandb, self.image = _start_wandb(cfg)

    def log(self, values: dict, step: int) -> None:
        """Write the values of a step to log.jsonl and wandb; a loss also updates the bar."""
        if not self.is_main:
            return
        line: dict = {"step": step, "seconds": round(time.time() - self.start, 2)}
        for name, value in values.items():  # JSON has no NaN
            is_finite = not isinstance(value, float) or math.isfinite(value)
            line[name] = value if is_finite else None
        try:
            if not self.path.exists():  # deleted during training
                self.folder.mkdir(parents=True, exist_ok=True)
                self.file.close()
                self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        except OSError as error:
            if not self.failed:
                reason = f"cannot be written ({error.strerror})"
                self.write(f"{self.path}: {reason}; training continues.")
            self.failed = True
        if self.wandb is not None:
            scalars = {k: v for k, v in values.items() if isinstance(v, (int, float))}
            if "val_loss" in values and answer_sheet_path(self.folder, step).is_file():
                scalars["answers"] = self.image(str(answer_sheet_path(self.folder, step)))
            self.wandb.log(scalars, step=step)
        if "loss" in values:
            self.bar.set_postfix_str(
                f"loss {values['loss']:.3f}, {values['tokens_per_s']:,.0f} tokens/s, "
                f"{values['images_per_s']:,.1f} images/s, data wait {values['data_wait']:.0%}"
            )

    def log_evaluation(self, values: dict, step: int) -> None:
        """Log the values of an evaluation and print its numbers; {} logs nothing."""
        if values:
            self.log(values, step)
            numbers = [(k, v) for k, v in values.items() if isinstance(v, float)]
            text = values.get("val_problem") or ", ".join(f"{k} {v:.3f}" for k, v in numbers)
            self.write(f"step {step}: {text}")

    def write(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self.is_main:
            self.bar.write(text)

    def advance(self) -> None:
        """Move the progress bar by a step."""
        self.bar.update()

    def close(self) -> None:
        """Close all outputs and draw loss.png."""
        self.bar.close()
        if not self.is_main:
            return
        with contextlib.suppress(OSError):  # the failed write was reported before
            self.file.close()
        if self.wandb is not None:
            self.wandb.finish()
        if not self.failed:
            try:
                plot_curves(self.folder)
            except OSError as error:
                self.write(f"{self.folder / 'loss.png'}: cannot be written ({error}).")


def _start_wandb(cfg: RunConfig | ClassifyConfig) -> tuple:
    """(wandb run, wandb.Image)."""
    wandb = import_optional("wandb", "train.wandb = True:")
    mode: Any = os.environ.get("WANDB_MODE", "offline")
    try:
        run = wandb.init(project="picovlm", dir=cfg.train.out, config=to_dict(cfg), mode=mode)
    except wandb.Error as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise InputError(f"train.wandb = True, WANDB_MODE = {mode!r}: {reason}.") from None
    return run, wandb.Image


def read_log(folder: Path) -> list[dict]:
    """Events of log.jsonl by step, without non-finite values.

    If a step was logged twice, as after a resume, the last line counts.
    """
    by_step: dict[tuple, dict] = {}
    for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            event = json.loads(line)
        except ValueError:  # cut off when the process was killed
            continue
        if isinstance(event, dict) and "step" in event:
            known = {name: value for name, value in event.items() if value is not None}
            by_step[event["step"], "val_loss" in event] = known
    return [by_step[key] for key in sorted(by_step)]


def plot_curves(folder: Path) -> None:
    """Draw `loss.png` from the log; do nothing without matplotlib, which is optional."""
    events = read_log(folder)
    if not any("loss" in event for event in events):
        return
    with contextlib.suppress(InputError), plotting("loss.png") as figure_class:
        run_figure(figure_class, events).savefig(folder / "loss.png")
