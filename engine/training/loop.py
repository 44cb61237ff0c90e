"""The training loop of vision-language models and of classifiers.

Not here: building model and data (train.py), parameter groups and learning rates (optim.py), what a
checkpoint holds (checkpoint.py).
"""

from __future__ import annotations

import contextlib
import math
import signal
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from config_tools import InputError
from configs import LoopConfig, RunConfig
from configs_classify import ClassifyConfig
from data.batches.loader import Loader
from data.types import Batch
from engine.training import checkpoint
from engine.training.checkpoint import Best
from engine.training.distributed import Dist, precision_name
from engine.training.logger import Logger
from engine.training.meter import Meter, gradient_norms, to_float
from engine.training.optim import Optimizers, learning_rates, lr_factor
from models.inference.compile import eager_blocks


def due(step: int, every: int, last: int) -> bool:
    """Whether to log, evaluate or save after this step.

    True for the last step, and for multiples of `every`; with `every` 0 only for the last one.
    """
    return step == last or (every > 0 and step % every == 0)


@contextlib.contextmanager
def save_on_error(save: Callable[[], None]) -> Generator[None]:
    """Save a checkpoint, then re-raise, if evaluation meets an `InputError` (a file has gone).

    Such an error occurs on every process, so the collective save does not hang.
    """
    try:
        yield
    except InputError:
        save()
        raise


class StopSignal:
    """Ctrl-C or SIGTERM: finish the step, save and stop; a second Ctrl-C stops immediately."""

    def __init__(self) -> None:
        self.received = False
        self.previous = {
            s: signal.signal(s, self._receive) for s in (signal.SIGINT, signal.SIGTERM)
        }

    def _receive(self, which: int, _frame: object) -> None:
        if self.received and which == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True

    def restore(self) -> None:
        """Restore the previous signal handlers."""
        for which, handler in self.previous.items():
            signal.signal(which, handler)


def clip_gradients(params: list[Tensor], max_norm: float) -> float:
    """Scale gradients to a total norm of at most `max_norm` (0: no limit); return the norm."""
    return to_float(nn.utils.clip_grad_norm_(params, max_norm if max_norm > 0 else float("inf")))


def accumulate_gradients(
    model: nn.Module, micro_batches: list[Batch], dist: Dist, autocast_context: torch.autocast
) -> Tensor:
    """Run forward and backward on all micro-batches; return this process's share of the loss.

    The loss is a sum over supervised tokens, divided by their number in all micro-batches of all
    processes. So every token has the same weight, whichever batch it is in. Scalar.
    """
    n_targets = dist.sum(sum(batch.n_targets for batch in micro_batches))
    loss = torch.zeros((), device=dist.device)
    for i, batch in enumerate(micro_batches):
        is_last = i == len(micro_batches) - 1
        # DDP decides in forward whether the following backward communicates.
        with dist.gradient_sync(model, is_last), autocast_context:
            _, loss_sum = model(**batch.tensors(), reduction="sum")
        # DDP and FSDP average gradients over processes; world_size turns the mean into a sum.
        (loss_sum * dist.world_size / n_targets).backward()
        loss += loss_sum.detach() / n_targets
    return loss


