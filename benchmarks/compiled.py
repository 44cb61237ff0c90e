"""A decoding step that torch.compile makes one function of, with a cache whose shapes never change.

Not a part of the product: a row of speed.py says what it gains, and when it has paid back.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from models.attention import KVCache
from models.recorded import StaticCache
from models.vision_language_model import VisionLanguageModel


def step_of(model: VisionLanguageModel, cache: KVCache) -> Callable[[Tensor, Tensor], Tensor]:
    """Tokens and positions [B] -> next logits [B, V], behind a copy of `cache`.

    Compiled when first called.
    """
    static = StaticCache(cache)
    # Each block's apart: else to write to one is, once compiled, to copy all.
    k, v = (tuple(x.clone() for x in kept) for kept in static.views)

    def step(tokens: Tensor, positions: Tensor, k: tuple, v: tuple) -> Tensor:
        static.views = [k, v]
        return model.decode(tokens, positions, static)

    made = torch.compile(step, fullgraph=True, dynamic=False)
    return lambda tokens, positions: made(tokens, positions, k, v)


@torch.inference_mode()
def warm(
    model: VisionLanguageModel, ids: Tensor, images: Tensor, n_new: int
) -> tuple[Callable[[], Tensor], Callable[[], Tensor], float]:
    """Two calls that say `n_new` greedy tokens [n_new, B] behind a prompt, and seconds.

    The first as it is, the other by a compiled step; the wall's seconds that compiling took.
    """
    lengths = torch.full((len(ids),), ids.shape[1])
    cache = KVCache(model.cfg, len(ids), ids.shape[1] + n_new, ids.device, images.dtype)
    first = model.prefill(ids, images, lengths, cache).argmax(-1)  # [B]

    def speaker(step: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Tensor]:
        @torch.inference_mode()
        def say() -> Tensor:
            tokens, positions, said = first, lengths, []
            for _ in range(n_new):
                tokens, positions = step(tokens, positions).argmax(-1), positions + 1
                said.append(tokens)
            return torch.stack(said)

        return say

    made, start = step_of(model, cache), time.perf_counter()
    made(first, lengths)
    seconds = time.perf_counter() - start
    return speaker(lambda t, p: model.decode(t, p, cache)), speaker(made), seconds
