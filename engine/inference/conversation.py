"""Several turns about some pictures: what was computed for one turn serves the next.

The keys and values of everything said so far stay in a cache. Each turn looks how much of it is
still true, which after `reset` are the pictures, and runs the model on the rest alone.
Not here: the terminal (generate.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from config_tools import InputError
from configs import VLMConfig
from data.images import normalise
from data.text import NEXT, START
from data.types import Tokens, Turn
from engine.inference.chat import Chat, Piece, question, stream_text
from models.inference.generate import Step, steps
from models.inference.kv_cache import KVCache
from models.inference.sampling import Sampling

STEP = 256  # the cache grows to a multiple of so many slots


def identities(tokens: Tokens, cfg: VLMConfig) -> np.ndarray:
    """A number per token, [T] int64: its id, or what tells its tile from every other (below 0)."""
    found = tokens.ids.astype(np.int64)
    hashes = [
        -1 - int.from_bytes(hashlib.blake2b(tile.tobytes(), digest_size=7).digest(), "big")
        for tile in tokens.tiles
    ]
    found[found == cfg.vlm_image_token_id] = np.repeat(
        np.array(hashes, dtype=np.int64), cfg.tokens_per_tile
    )
    return found


def n_common(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common beginning."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


class Conversation:
    """`for piece in conversation.ask("What is this?", ["cat.png"]): ...`, then the next question.

    An answer is the one that the whole conversation asked anew would get.
    """

    def __init__(self, chat: Chat):
        self.chat = chat
        self.turns: list[Turn] = []
        self.pictures: list[Any] = []
        self.said: list[np.ndarray] = []  # identities of each encoded part
        self.tiles: list[np.ndarray] = []
        self.cache: KVCache | None = None
        self.cached = np.zeros(0, dtype=np.int64)  # identities of the tokens in the cache

    def reset(self) -> None:
        """Forget the turns and pictures; the cache stays, in case the same pictures come again."""
        self.turns, self.pictures, self.said, self.tiles = [], [], [], []

    def ask(
        self,
        prompt: str,
        images: Sequence = (),
        sampling: Sampling = Sampling(),
        stop: Sequence[str] = (),
    ) -> Iterator[Piece]:
        """The answer piece by piece. Raises `InputError`, which leaves everything as it was.

        A caller that stops listening cuts the answer there.
        """
        processor, turn = self.chat.processor, question(prompt, images)
        opening = NEXT if self.turns else START
        tokens = processor.encode_prompt([turn], images, opening=opening)
        parts = [*self.said, identities(tokens, processor.cfg)]
        whole, limit = np.concatenate(parts), processor.cfg.lm_max_position_embeddings
        if len(whole) >= limit:
            raise InputError(
                f"the conversation has {len(whole)} tokens and the model's context ends at "
                f"{limit}; start anew."
            )
        tiles, text, said = [*self.tiles, tokens.tiles], "", False
        try:
            for piece in stream_text(processor, self._run(whole, tiles, sampling), stop):
                text, said = text + piece.text, True
                yield piece
        finally:
            if said:  # else it was cut before its first token, and was not asked
                # First, as it refuses an answer that spells a special token.
                self.said = [*parts, processor.encode_answer(text).astype(np.int64)]
                self.turns += [turn, Turn("assistant", text)]
                self.pictures += images
                self.tiles = tiles

    def _run(self, whole: np.ndarray, tiles: list, sampling: Sampling) -> Iterator[Step]:
        """Answer the prompt `whole`, of which the model sees only what the cache does not hold."""
        model, cfg = self.chat.model, self.chat.processor.cfg
        start = min(n_common(self.cached, whole), len(whole) - 1)
        n_slots = min(len(whole) + sampling.max_new_tokens, cfg.lm_max_position_embeddings)
        if self.cache is None or self.cache.n_slots < n_slots:
            dtype, old = model.decoder.norm.weight.dtype, self.cache
            self.cache = KVCache(cfg, 1, -(-n_slots // STEP) * STEP, model.device, dtype)
            if old is not None:
                self.cache.put(torch.tensor([0], device=model.device), old)
        self.cached = whole[:start]
        n_seen = int((whole[:start] < 0).sum()) // cfg.tokens_per_tile
        new_tiles = np.concatenate(tiles)[n_seen:] if (whole[start:] < 0).any() else tiles[0][:0]
        ids = np.where(whole < 0, cfg.vlm_image_token_id, whole)
        ids = torch.from_numpy(ids)[None].to(model.device)  # [1, T]
        pixels = normalise(new_tiles, cfg).to(model.device)
        unfed = whole[start:]
        for step in steps(model, ids, pixels, None, sampling, self.cache, start):
            self.cached = np.concatenate((self.cached, unfed))
            unfed = step.tokens.cpu().numpy()
            yield step
