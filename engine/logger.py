"""What a run says, behind one `log`: progress, a JSON line per event, a loss curve, wandb."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path

from tqdm import tqdm

from configs import InputError, RunConfig, to_dict


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
            self.wandb = _start_wandb(cfg)

    def log(self, values: dict, step: int) -> None:
        """Write scalar `values` of a step to file (and wandb); the loss moves the bar's text."""
        if not self.is_main:
            return
        line = {"step": step, "seconds": round(time.time() - self.start, 2)} | values
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
            numbers = {k: v for k, v in values.items() if isinstance(v, (int, float))}
            self.wandb.log(numbers, step=step)
        if "loss" in values:
            self.bar.set_postfix_str(
                f"loss {values['loss']:.3f}, {values['tokens_per_s']:,.0f} tok/s, "
                f"{values['images_per_s']:.0f} img/s, data wait {values['data_wait']:.0%}"
            )

    def evaluated(self, values: dict, step: int) -> None:
        """Log an evaluation, if there was anything to evaluate, and say its numbers."""
        if values:
            self.log(values, step)
            numbers = ((k[4:], v) for k, v in values.items() if isinstance(v, float))
            self.say(f"step {step}: " + ", ".join(f"{k} {v:.3f}" for k, v in numbers))

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
            plot(self.folder)


def _start_wandb(cfg: RunConfig):
    try:
        import wandb
    except ImportError:
        raise InputError(
            "train.wandb = True: needs the package, so run `pip install wandb`."
        ) from None
    mode = os.environ.get("WANDB_MODE", "offline")
    return wandb.init(project="picovlm", dir=cfg.train.out, config=to_dict(cfg), mode=mode)


def read_log(folder: Path) -> list[dict]:
    """The events of a run, oldest first. After a resume the later line of a step counts."""
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    by_step: dict[tuple, dict] = {}
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:  # cut off in the middle by a kill
            continue
        by_step[event["step"], "val_loss" in event] = event
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
    train = [(e["step"], e["loss"]) for e in events if "loss" in e]
    val = [(e["step"], e["val_loss"], e["val_accuracy"]) for e in events if "val_loss" in e]
    if not train:
        return
    figure, axis = plt.subplots(figsize=(7, 4), constrained_layout=True)
    axis.plot(*zip(*train), lw=0.8, label="training loss")
    axis.set(xlabel="step", ylabel="loss per target", yscale="log")
    if val:
        steps, losses, accuracies = zip(*val)
        axis.plot(steps, losses, "o-", label="validation loss")
        right = axis.twinx()
        right.plot(steps, accuracies, "s--", color="tab:green", label="validation accuracy")
        right.set(ylabel="accuracy", ylim=(0, 1))
        right.legend(loc="lower left")
    axis.legend(loc="upper right")
    figure.savefig(folder / "loss.png", dpi=120)
    plt.close(figure)
