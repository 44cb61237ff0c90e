"""Decoding on a GPU as one launch a token: a CUDA graph over a cache whose shapes never change.

A step of one row is some thousand small kernels; starting one takes longer than most of them run.
Not here: which token comes next (generation.py).

Letters: B batch, T tokens, S slots, K key-value heads, C channels of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from models.inference.kv_cache import KVCache, StaticCache


def capture(run: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """(what starts all kernels of one call of `run` again, the tensor that they fill).

    `run` takes its input from tensors that stay where they are, on `device`. It is called twice
    before it is recorded, aside, as kernels and libraries set themselves up in their first calls
    (torch's notes on CUDA graphs).
    """
    with torch.cuda.device(device):  # streams are of the current device, not of what runs in them
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Its own default would be a stream of the device that somebody recorded on first.
        with torch.cuda.graph(graph, stream=aside):
            filled = run()
    return graph.replay, filled


def cuda_graph(
    step: Callable[[Tensor, Tensor, KVCache], Tensor],
    cache: KVCache,
    tokens: Tensor,
    positions: Tensor,
) -> Callable[[Tensor, Tensor], Tensor]:
    """`step`, a model's `decode` or what a compiler made of it, over `cache`, as one launch a call.

    (tokens [B], positions [B]) -> logits [B, V]. `tokens` and `positions` are those of the first
    call: what is recorded writes them to the cache.
    """
    static, tokens, positions = StaticCache(cache), tokens.clone(), positions.clone()
    replay, logits = capture(lambda: step(tokens, positions, static), tokens.device)

    def decode(next_tokens: Tensor, next_positions: Tensor) -> Tensor:
        tokens.copy_(next_tokens)
        positions.copy_(next_positions)
        replay()
        return logits.clone()  # the next call overwrites them

    return decode
