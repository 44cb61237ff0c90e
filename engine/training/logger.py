"""What a run says, behind one `log`: progress, a JSON line per event, a loss curve, wandb."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from config_tools import InputError, to_dict
from configs import RunConfig


def answers_path(run: str | Path, step: int) -> Path:
    """The picture of sample answers that an evaluation draws."""
    return Path(run, f"answers-{step:06d}.png")


class Logger:
    """`log(values, step)` for all outlets; only the main process has them, others stay silent."""

    def __init__(self, cfg: RunConfig, is_main: bool, first_step: int = 0):
        self.is_main = is_main
        self.folder = Path(cfg.train.out)
        self.wandb = None
        self.bar = tqdm(
            total=cfg.train.steps,
            initial=first_step,
            disable=not is_main,
            unit="step",
            dynamic_ncols=True,
            mininterval=1.0,
        )
        if not is_main:
            return
        self.start = time.time()
        self.failed, self.path = False, self.folder / "log.jsonl"
        torn = self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n")
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        if torn:  # by a kill
            self.file.write("\n")
        if cfg.train.wandb:
            self.wandb, self.image = _start_wandb(cfg)

    def log(self, values: dict, step: int) -> None:
        """Write scalar `values` of a step to file (and wandb); the loss moves the bar's text."""
        if not self.is_main:
            return
        line = {"step": step, "seconds": round(time.time() - self.start, 2)}
        line |= {k: None if is_lost(v) else v for k, v in values.items()}  # JSON has no NaN
        try:
            if not self.path.exists():  # deleted under the run
                self.folder.mkdir(parents=True, exist_ok=True)
                self.file.close()
                self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        except OSError as error:
            if not self.failed:
                self.say(f"{self.path}: cannot be written ({error.strerror}); training goes on.")
            self.failed = True
        if self.wandb is not None:
            told = {k: v for k, v in values.items() if isinstance(v, (int, float))}
            if "val_loss" in values and answers_path(self.folder, step).is_file():
                told["answers"] = self.image(str(answers_path(self.folder, step)))
            self.wandb.log(told, step=step)
        if "loss" in values:
            self.bar.set_postfix_str(
                f"loss {values['loss']:.3f}, {values['tokens_per_s']:,.0f} tok/s, "
                f"{values['images_per_s']:,.1f} img/s, data wait {values['data_wait']:.0%}"
            )

    def evaluated(self, values: dict, step: int) -> None:
        """Log an evaluation, if there was anything to evaluate, and say its numbers."""
        if values:
            self.log(values, step)
            numbers = ((k[4:], v) for k, v in values.items() if isinstance(v, float))
            said = values.get("val_problem") or ", ".join(f"{k} {v:.3f}" for k, v in numbers)
            self.say(f"step {step}: {said}")

    def say(self, text: str) -> None:
        """A sentence for people, above the bar."""
        if self.is_main:
            self.bar.write(text)

    def advance(self) -> None:
        self.bar.update()

    def close(self) -> None:
        self.bar.close()
        if not self.is_main:
            return
        with contextlib.suppress(OSError):  # what could not be written has been told
            self.file.close()
        if self.wandb is not None:
            self.wandb.finish()
        if not self.failed:
            try:
                plot(self.folder)
            except OSError as error:
                self.say(f"{self.folder / 'loss.png'}: cannot be drawn ({error}).")


def is_lost(value: object) -> bool:
    """Whether it is a number that is none."""
    return isinstance(value, float) and not math.isfinite(value)


def _start_wandb(cfg: RunConfig) -> tuple:
    """(a run of wandb, its kind of pictures)."""
    try:
        import wandb
    except ImportError:
        raise InputError(
            "train.wandb = True: needs the package, so run `pip install wandb`."
        ) from None
    mode = os.environ.get("WANDB_MODE", "offline")
    try:
        run = wandb.init(project="picovlm", dir=cfg.train.out, config=to_dict(cfg), mode=mode)
    except wandb.Error as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise InputError(f"train.wandb = True, WANDB_MODE = {mode!r}: {reason}.") from None
    return run, wandb.Image


def read_log(folder: Path) -> list[dict]:
    """The events of a run, oldest first. After a resume the later line of a step counts.

    What was not finite is left out.
    """
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    by_step: dict[tuple, dict] = {}
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:  # cut off in the middle by a kill
            continue
        if isinstance(event, dict) and "step" in event:
            known = {name: value for name, value in event.items() if value is not None}
            by_step[event["step"], "val_loss" in event] = known
    return [by_step[key] for key in sorted(by_step)]


def plot(folder: Path) -> None:
    """Write `loss.png` from the log; matplotlib is optional, so without it there is no picture."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    events = read_log(folder)
    if not any("loss" in e for e in events):
        return
    figure, axes = plt.subplots(4, figsize=(7, 10), constrained_layout=True,
                                height_ratios=(2, 1, 1, 1), sharex=True)  # fmt: skip

    def draw(axis, names: Iterable[str], style: str = "-") -> None:
        for name in names:
            points = [(e["step"], e[name]) for e in events if name in e]
            if points:
                axis.plot(*zip(*points), style, lw=0.8, ms=3, label=name)

    floats = dict.fromkeys(n for e in events for n in e if isinstance(e[n], float))
    draw(axes[0], ["loss"])
    draw(axes[0], ["val_loss"], "o-")
    axes[0].set(ylabel="loss per target", yscale="log")
    accuracy, speed = axes[0].twinx(), axes[3].twinx()
    draw(accuracy, (n for n in floats if n.startswith("val_") and n != "val_loss"), "s--")
    accuracy.set(ylabel="accuracy", ylim=(0, 1))
    draw(axes[1], (n for n in floats if n.startswith("grad_norm")))
    axes[1].set(ylabel="norm of the gradient", yscale="log")
    draw(axes[2], (n for n in floats if n.startswith("lr_") and n != "lr_factor"))
    axes[2].set(ylabel="learning rate")
    draw(axes[3], ("mfu", "data_wait"))
    axes[3].set(xlabel="step", ylabel="share", ylim=(0, 1))
    draw(speed, ["tokens_per_s"], ":")
    speed.set(ylabel="tokens/s", ylim=(0, None))
    for axis, place in zip((*axes, accuracy, speed), ("upper right",) * 4 + ("lower left",) * 2):
        if axis.lines:
            axis.legend(loc=place, fontsize="x-small")
    figure.savefig(folder / "loss.png", dpi=120)
    plt.close(figure)
