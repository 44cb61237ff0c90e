"""Decoding on a GPU as one launch per token: a CUDA graph over a cache whose shapes never change.

A step of one row is about a thousand small kernels; launching one takes longer than most of them
run. Not here: which token comes next (sampling.py).

Letters: B batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from models.inference.kv_cache import KVCache, StaticCache


def capture(run: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """Record one call of `run`: (a function that replays its kernels, the tensor they fill).

    `run` reads its input from tensors that stay in place on `device`. Two calls on a side stream
    come first, because kernels and libraries initialise themselves then (torch's CUDA graph notes).
    """
    with torch.cuda.device(device):  # streams belong to the current device
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # The default stream would belong to the device of the first capture in this process.
        with torch.cuda.graph(graph, stream=side):
            output = run()
    return graph.replay, output


def cuda_graph(
    step: Callable[[Tensor, Tensor, KVCache], Tensor],
    cache: KVCache,
    tokens: Tensor,
    positions: Tensor,
) -> Callable[[Tensor, Tensor], Tensor]:
    """`step` (a model's `decode`, compiled or not) over `cache`, as one launch a call.

    Returns (tokens [B], positions [B]) -> logits [B, V]. The given `tokens` and `positions` must be
    those of the first call, because recording writes them to the cache.
    """
    static, tokens, positions = StaticCache(cache), tokens.clone(), positions.clone()
    replay, logits = capture(lambda: step(tokens, positions, static), tokens.device)

    def decode(next_tokens: Tensor, next_positions: Tensor) -> Tensor:
        tokens.copy_(next_tokens)
        positions.copy_(next_positions)
        replay()
        return logits.clone()  # the next call overwrites them

    return decode
