"""What torch.compile makes of a model: few kernels of each block while it trains.

Not here: whether that pays (engine/distributed.py), and the blocks, which do not know of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models import attention


def compile_blocks(model: nn.Module, backend: str = "inductor") -> None:
    """Compile the blocks of all parts, in place: no name changes.

    A block rather than the model, as they are alike: one is compiled for all, and other processes
    get gradients as soon as a block has them. Behind the hooks that a block has or gets: FSDP
    gathers its weights first. In evaluation it runs as it is, as lengths change with every token.
    """
    from torch._dynamo import config

    config.optimize_ddp = False  # it would cut a block at DDP's buckets, and refuses our gradients
    config.recompile_limit = 64  # of 8, drop-path alone takes one for every block
    # How many segments of which length there are differs in every batch.
    attention._attend_segments = torch.compiler.disable(attention._attend_segments)
    for part in list(model.modules()):
        for block in getattr(part, "blocks", ()):
            block.forward = _while_training(block, torch.compile(block.forward, backend=backend))


def _while_training(block: nn.Module, compiled: Callable[..., Tensor]) -> Callable[..., Tensor]:
    plain = block.forward
    return lambda *args, **named: (compiled if block.training else plain)(*args, **named)
