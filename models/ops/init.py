"""Weight initialisation, and models on the meta device."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

RESIDUAL_OUTPUTS = ("out_proj.weight", "o_proj.weight", "fc2.weight", "down_proj.weight")


def init_weights(module: nn.Module, n_residual: int) -> None:
    """Initialise every parameter according to its name.

    - Matrices: normal, standard deviation 1 / sqrt(fan_in). The `n_residual` matrices that write
      to the residual stream are divided by sqrt(n_residual) (Radford et al. 2019).
    - Token embeddings: normal, 1 / sqrt(width). Logits of a tied head then start near N(0, 1), and
      embeddings have the scale of what attention adds to them.
    - Position embeddings: normal, 0.3, about the scale of the patch embeddings. With a smaller
      value the model learns positions much later than contents.
    - CLS, registers and the pooling query: normal, 0.02. Norms and layer scales: 1. Biases: 0.
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
    """Turns `nn.init.normal_` into a no-op."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return kwargs["tensor"] if func is nn.init.normal_ else func(*args, **kwargs)


@contextlib.contextmanager
def on_meta_device() -> Generator[None]:
    """Models built inside have names and shapes but no storage.

    Random initialisation is skipped: on the meta device it imports torch's compiler, which takes a
    second.
    """
    with torch.device("meta"), _SkipNormal():
        yield
