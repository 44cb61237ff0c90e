"""The one training loop. It reads as prose; what it calls is in the other rooms of engine/.

Not here: building the model and the data (train.py), learning rates and groups (optim.py).
"""

from __future__ import annotations

import contextlib
import math
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from config_tools import InputError
from configs import LoopConfig, RunConfig
from data.batches.loader import Loader
from engine.training import checkpoint
from engine.training.distributed import Dist, precision
from engine.training.logger import Logger
from engine.training.meter import Meter, number, part_norms
from engine.training.optim import Optimizers, lr_factor


def due(step: int, every: int, last: int) -> bool:
    """Whether what is done every so many steps (0: never), and after the last, is due now."""
    return step == last or (every > 0 and step % every == 0)


@contextlib.contextmanager
def save_on_error(save: Callable[[], None]) -> Iterator[None]:
    """Save what was trained before an `InputError` within, which all processes meet, goes on."""
    try:
        yield
    except InputError:
        save()
        raise


class StopSignal:
    """Ctrl-C or SIGTERM: finish the step, save and leave; a second Ctrl-C leaves at once."""

    def __init__(self):
        self.received = False
        self.previous = {
            s: signal.signal(s, self._receive) for s in (signal.SIGINT, signal.SIGTERM)
        }

    def _receive(self, which: int, _frame) -> None:
        if self.received and which == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True

    def restore(self) -> None:
        for which, handler in self.previous.items():
            signal.signal(which, handler)


def clip(params: list[Tensor], largest: float) -> float:
    """Norm of the whole gradient before it is scaled down to `largest` (0: only measured)."""
    return number(nn.utils.clip_grad_norm_(params, largest if largest > 0 else float("inf")))


class Best:
    """The best evaluation so far: by accuracy, and by loss among equals."""

    def __init__(self, step: int = 0, score: tuple[float, float] = (-1.0, 0.0)):
        self.step, self.score = step, tuple(score)

    def beaten(self, values: dict, step: int) -> bool:
        if "val_loss" not in values:
            return False
        score = values["val_accuracy"], -values["val_loss"]
        if score <= self.score:
            return False
        self.step, self.score = step, score
        return True


def train(
    cfg: RunConfig,
    model: nn.Module,
    write: Callable[[nn.Module, Path], None],
    loader: Loader,
    optimizer: Optimizers,
    dist: Dist,
    region: torch.autocast,
    evaluate: Callable[[int], dict],
    step: int = 0,
    best: Best | None = None,
    data: str = "",
) -> int:
    """Run from `step` to the last, or until told to stop; returns the step reached.

    `write(model, folder)` saves weights, `evaluate(step)` is logged and tells the best checkpoint.
    Every target of a step weighs the same, whichever micro-batch, row or process it came from. A
    step whose loss or gradient is not finite changes nothing: it is counted and its batches are
    kept for inspection; `max_bad_steps` of them in a row raise `InputError`.
    """
    t, wrapped, stop, best = cfg.train, dist.wrap(model), StopSignal(), best or Best()
    logger = Logger(cfg, dist.is_main, step)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    batches, guard, ahead = iter(loader), Guard(t, logger, dist.rank), []
    meter = Meter(model, region)
    model.train()

    def fetch() -> list:
        with meter.waiting():
            return [next(batches).to(dist.device) for _ in range(t.accumulate)]

    def save():
        with optimizer.averaged():
            state = {"loader": dist.gather(micro[-1].state), "best": (best.step, best.score),
                     "world": dist.world, "data": data, "precision": precision(region)}  # fmt: skip
            checkpoint.save(cfg, step, model, write, optimizer, dist, state)

    try:
        while step < t.steps:
            micro = ahead or fetch()
            n_targets = dist.sum(sum(b.n_targets for b in micro))
            optimizer.set_lr(lr_factor(t, step))
            total = torch.zeros((), device=dist.device)
            for i, batch in enumerate(micro):
                with dist.sync(wrapped, last=i == len(micro) - 1), region:
                    _, loss_sum = wrapped(**batch.tensors(), reduction="sum")
                (loss_sum * dist.world / n_targets).backward()
                total += loss_sum.detach() / n_targets
            ahead = fetch() if dist.works_apart and step + 1 < t.steps else []
            norms = part_norms(model.parts) if due(step + 1, t.log_every, t.steps) else {}
            # The one wait for a GPU in a step: a step that is not finite must not be taken.
            grad_norm, loss = clip(params, t.grad_clip), dist.sum(total.item())
            if guard.passes(step, loss, grad_norm, micro):
                optimizer.step()
            optimizer.zero_grad()
            step += 1
            meter.count(micro)
            logger.advance()
            if due(step, t.log_every, t.steps):
                values = {"loss": loss, "grad_norm": grad_norm} | norms | rates(t, step - 1, model)
                values |= {"bad_rows": len(loader.skipped), "bad_steps": guard.n_kept}
                values |= meter.rates(dist)
                logger.log(values, step)
            better = False
            if due(step, t.eval_every, t.steps):  # by every process: parts of a model need all
                with save_on_error(save), optimizer.averaged():
                    values = evaluate(step)
                logger.evaluated(values, step)
                better = dist.sum(dist.is_main and best.beaten(values, step)) > 0
            stopping = dist.sum(stop.received) > 0  # so that all processes leave after one step
            if stopping or better or due(step, t.save_every, t.steps):
                save()
            if stopping:
                break
    finally:
        batches.close()  # and its workers with it
        logger.close()
        stop.restore()
    return step


def rates(cfg: LoopConfig, step: int, model: nn.Module) -> dict[str, float]:
    """The share of the peak learning rates at a step, and the rates of Muon and each part."""
    factor = lr_factor(cfg, step)
    training = [n for n, part in model.parts.items() if n not in cfg.freeze]
    names = [*training, *(["muon"] if cfg.optimizer == "muon" else [])]
    return {"lr_factor": factor} | {f"lr_{n}": getattr(cfg, f"lr_{n}") * factor for n in names}


class Guard:
    """Keeps steps that are not finite from changing anything."""

    def __init__(self, cfg: LoopConfig, logger: Logger, rank: int):
        self.cfg, self.logger, self.rank, self.n_bad = cfg, logger, rank, 0
        self.n_kept = len(kept_batches(Path(cfg.out)))  # before a resume, too

    def passes(self, step: int, loss: float, grad_norm: float, micro: list) -> bool:
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.n_bad = 0
            return True
        self.n_bad, self.n_kept = self.n_bad + 1, self.n_kept + 1
        kept = keep_batches(Path(self.cfg.out), step, micro, self.rank)
        why = f"loss {loss}, gradient norm {grad_norm}"
        self.logger.say(f"step {step}: {why}; skipped, batch kept in {kept}")
        if self.n_bad >= self.cfg.max_bad_steps:
            raise InputError(
                f"{self.n_bad} steps in a row were not finite, the last kept in {kept}; "
                "lower the learning rates, or look at the batch."
            )
        return False


def kept_batches(run: Path) -> list[Path]:
    """The batches of all bad steps of a run, as the main process saw them."""
    return sorted(p for p in run.glob("bad-step-*.pt") if "rank" not in p.name)


def keep_batches(run: Path, step: int, micro: list, rank: int = 0) -> Path:
    """Save the tensors of a bad step where `torch.load(path, weights_only=True)` finds them.

    A file per process, as each has its own.
    """
    path = run / f"bad-step-{step:06d}{f'-rank{rank}' if rank else ''}.pt"
    with contextlib.suppress(OSError, RuntimeError):  # the latter of a full disk
        torch.save([batch.tensors() for batch in micro], path)
    return path
