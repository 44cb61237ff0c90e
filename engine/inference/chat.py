"""Pictures and strings in, text out: model and processor together, in one call.

Not here: how a token is chosen (models/inference/generate.py), several turns (conversation.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from config_tools import InputError
from data import processor as processors
from data.batches.packing import collate_prompts
from data.images import normalise
from data.processor import Processor
from data.text import load_tokenizer
from data.types import Tokens, Turn
from engine.training.checkpoint import resolve
from models.inference.continuous_batching import generate_continuous
from models.inference.generate import Prompt, Step, steps
from models.inference.likelihood import score_continuations
from models.inference.sampling import Sampling
from models.vision_language_model import VisionLanguageModel


def open_checkpoint(source: str | Path) -> tuple[VisionLanguageModel, Processor]:
    """Model and processor of a checkpoint directory, a run folder's newest one, or a Hub id.

    Raises `InputError`.
    """
    folder = resolve(source)
    model = VisionLanguageModel.from_pretrained(folder)
    if (folder / "tokenizer.json").is_file() or model.cfg.lm_tokenizer == "world":
        return model, Processor(model.cfg, load_tokenizer(folder))
    return model, processors.build(model.cfg)  # nanoVLM keeps no tokenizer beside the weights


class Piece(NamedTuple):
    """What one token adds to an answer."""

    text: str  # "" while a character, or what may be a stop string, is incomplete
    token: int | None  # None: a last piece, of what had been held back
    logits: Tensor | None  # [V], what the token was chosen from


@dataclass(frozen=True)
class Reply:
    """A whole answer; `tokens` hold its end of turn, unless it was cut short."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]  # of each token, under the model alone


def answer_text(processor: Processor, tokens: Sequence[int], stop: Sequence[str] = ()) -> str:
    """The text of an answer, up to the first stop string."""
    text = processor.tokenizer.decode(list(tokens), skip_special_tokens=True).lstrip()
    return text[: min((text.find(s) for s in stop if s in text), default=len(text))].rstrip()


def stream_text(
    processor: Processor, said: Iterable[Step], stop: Sequence[str] = ()
) -> Iterator[Piece]:
    """Steps of a single row as text; nothing from a stop string on.

    One piece per token, and one more where the end had something held back.
    """
    tokens, out = [], ""
    for step in said:
        tokens.append(int(step.tokens[0]))
        whole = processor.tokenizer.decode(tokens, skip_special_tokens=True).lstrip()
        text = answer_text(processor, tokens, stop)
        stopped = any(s in whole for s in stop)
        held = 0 if stopped else max((_overlap(whole, s) for s in stop), default=0)
        text = text[: max(0, len(whole) - held)].rstrip() if held else text
        is_whole = stopped or not text.endswith("\N{REPLACEMENT CHARACTER}")
        complete = text.startswith(out) and is_whole
        new = text[len(out) :] if complete else ""
        out += new
        yield Piece(new, tokens[-1], step.logits[0])
        if stopped:
            return
    rest = answer_text(processor, tokens, stop)[len(out) :]
    if rest:
        yield Piece(rest, None, None)


