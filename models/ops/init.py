"""Initial weights, and models without storage."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

RESIDUAL_OUTPUTS = ("out_proj.weight", "o_proj.weight", "fc2.weight", "down_proj.weight")


def init_weights(module: nn.Module, n_residual: int) -> None:
    """Initialise every parameter, by the end of its name.

    - Matrices: N(0, 1/fan_in); those that write to the residual stream, of which there are
      `n_residual`, are divided by sqrt(n_residual) (Radford et al. 2019).
    - Token embeddings: N(0, 1/width). Tied logits then start near N(0, 1), and a token's embedding
      is as large as what attention adds to it.
    - Positions: N(0, 0.3), about as large as the patches they are added to. With a smaller value
      the model learns where things are long after what they are.
    - CLS, registers and the pooling query: N(0, 0.02). Norms and layer scales: 1. Biases: 0.
    """
    for name, param in module.named_parameters():
        if "norm" in name or ".ln" in name:
            nn.init.constant_(param, 1.0 if name.endswith("weight") else 0.0)
        elif name.endswith("bias"):
            nn.init.zeros_(param)
        elif name.endswith(".scale"):
            nn.init.ones_(param)
        elif not name.endswith("weight"):
            nn.init.normal_(param, std=0.3 if "position" in name else 0.02)
        else:
            std = math.prod(param.shape[1:]) ** -0.5  # [out, in], [V, D] or [D, 3, size, size]
            std = std / math.sqrt(n_residual) if name.endswith(RESIDUAL_OUTPUTS) else std
            nn.init.normal_(param, std=std)


class _SkipNormal(TorchFunctionMode):
    """`nn.init.normal_` leaves its tensor as it is."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return kwargs["tensor"] if func is nn.init.normal_ else func(*args, **kwargs)


@contextlib.contextmanager
def on_meta_device() -> Generator[None]:
    """Models built inside have names and shapes, and no storage.

    Random initialisation is skipped: on the meta device it makes torch import its compiler, which
    takes a second.
    """
    with torch.device("meta"), _SkipNormal():
        yield
