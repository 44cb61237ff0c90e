"""Log-likelihoods of given continuations of a prompt, for multiple choice.

Letters: T tokens, V vocabulary, C continuations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.inference.generate import Prompt, max_answer_tokens
from models.inference.kv_cache import KVCache


@torch.inference_mode()
def score_continuations(
    model, prompt: Prompt, continuations: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Log-probabilities of every token of every continuation of a prompt.

    The prompt runs once; all continuations run together on copies of its cache.
    """
    cfg, device = model.cfg, model.device
    n_tokens, longest = len(prompt.ids), max(map(len, continuations))
    max_answer_tokens(cfg, n_tokens + longest - 1, 1)
    cache = KVCache(cfg, 1, n_tokens + longest, device, model.decoder.norm.weight.dtype)
    lengths = torch.tensor([n_tokens], device=device)
    ids, images = prompt.ids[None].to(device), prompt.images.to(device)
    first = model.prefill(ids, images, lengths, cache)  # [1, V]
    rows = torch.full((len(continuations), longest), cfg.vlm_pad_token_id, device=device)  # [C, T]
    for c, continuation in enumerate(continuations):
        rows[c, : len(continuation)] = torch.tensor(continuation, device=device)
    logits = first[:, None].expand(len(rows), -1, -1)  # [C, 1, V]
    if longest > 1:
        cache.keep_rows(torch.zeros(len(rows), dtype=torch.long, device=device))
        positions = (n_tokens + torch.arange(longest - 1, device=device)).expand(len(rows), -1)
        x = model.decoder.token_embedding(rows[:, :-1])  # [C, T - 1, D]
        later = model.decoder.logits(model.decoder(x, positions, cache=cache))  # [C, T - 1, V]
        logits = torch.cat((logits, later), dim=1)  # [C, T, V]
    log_p = logits.float().log_softmax(-1).gather(2, rows[..., None])[..., 0]  # [C, T]
    return [row[: len(c)] for row, c in zip(log_p.cpu(), continuations, strict=True)]
