"""Initial weights, and models without storage."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


def parameter_table(parts: dict[str, nn.Module], what: dict[str, str]) -> str:
    """A line for each part that has parameters, and their sum."""
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    rows = [(name, n, what.get(name, "")) for name, n in counts.items() if n]
    rows.append(("all", sum(counts.values()), ""))
    width = max(len(name) for name, *_ in rows)
    return "\n".join(f"{name:<{width}}  {n:>13,}  {words}".rstrip() for name, n, words in rows)


def init_weights(module: nn.Module, n_residual: int) -> None:
    """Fill every parameter with its first values.

    Matrices N(0, 1/fan_in), those that write to the residual stream smaller by sqrt(n_residual)
    (Radford et al. 2019), token embeddings N(0, 1/width), which keeps tied logits near N(0, 1) and
    words from drowning in what attention adds; positions N(0, 0.3), about as large as the patches
    they are added to, or "where" is learned long after "what"; CLS, registers and probe
    N(0, 0.02); norms and layer scales one, biases zero.
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
            std = math.prod(param.shape[1:]) ** -0.5  # of an embedding, too: [V, D]
            writes = name.endswith(
                ("out_proj.weight", "o_proj.weight", "fc2.weight", "down_proj.weight")
            )
            nn.init.normal_(param, std=std / math.sqrt(n_residual) if writes else std)


class _NothingDrawn(TorchFunctionMode):
    """`nn.init.normal_` leaves a tensor as it is."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return kwargs["tensor"] if func is nn.init.normal_ else func(*args, **kwargs)


@contextlib.contextmanager
def on_meta_device() -> Iterator[None]:
    """Models made within have names and shapes and no storage.

    As on the meta device, on which a draw of no numbers makes torch import its compiler: a second
    at every start.
    """
    with torch.device("meta"), _NothingDrawn():
        yield
