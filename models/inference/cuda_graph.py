"""CUDA graphs for decoding: one launch per token, over a cache with static shapes.

A step of one row is about a thousand small kernels, and most take longer to launch than to run.
Not here: choosing the next token (sampling.py).

Letters: B batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from models.inference.kv_cache import KVCache, StaticCache


def capture(run: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """Capture one call of `run`: (a function that replays its kernels, the tensor they fill).

    `run` reads its input from tensors that stay in place on `device`. Two warm-up calls on a side
    stream come first, as PyTorch's CUDA graph notes recommend.
    """
    with torch.cuda.device(device):  # streams belong to the current device
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # torch's default capture stream belongs to the device of the process's first capture.
        with torch.cuda.graph(graph, stream=side):
            output = run()
    return graph.replay, output


def cuda_graph(
    step: Callable[[Tensor, Tensor, KVCache], Tensor],
    cache: KVCache,
    tokens: Tensor,
    positions: Tensor,
) -> Callable[[Tensor, Tensor], Tensor]:
    """`step` (a model's `decode`, compiled or not) over `cache`, as one launch per call.

    Returns (tokens [B], positions [B]) -> logits [B, V]. The given `tokens` and `positions` must be
    those of the first call, because capturing writes them to the cache.
    """
    static, tokens, positions = StaticCache(cache), tokens.clone(), positions.clone()
    replay, logits = capture(lambda: step(tokens, positions, static), tokens.device)

    def decode(next_tokens: Tensor, next_positions: Tensor) -> Tensor:
        tokens.copy_(next_tokens)
        positions.copy_(next_positions)
        replay()
        return logits.clone()  # the next call overwrites them

    return decode