def _overlap(text: str, stop: str) -> int:
    """How many last characters of the text may be the beginning of a stop string."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)


def alternatives(logits: Tensor, n: int) -> list[tuple[int, float]]:
    """The n likeliest tokens of [V] with their probabilities."""
    probs, tokens = logits.float().softmax(-1).topk(min(n, len(logits)))
    return list(zip(tokens.tolist(), probs.tolist()))


@dataclass(frozen=True)
class Chat:
    """A model that can be asked. `Chat.load("runs/demo")("What is this?", ["cat.png"])`."""

    model: VisionLanguageModel
    processor: Processor

    @classmethod
    def load(cls, checkpoint: str | Path, device: str | torch.device = "cpu") -> Chat:
        """From a checkpoint directory, a run folder's newest one, or the Hub; or `InputError`."""
        try:
            torch.zeros(1, device=device)
        except (RuntimeError, AssertionError) as error:  # the latter: torch built without CUDA
            raise InputError(f"device = {device!r}: {str(error).splitlines()[0]}.") from None
        model, processor = open_checkpoint(checkpoint)
        return cls(model.to(device), processor)

    def __call__(
        self,
        prompt: str,
        images: Sequence[str | Path | Image.Image] = (),
        sampling: Sampling = Sampling(),
    ) -> str:
        """The answer to one question about any number of pictures."""
        return "".join(self.stream(prompt, images, sampling))

    def prompt(self, prompt: str, images: Sequence[str | Path | Image.Image] = ()) -> Tokens:
        """Encode a question; pictures stand before it unless it names their places by `<image>`."""
        return self.processor.encode_prompt([question(prompt, images)], images)

    def stream(
        self,
        prompt: str,
        images: Sequence[str | Path | Image.Image] = (),
        sampling: Sampling = Sampling(),
    ) -> Iterator[str]:
        """The answer in pieces, as it is made; joined they are the whole answer."""
        return (piece.text for piece in self.watch(self.prompt(prompt, images), sampling))

    def watch(
        self, tokens: Tokens, sampling: Sampling = Sampling(), stop: Sequence[str] = ()
    ) -> Iterator[Piece]:
        """The answer to `tokens` piece by piece, with what each token was chosen from."""
        ids, mask, pixels = (
            x.to(self.model.device) for x in collate_prompts([tokens], self.processor.cfg)
        )
        return stream_text(self.processor, steps(self.model, ids, pixels, mask, sampling), stop)

    def replies(
        self,
        prompts: Iterable[Tokens],
        sampling: Sampling = Sampling(),
        stop: Sequence[str] = (),
        n_rows: int = 64,
        number: Callable[[int], int] = int,
    ) -> Iterator[tuple[int, Reply]]:
        """(`number` of the prompt, its answer) in the order in which they are done.

        Prompts are read as rows of the batch become free, so they may be made one by one. A
        prompt's number is added to the seed.
        """
        tokenizer = self.processor.tokenizer

        def said_stop(tokens: list[int]) -> bool:
            text = tokenizer.decode(tokens, skip_special_tokens=True).lstrip() if stop else ""
            return any(s in text for s in stop)

        encoded = (self._encoded(tokens) for tokens in prompts)
        said = generate_continuous(self.model, encoded, sampling, n_rows, said_stop, number)
        for index, tokens, logprobs in said:
            text = answer_text(self.processor, tokens, stop)
            yield index, Reply(text, tuple(tokens), tuple(logprobs))

    def answers(
        self, prompts: Iterable[Tokens], sampling: Sampling = Sampling(), n_rows: int = 64
    ) -> list[str]:
        """Answers to encoded prompts, in their order."""
        texts = {index: r.text for index, r in self.replies(prompts, sampling, (), n_rows)}
        return [texts[i] for i in range(len(texts))]

    def choose(self, tokens: Tokens, choices: Sequence[str]) -> list[float]:
        """How likely each of some whole answers is, as shares of their sum.

        An answer's likelihood is the product of its tokens', the end of turn included. Raises
        `InputError` for one that cannot be said.
        """
        if not choices:
            raise InputError("choices: name at least one.")
        said = [self.processor.encode_answer(choice).tolist() for choice in choices]
        longest, limit = max(map(len, said)), self.processor.cfg.lm_max_position_embeddings
        if len(tokens) + longest > limit:
            raise InputError(
                f"choices: the longest has {longest} tokens behind the prompt's {len(tokens)}, and "
                f"the model's context ends at {limit}; shorten it."
            )
        found = [
            float(x.sum()) for x in score_continuations(self.model, self._encoded(tokens), said)
        ]
        weights = [math.exp(x - max(found)) for x in found]
        return [w / sum(weights) for w in weights]

    def pixels(self, tokens: Tokens) -> Tensor:
        """The tiles of a prompt as the encoder takes them, [N, 3, H, W]."""
        return normalise(tokens.tiles, self.processor.cfg)

    def _encoded(self, tokens: Tokens) -> Prompt:
        return Prompt(torch.from_numpy(tokens.ids).long(), self.pixels(tokens))


def question(prompt: str, images: Sequence) -> Turn:
    """A user's turn with a place for each picture."""
    if not prompt.strip() and not images:
        raise InputError("the prompt is empty; ask something or give an image.")
    return Turn("user", prompt if "<image>" in prompt else "<image>" * len(images) + prompt)
