"""What moves the weights: parameter groups, optimizers, the learning rate.

Groups are part x depth x decay; AdamW and Muon stand behind one object. The learning rate is a pure
function of the step, so resuming needs no scheduler state.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from config_tools import InputError
from configs import LoopConfig

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
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised. Matrices of one shape go through Newton-Schulz together."""

    def __init__(
        self,
        params: list[Tensor] | list[dict],
        lr: float,
        momentum: float,
        weight_decay: float,
        dtype: torch.dtype = torch.float32,
    ):
        """`dtype` is that of the Newton-Schulz products only."""
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
                updates = orthogonalise(torch.stack(steps), self.dtype).to(params[0].dtype)
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, list(updates.unbind()), alpha=-group["lr"] * scale)


class Optimizers:
    """AdamW and, where used, Muon, as one optimizer; with `ema`, averages of the weights beside.

    The average follows each step by 1 - ema, faster at first, when it has seen few.
    """

    def __init__(self, members: list[torch.optim.Optimizer], ema: float = 0.0):
        self.members, self.ema, self.n_steps = members, ema, 0
        for group in self.param_groups:
            group["peak_lr"] = float(group["lr"])
        self.params = [p for group in self.param_groups for p in group["params"]] if ema else []
        self.others = [p.detach().clone() for p in self.params]

    @property
    def param_groups(self) -> list[dict]:
        return [group for member in self.members for group in member.param_groups]

    def set_lr(self, factor: float) -> None:
        for group in self.param_groups:
            lr = group["peak_lr"] * factor
            # A tensor of torchao's stays one: it is what the compiled step reads.
            group["lr"] = torch.full_like(group["lr"], lr) if torch.is_tensor(group["lr"]) else lr

    def step(self) -> None:
        for member in self.members:
            member.step()
        if self.ema:
            self.n_steps += 1
            decay = min(self.ema, self.n_steps / (self.n_steps + 9))
            torch._foreach_lerp_(self.others, [p.data for p in self.params], 1 - decay)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the model has the averaged weights, and `state_dict` keeps the last ones."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for i, p in enumerate(self.params):
            p.data, self.others[i] = self.others[i], p.data

    def zero_grad(self) -> None:
        for member in self.members:
            member.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict]:
        """To be taken while `averaged`, as the weights that are saved with it are."""
        own = [{"weights": self.others, "n_steps": self.n_steps}] if self.ema else []
        return [member.state_dict() for member in self.members] + own

    def load_state_dict(self, states: list[dict]) -> None:
        """Go on from `states` with the model that was saved with it."""
        if self.ema:
            *states, own = states
            self.n_steps = own["n_steps"]
            self.others = [w.to(p) for w, p in zip(own["weights"], self.params, strict=True)]
            self._swap()
        for member, state in zip(self.members, states, strict=True):
            member.load_state_dict(state)


def adamw_in_8_bits(groups: list[dict], betas: tuple[float, float]) -> torch.optim.Optimizer:
    """torchao's AdamW: both moments in 8 bits with a scale for every 256 values (Dettmers 2021).

    Tensors of fewer than 4,096 values, or of no multiple of 256, stay in 32. On a GPU its step is
    compiled, as torchao means it; a CPU takes it operation by operation, without a C++ compiler.
    Raises `InputError` without the package.
    """
    try:
        from torchao.optim import AdamW8bit
        from torchao.optim.subclass_8bit import OptimState8bit
    except ImportError:
        raise InputError(
            "train.optimizer = 'adamw8bit': needs torchao; run `pip install torchao`."
        ) from None

    class InEightBits(AdamW8bit):
        def step(self, closure=None):
            on_cpu = self.param_groups[0]["params"][0].device.type == "cpu"
            with torch.compiler.set_stance("force_eager" if on_cpu else "default"):
                return super().step(closure)

        def state_dict(self) -> dict:
            """In plain tensors, which a checkpoint can be opened with where torchao is not."""
            state = super().state_dict()
            return state | {"state": each_value(state, plain)}

        def load_state_dict(self, state: dict) -> None:
            super().load_state_dict(state | {"state": each_value(state, in_8_bits)})

    def each_value(state: dict, change: Callable) -> dict:
        return {i: {k: change(x) for k, x in its.items()} for i, its in state["state"].items()}

    def plain(x: Tensor) -> object:
        if not isinstance(x, OptimState8bit):
            return x
        names, context = x.__tensor_flatten__()
        return {"tensors": {name: getattr(x, name) for name in names}, "context": context}

    def in_8_bits(x: object) -> Tensor:
        if torch.is_tensor(x):
            return x
        return OptimState8bit.__tensor_unflatten__(x["tensors"], x["context"])

    return InEightBits(groups, betas=betas)


