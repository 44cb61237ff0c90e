"""Optimizers, parameter groups and the learning rate schedule.

Parameters are grouped by part, depth and weight decay. The learning rate is a function of the step,
so resuming needs no scheduler state.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor, nn

from config_tools import InputError, import_optional
from configs import LoopConfig, TrainConfig
from configs_classify import ClassifyTrainConfig

# Coefficients of the quintic of Jordan et al. 2024: five steps bring singular values near 1.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def newton_schulz(x: Tensor, dtype: torch.dtype, steps: int = 5) -> Tensor:
    """Orthogonalize matrices [n, rows, cols]: singular values near 1 (Muon, Jordan et al. 2024)."""
    a, b, c = NEWTON_SCHULZ
    is_wide = x.shape[-2] <= x.shape[-1]
    x = x if is_wide else x.mT
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(steps):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return x if is_wide else x.mT


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): orthogonalized momentum, with matrices of one shape batched."""

    def __init__(
        self, params: list, lr: float, momentum: float, weight_decay: float, dtype=torch.float32
    ):
        """`dtype` is used in the Newton-Schulz products only."""
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["momentum"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for shape, params in by_shape.items():
                grads = [p.grad for p in params]
                buffers = [self.state[p]["momentum"] for p in params]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                steps = torch._foreach_lerp(grads, buffers, group["momentum"])  # Nesterov
                scale = math.sqrt(max(1, shape[0] / shape[1]))
                updates = newton_schulz(torch.stack(steps), self.dtype).to(params[0].dtype)
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, list(updates.unbind()), alpha=-group["lr"] * scale)