def train(
    cfg: RunConfig | ClassifyConfig,
    model: nn.Module,
    save_model: Callable[[Any, Path], None],
    loader: Loader,
    optimizer: Optimizers,
    dist: Dist,
    autocast_context: torch.autocast,
    evaluate: Callable[[int], dict],
    step: int = 0,
    best: Best | None = None,
    data_fingerprint: str = "",
) -> int:
    """Train from `step` to `cfg.train.steps`, or until a stop signal; return the step reached.

    `save_model(model, folder)` writes the weights. `evaluate(step)` returns values to log; the
    checkpoint with the highest `val_accuracy` is the best. If loss or gradient norm is NaN or Inf,
    the step is skipped and its batches are saved; `max_bad_steps` in a row raise `InputError`.
    """
    t, best, stop = cfg.train, best or Best(), StopSignal()
    logger = Logger(cfg, dist.is_main, step)
    guard, meter = NonFiniteGuard(t, logger, dist.rank), Meter(model, autocast_context)
    wrapped, params = dist.wrap(model), [p for g in optimizer.param_groups for p in g["params"]]
    batches: Any = iter(loader)
    prefetched: list[Batch] = []
    model.train()

    def fetch() -> list[Batch]:
        with meter.waiting_for_data():
            return [next(batches).to(dist.device) for _ in range(t.accumulate)]

    def save() -> None:
        with optimizer.averaged():  # the average of the weights over steps, if train.ema is set
            checkpoint.save(cfg, step, model, save_model, optimizer, dist, {
                "loader": dist.all_gather(micro_batches[-1].state),  # after the last trained batch
                "best": (best.step, best.score), "world": dist.world_size,
                "data": data_fingerprint, "precision": precision_name(autocast_context),
            })  # fmt: skip

    try:
        while step < t.steps:
            micro_batches = prefetched or fetch()
            optimizer.set_lr(lr_factor(t, step))
            loss_tensor = accumulate_gradients(wrapped, micro_batches, dist, autocast_context)
            # A GPU computes asynchronously: prepare the next batches before waiting for it.
            prefetched = fetch() if dist.is_async and step + 1 < t.steps else []
            is_log_step = due(step + 1, t.log_every, t.steps)
            norms = gradient_norms(model.parts) if is_log_step else {}
            # The guard needs loss and norm: the only GPU sync of a step, except on log steps.
            grad_norm = clip_gradients(params, t.grad_clip)
            loss = dist.sum(loss_tensor.item())
            if guard.check_step(step, loss, grad_norm, micro_batches):
                optimizer.step()
            optimizer.zero_grad()
            step += 1
            meter.count(micro_batches)
            logger.advance()
            if is_log_step:
                values = {"loss": loss, "grad_norm": grad_norm, **norms}
                values |= learning_rates(t, step - 1, model)
                values |= {"bad_rows": len(loader.skipped), "bad_steps": guard.n_saved}
                logger.log(values | meter.rates(dist), step)
            is_best = False
            if due(step, t.eval_every, t.steps):
                # Eager, because every new answer length would trigger a recompilation.
                with save_on_error(save), optimizer.averaged(), eager_blocks(model):
                    values = evaluate(step)
                logger.log_evaluation(values, step)
                # The main process decides; the others need to know, because all of them save.
                is_best = dist.sum(dist.is_main and best.update(values, step)) > 0
            is_stopping = dist.sum(stop.received) > 0
            if is_stopping or is_best or due(step, t.save_every, t.steps):
                save()
            if is_stopping:
                break
    finally:
        batches.close()  # ends the worker processes
        logger.close()
        stop.restore()
    return step


class NonFiniteGuard:
    """Skips steps whose loss or gradient norm is NaN or Inf, and saves their batches."""

    def __init__(self, cfg: LoopConfig, logger: Logger, rank: int) -> None:
        self.cfg, self.logger, self.rank, self.n_in_a_row = cfg, logger, rank, 0
        self.n_saved = len(find_bad_batches(Path(cfg.out)))  # includes those before a resume

    def check_step(
        self, step: int, loss: float, grad_norm: float, micro_batches: list[Batch]
    ) -> bool:
        """Return whether loss and gradient norm are finite; if not, save the batches.

        Raises `InputError` after `max_bad_steps` non-finite steps in a row.
        """
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.n_in_a_row = 0
            return True
        self.n_in_a_row, self.n_saved = self.n_in_a_row + 1, self.n_saved + 1
        path = save_bad_batches(Path(self.cfg.out), step, micro_batches, self.rank)
        reason = f"loss {loss}, gradient norm {grad_norm}"
        self.logger.write(f"step {step}: {reason}; step skipped, batch saved in {path}")
        if self.n_in_a_row >= self.cfg.max_bad_steps:
            raise InputError(
                f"loss or gradient was NaN or Inf in {self.n_in_a_row} steps in a row "
                f"(train.max_bad_steps); the last batch is saved in {path}. Lower the learning "
                "rates, or inspect the batch."
            )
        return False


def find_bad_batches(run: Path) -> list[Path]:
    """Saved batches of a run's non-finite steps, one file per step (that of rank 0)."""
    return sorted(p for p in run.glob("bad-step-*.pt") if "rank" not in p.name)


def save_bad_batches(run: Path, step: int, micro_batches: list[Batch], rank: int = 0) -> Path:
    """Save a step's batches, a file per process; `torch.load(path, weights_only=True)` reads it."""
    path = run / f"bad-step-{step:06d}{f'-rank{rank}' if rank else ''}.pt"
    with contextlib.suppress(OSError, RuntimeError):  # torch raises RuntimeError on a full disk
        torch.save([batch.tensors() for batch in micro_batches], path)
    return path