def fused_adamw(groups: list[dict], betas: tuple[float, float]) -> torch.optim.Optimizer:
    """torch's AdamW in one pass, with its moments there from the start.

    Made after the first backward pass they would fill the holes that its activations left, for
    good, and the second would find no room: 120 MiB more of 222m's 4,570 on a CPU.
    """
    made = torch.optim.AdamW(groups, betas=betas, fused=True)
    for group in made.param_groups:
        for p in group["params"]:
            step = torch.zeros((), dtype=torch.float32, device=p.device)
            moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
            made.state[p] = {"step": step, **moments}
    return made


ADAMW = {"adamw": fused_adamw, "muon": fused_adamw, "adamw8bit": adamw_in_8_bits}


def build_optimizer(
    parts: dict[str, nn.Module], cfg: LoopConfig, dtype: torch.dtype = torch.float32
) -> Optimizers:
    """Freeze what `cfg.freeze` names and group the rest by part, depth and decay.

    Norms, biases, embeddings and lone vectors never decay. With Muon, the matrices inside the
    blocks of both towers go to it; patch convolution, embeddings, projector and head stay with
    AdamW. `cfg.layer_decay` lowers the rates of both towards the input.
    """
    adamw, muon, seen = [], defaultdict(list), set()
    for part, module in parts.items():
        adapted = any("lora_" in name for name, _ in module.named_parameters())
        for name, p in module.named_parameters():  # of a part with adapters only those train
            p.requires_grad_(part not in cfg.freeze and ("lora_" in name) == adapted)
        groups = defaultdict(list)  # in the order of the first parameter of each
        for name, p in module.named_parameters():
            if not p.requires_grad or id(p) in seen:
                continue
            seen.add(id(p))
            share = cfg.layer_decay ** layers_above(name, module)
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
        raise InputError(f"train.freeze = {cfg.freeze}: leaves nothing to train.")
    members: list[torch.optim.Optimizer] = []
    if adamw:
        members.append(ADAMW[cfg.optimizer](adamw, betas=(cfg.beta1, cfg.beta2)))
    if muon:
        groups = [{"params": ps, "lr": cfg.lr_muon * share} for share, ps in muon.items()]
        members.append(Muon(groups, cfg.lr_muon, cfg.muon_momentum, cfg.weight_decay, dtype))
    return Optimizers(members, cfg.ema)


def layers_above(name: str, part: nn.Module) -> int:
    """How many blocks of a part, and its end, stand above a parameter; 0 for the end itself."""
    blocks = dict(part.named_children()).get("blocks", ())
    path = name.split(".")
    if path[0] == "blocks":
        return len(blocks) - int(path[1])
    return len(blocks) + 1 if "embedding" in path[0] or path[0] == "pre_norm" else 0


def lr_factor(cfg: LoopConfig, step: int) -> float:
    """Share of the peak learning rate at a step from 0: linear warm-up, then the decay to zero."""
    if step < cfg.warmup:
        return (step + 1) / cfg.warmup
    done = min(1.0, (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup))
    return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[
        cfg.schedule
    ]