class Optimizers:
    """AdamW and, if used, Muon behind one interface; with `ema`, also averaged weights.

    `ema` is the decay of the average; in the first steps it is smaller, n / (n + 9) after n steps.
    """

    def __init__(self, members: list[torch.optim.Optimizer], ema: float = 0.0):
        self.members, self.ema, self.n_steps = members, ema, 0
        for group in self.param_groups:
            group["peak_lr"] = float(group["lr"])
        self.params = [p for group in self.param_groups for p in group["params"]] if ema else []
        self.averages = [p.detach().clone() for p in self.params]

    @property
    def param_groups(self) -> list[dict]:
        return [group for member in self.members for group in member.param_groups]

    def set_lr(self, factor: float) -> None:
        """Set every group's learning rate to `factor` times its peak."""
        for group in self.param_groups:
            lr = group["peak_lr"] * factor
            # torchao keeps the learning rate as a tensor, which its compiled step reads.
            group["lr"] = torch.full_like(group["lr"], lr) if torch.is_tensor(group["lr"]) else lr

    def step(self) -> None:
        for member in self.members:
            member.step()
        if self.ema:
            self.n_steps += 1
            decay = min(self.ema, self.n_steps / (self.n_steps + 9))
            torch._foreach_lerp_(self.averages, [p.data for p in self.params], 1 - decay)

    @contextlib.contextmanager
    def averaged(self) -> Generator[None]:
        """Inside, the model has the averaged weights, and `averages` the trained ones (swapped)."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for i, p in enumerate(self.params):
            p.data, self.averages[i] = self.averages[i], p.data

    def zero_grad(self) -> None:
        for member in self.members:
            member.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict]:
        """State of all optimizers; call it inside `averaged()`, where the weights are saved too."""
        own = [{"weights": self.averages, "n_steps": self.n_steps}] if self.ema else []
        return [member.state_dict() for member in self.members] + own

    def load_state_dict(self, states: list[dict]) -> None:
        """Restore `states`; the model must already hold the weights saved with it."""
        if self.ema:
            *states, own = states
            self.n_steps = own["n_steps"]
            self.averages = [w.to(p) for w, p in zip(own["weights"], self.params, strict=True)]
            self._swap()
        for member, state in zip(self.members, states, strict=True):
            member.load_state_dict(state)


def adamw_8bit(groups: list[dict], betas: tuple[float, float]) -> torch.optim.Optimizer:
    """torchao's AdamW: both moments in 8 bits with a scale per 256 values (Dettmers et al. 2021).

    Tensors of fewer than 4,096 values, or not a multiple of 256, keep 32 bits. The step is compiled
    on a GPU and eager on a CPU, which then needs no compiler. Raises `InputError` without torchao.
    """
    torchao = import_optional("torchao.optim", "train.optimizer = 'adamw8bit':")
    from torchao.optim.subclass_8bit import OptimState8bit

    class PortableAdamW8bit(torchao.AdamW8bit):
        def step(self, closure=None):
            on_cpu = self.param_groups[0]["params"][0].device.type == "cpu"
            with torch.compiler.set_stance("force_eager" if on_cpu else "default"):
                return super().step(closure)

        def state_dict(self) -> dict:
            """The state as plain tensors, so that checkpoints open without torchao."""
            state = super().state_dict()
            return state | {"state": map_state(state, to_plain)}

        def load_state_dict(self, state: dict) -> None:
            super().load_state_dict(state | {"state": map_state(state, to_8_bits)})

    def map_state(state: dict, change: Callable) -> dict:
        return {i: {k: change(x) for k, x in xs.items()} for i, xs in state["state"].items()}

    def to_plain(x: Any) -> Any:
        if not isinstance(x, OptimState8bit):
            return x
        names, context = x.__tensor_flatten__()
        return {"tensors": {name: getattr(x, name) for name in names}, "context": context}

    def to_8_bits(x: Any) -> Tensor:
        is_plain = torch.is_tensor(x)
        return x if is_plain else OptimState8bit.__tensor_unflatten__(x["tensors"], x["context"])

    return PortableAdamW8bit(groups, betas=betas)


def fused_adamw(groups: list[dict], betas: tuple[float, float]) -> torch.optim.Optimizer:
    """torch's fused AdamW with its moments allocated now, not at the first step.

    Allocated after the first backward pass, they would fragment the memory that activations freed.
    On a CPU this saves 120 of 4,570 MiB with the preset 222m.
    """
    optimizer = torch.optim.AdamW(groups, betas=betas, fused=True)
    for group in optimizer.param_groups:
        for p in group["params"]:
            step = torch.zeros((), dtype=torch.float32, device=p.device)
            moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[p] = {"step": step, **moments}
    return optimizer


def build_optimizer(
    parts: dict[str, nn.Module], cfg: TrainConfig | ClassifyTrainConfig, dtype=torch.float32
) -> Optimizers:
    """Freeze the parts in `cfg.freeze` and build optimizers for the rest.

    Weight decay applies to matrices, never to norms, biases or embeddings. Muon trains the matrices
    inside transformer blocks, AdamW the rest: patch convolution, embeddings, projector, head.
    `cfg.layer_decay` lowers the learning rates towards the input. `dtype` is Muon's compute dtype.
    Raises `InputError` if nothing is left to train.
    """
    adamw, muon, seen = [], defaultdict(list), set()
    for part, module in parts.items():
        has_adapters = any("lora_" in name for name, _ in module.named_parameters())
        for name, p in module.named_parameters():  # with LoRA, only adapters train
            p.requires_grad_(part not in cfg.freeze and ("lora_" in name) == has_adapters)
        groups = defaultdict(list)  # keeps the order of first parameters
        for name, p in module.named_parameters():
            if not p.requires_grad or id(p) in seen:
                continue
            seen.add(id(p))
            share = cfg.layer_decay ** n_layers_above(name, module)
            is_block = ".blocks." in f".{name}" and "lora_" not in name
            if cfg.optimizer == "muon" and p.ndim == 2 and is_block:
                muon[share].append(p)
            else:
                groups[share, p.ndim >= 2 and "embedding" not in name].append(p)
        lr = getattr(cfg, f"lr_{part}")
        adamw += [
            {"params": ps, "lr": lr * share, "weight_decay": cfg.weight_decay if decays else 0.0}
            for (share, decays), ps in sorted(groups.items(), key=lambda g: (-g[0][0], -g[0][1]))
        ]
    if not adamw and not muon:
        fix = "leaves nothing to train; freeze fewer parts"
        raise InputError(f"train.freeze = {cfg.freeze}: {fix}.")
    members: list[torch.optim.Optimizer] = []
    if adamw:
        adamw_optimizer = adamw_8bit if cfg.optimizer == "adamw8bit" else fused_adamw
        members.append(adamw_optimizer(adamw, (cfg.beta1, cfg.beta2)))
    if muon:
        groups = [{"params": ps, "lr": cfg.lr_muon * share} for share, ps in muon.items()]
        decay = cfg.weight_decay
        members.append(Muon(groups, cfg.lr_muon, momentum=0.95, weight_decay=decay, dtype=dtype))
    return Optimizers(members, cfg.ema)


def n_layers_above(name: str, part: Any) -> int:
    """Number of layers between a parameter and the output of its part; 0 for norm and head."""
    n_blocks, path = len(getattr(part, "blocks", ())), name.split(".")
    if path[0] == "blocks":
        return n_blocks - int(path[1])
    return n_blocks + 1 if "embedding" in path[0] or path[0] == "pre_norm" else 0


def lr_factor(cfg: LoopConfig, step: int) -> float:
    """Fraction of the peak learning rate at a step (from 0): linear warmup, then decay to zero."""
    if step < cfg.warmup:
        return (step + 1) / cfg.warmup
    progress = min(1.0, (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return {"constant": 1.0, "linear": 1 - progress, "cosine": cosine}[cfg.schedule]


def learning_rates(cfg: Any, step: int, model: Any) -> dict[str, float]:
    """The schedule's factor and the learning rate of Muon and of every part that trains."""
    factor = lr_factor(cfg, step)
    names = [name for name in model.parts if name not in cfg.freeze]
    names += ["muon"] * (cfg.optimizer == "muon")
    return {"lr_factor": factor} | {f"lr_{n}": getattr(cfg, f"lr_{n}") * factor for n in names}
