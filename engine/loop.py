"""The one training loop. It reads as prose; what it calls is in the other rooms of engine/.

Not here: building the model and the data (train.py), learning rates and groups (optim.py).
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from configs import InputError, RunConfig
from data.loader import Loader
from engine import checkpoint
from engine.distributed import Dist
from engine.logger import Logger
from engine.optim import Optimizers, lr_factor


def due(step: int, every: int, last: int) -> bool:
    """Whether what is done every so many steps (0: never), and after the last, is due now."""
    return step == last or (every > 0 and step % every == 0)


class StopSignal:
    """Ctrl-C or SIGTERM: finish the step, save and leave; a second Ctrl-C leaves at once."""

    def __init__(self):
        self.received = False
        self.previous = {
            s: signal.signal(s, self._receive) for s in (signal.SIGINT, signal.SIGTERM)
        }

    def _receive(self, number: int, _frame) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True

    def restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def clip(params: list[Tensor], largest: float) -> float:
    """Norm of the whole gradient before it is scaled down to `largest` (0: only measured)."""
    return nn.utils.clip_grad_norm_(params, largest if largest > 0 else float("inf")).item()


def train(
    cfg: RunConfig,
    model: nn.Module,
    processor,
    loader: Loader,
    optimizer: Optimizers,
    dist: Dist,
    region: torch.autocast,
    evaluate: Callable[[], dict],
    step: int = 0,
) -> int:
    """Run from `step` to the last, or until told to stop; returns the step reached.

    Every target of a step weighs the same, whichever micro-batch, row or process it came from. A
    step whose loss or gradient is not finite changes nothing: it is counted and its batches are
    kept for inspection; `max_bad_steps` of them in a row raise `InputError`.
    """
    t, wrapped, stop = cfg.train, dist.wrap(model), StopSignal()
    logger = Logger(cfg, dist.is_main, step)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    batches, n_bad, meter = iter(loader), 0, Meter()
    model.train()

    def save():
        if dist.is_main:
            with optimizer.averaged():
                state = {"optimizer": optimizer.state_dict(), "loader": micro[-1].state}
                checkpoint.save(cfg, step, model, processor, state)

    try:
        while step < t.steps:
            meter.waiting()
            micro = [next(batches).to(dist.device) for _ in range(t.accumulate)]
            meter.working()
            n_targets = dist.sum(sum(b.n_targets for b in micro))
            optimizer.set_lr(lr_factor(t, step))
            total = torch.zeros((), device=dist.device)
            for i, batch in enumerate(micro):
                with dist.sync(wrapped, last=i == len(micro) - 1), region:
                    _, loss_sum = wrapped(**batch.tensors(), reduction="sum")
                (loss_sum * dist.world / n_targets).backward()
                total += loss_sum.detach() / n_targets
            grad_norm, loss = clip(params, t.grad_clip), dist.sum(total.item())
            if math.isfinite(loss) and math.isfinite(grad_norm):
                optimizer.step()
                n_bad = 0
            else:
                n_bad += 1
                kept = keep_batches(Path(t.out), step, micro)
                why = f"loss {loss}, gradient norm {grad_norm}"
                logger.say(f"step {step}: {why}; skipped, batch kept in {kept}")
                if n_bad >= t.max_bad_steps:
                    raise InputError(
                        f"{n_bad} steps in a row were not finite, the last kept in {kept}; "
                        "lower the learning rates, or look at the batch."
                    )
            optimizer.zero_grad()
            step += 1
            meter.count(micro)
            logger.advance()
            if due(step, t.log_every, t.steps):
                values = {"loss": loss, "grad_norm": grad_norm, "lr_factor": lr_factor(t, step - 1)}
                values |= {"bad_rows": len(loader.skipped)} | meter.rates(dist)
                logger.log(values, step)
            if due(step, t.eval_every, t.steps) and dist.is_main:
                with optimizer.averaged():
                    values = evaluate()
                if values:
                    logger.log(values, step)
                    numbers = ((k[4:], v) for k, v in values.items() if isinstance(v, float))
                    logger.say(f"step {step}: " + ", ".join(f"{k} {v:.3f}" for k, v in numbers))
            stopping = dist.sum(stop.received) > 0  # so that all processes leave after one step
            if stopping or due(step, t.save_every, t.steps):
                save()
            if stopping:
                break
    finally:
        logger.close()
        stop.restore()
    return step


def keep_batches(run: Path, step: int, micro: list) -> Path:
    """Save the tensors of a bad step where `torch.load(path, weights_only=True)` finds them."""
    path = run / f"bad-step-{step:06d}.pt"
    torch.save([batch.tensors() for batch in micro], path)
    return path


class Meter:
    """Tokens and images per second, and the share of time waiting for data, since last asked."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self.start = self.mark = time.perf_counter()
        self.waited = self.tokens = self.images = 0.0

    def waiting(self) -> None:
        self.mark = time.perf_counter()

    def working(self) -> None:
        self.waited += time.perf_counter() - self.mark

    def count(self, micro: list) -> None:
        self.tokens += sum(b.n_tokens for b in micro)
        self.images += sum(len(b.images) for b in micro)

    def rates(self, dist: Dist) -> dict[str, float]:
        seconds = time.perf_counter() - self.start
        rates = {
            "tokens_per_s": round(dist.sum(self.tokens) / seconds, 1),
            "images_per_s": round(dist.sum(self.images) / seconds, 1),
            "data_wait": round(self.waited / seconds, 4),
        }
        self.reset()
        return rates
