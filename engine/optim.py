"""What moves the weights: parameter groups, optimizers, the learning rate.

Groups are part x decay; AdamW and Muon stand behind one object. The learning rate is a pure
function of the step, so resuming needs no scheduler state.
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor, nn

from configs import InputError, TrainConfig

# Keller Jordan's quintic: five steps bring every singular value near one.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(x: Tensor, dtype: torch.dtype, steps: int = 5) -> Tensor:
    """Bring singular values of matrices [n, rows, cols] to about one (Jordan et al. 2024, Muon)."""
    a, b, c = NEWTON_SCHULZ
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised. Matrices of one shape go through Newton-Schulz together."""

    def __init__(
        self,
        params: list[Tensor],
        lr: float,
        momentum: float,
        weight_decay: float,
        dtype: torch.dtype = torch.float32,
    ):
        """`dtype` is that of the Newton-Schulz products only."""
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for shape, params in by_shape.items():
                grads = [p.grad for p in params]
                for p in params:
                    if "momentum" not in self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                buffers = [self.state[p]["momentum"] for p in params]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                steps = torch._foreach_lerp(grads, buffers, group["momentum"])  # Nesterov
                scale = math.sqrt(max(1, shape[0] / shape[1]))
                updates = orthogonalise(torch.stack(steps), self.dtype).to(params[0].dtype)
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, list(updates.unbind()), alpha=-group["lr"] * scale)


class Optimizers:
    """AdamW and, where used, Muon, as one optimizer."""

    def __init__(self, members: list[torch.optim.Optimizer]):
        self.members = members
        for group in self.param_groups:
            group["peak_lr"] = group["lr"]

    @property
    def param_groups(self) -> list[dict]:
        return [group for member in self.members for group in member.param_groups]

    def set_lr(self, factor: float) -> None:
        for group in self.param_groups:
            group["lr"] = group["peak_lr"] * factor

    def step(self) -> None:
        for member in self.members:
            member.step()

    def zero_grad(self) -> None:
        for member in self.members:
            member.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict]:
        return [member.state_dict() for member in self.members]

    def load_state_dict(self, states: list[dict]) -> None:
        for member, state in zip(self.members, states, strict=True):
            member.load_state_dict(state)


def build_optimizer(
    parts: dict[str, nn.Module], cfg: TrainConfig, dtype: torch.dtype = torch.float32
) -> Optimizers:
    """Freeze what `cfg.freeze` names and group the rest by part and decay.

    Norms, biases, embeddings and lone vectors never decay. With Muon, the matrices inside the
    blocks of both towers go to it; patch convolution, embeddings, projector and head stay with
    AdamW.
    """
    adamw, muon, seen = [], [], set()
    for part, module in parts.items():
        module.requires_grad_(part not in cfg.freeze)
        by_decay = {True: [], False: []}
        for name, p in module.named_parameters():
            if not p.requires_grad or id(p) in seen:
                continue
            seen.add(id(p))
            if cfg.optimizer == "muon" and p.ndim == 2 and ".blocks." in f".{name}":
                muon.append(p)
            else:
                by_decay[p.ndim >= 2 and "embedding" not in name].append(p)
        lr = getattr(cfg, f"lr_{part}")
        adamw += [
            {"params": ps, "lr": lr, "weight_decay": cfg.weight_decay if decays else 0.0}
            for decays, ps in by_decay.items()
            if ps
        ]
    if not adamw and not muon:
        raise InputError(f"train.freeze = {cfg.freeze}: leaves nothing to train.")
    members: list[torch.optim.Optimizer] = []
    if adamw:
        members.append(torch.optim.AdamW(adamw, betas=(cfg.beta1, cfg.beta2), fused=True))
    if muon:
        members.append(Muon(muon, cfg.lr_muon, cfg.muon_momentum, cfg.weight_decay, dtype))
    return Optimizers(members)


def lr_factor(cfg: TrainConfig, step: int) -> float:
    """Share of the peak learning rate at a step from 0: linear warm-up, then the decay to zero."""
    if step < cfg.warmup:
        return (step + 1) / cfg.warmup
    done = min(1.0, (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup))
    return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[
        cfg.schedule
    ]
