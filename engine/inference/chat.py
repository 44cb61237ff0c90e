"""Ask a checkpoint: images and text in, text out.

Not here: decoding (models/inference/generate.py), several turns (conversation.py).
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
    """Load model and processor from a checkpoint, a run folder (its newest one), or a Hub id."""
    folder = resolve(source)
    model = VisionLanguageModel.from_pretrained(folder)
    if (folder / "tokenizer.json").is_file() or model.cfg.lm_tokenizer == "world":
        return model, Processor(model.cfg, load_tokenizer(folder))
    return model, processors.build(model.cfg)  # a nanoVLM checkpoint has no tokenizer


Images = Sequence[str | Path | Image.Image]


class Chunk(NamedTuple):
    """The text that a new token adds to an answer."""

    text: str  # "" while a character or a possible stop string is incomplete
    token: int | None  # None: the last chunk, with text that was held back
    logits: Tensor | None  # [V], from which the token was sampled


@dataclass(frozen=True)
class Reply:
    """A complete answer; `tokens` end with the end of turn, unless it was cut off."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]  # of each token, before temperature and penalties


def answer_text(processor: Processor, tokens: Sequence[int], stop: Sequence[str] = ()) -> str:
    """The text of an answer, up to the first stop string."""
    text = processor.tokenizer.decode(list(tokens), skip_special_tokens=True).lstrip()
    return text[: min((text.find(s) for s in stop if s in text), default=len(text))].rstrip()


def stream_text(
    processor: Processor, steps: Iterable[Step], stop: Sequence[str] = ()
) -> Iterator[Chunk]:
    """Decode generated tokens of a single row into chunks, up to the first stop string.

    Yields one chunk per token, and one more if text was held back at the end.
    """
    tokens, out = [], ""
    for step in steps:
        tokens.append(int(step.tokens[0]))
        whole = processor.tokenizer.decode(tokens, skip_special_tokens=True).lstrip()
        text = answer_text(processor, tokens, stop)
        stopped = any(s in whole for s in stop)
        held = 0 if stopped else max((_overlap(whole, s) for s in stop), default=0)
        text = text[: max(0, len(whole) - held)].rstrip() if held else text
        is_whole = stopped or not text.endswith("\N{REPLACEMENT CHARACTER}")
        new = text[len(out) :] if is_whole and text.startswith(out) else ""
        out += new
        yield Chunk(new, tokens[-1], step.logits[0])
        if stopped:
            return
    rest = answer_text(processor, tokens, stop)[len(out) :]
    if rest:
        yield Chunk(rest, None, None)


def _overlap(text: str, stop: str) -> int:
    """Length of the end of `text` that may be the start of a stop string."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)


def top_tokens(logits: Tensor, n: int) -> list[tuple[int, float]]:
    """The n most likely (token, probability) of logits [V]."""
    probs, tokens = logits.float().softmax(-1).topk(min(n, len(logits)))
    return list(zip(tokens.tolist(), probs.tolist()))


@dataclass(frozen=True)
class Chat:
    """Model and processor: `Chat.load("runs/demo")("What is this?", ["cat.png"])`."""

    model: VisionLanguageModel
    processor: Processor

    @classmethod
    def load(cls, checkpoint: str | Path, device: str | torch.device = "cpu") -> Chat:
        """Load a checkpoint, a run folder or a Hub id onto a device; raises `InputError`."""
        try:
            torch.zeros(1, device=device)
        except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
            raise InputError(f"device = {device!r}: {str(error).splitlines()[0]}.") from None
        model, processor = open_checkpoint(checkpoint)
        return cls(model.to(device), processor)

    def __call__(self, prompt: str, images: Images = (), sampling: Sampling = Sampling()) -> str:
        """Answer one question about any number of images."""
        return "".join(self.stream(prompt, images, sampling))

    def encode_prompt(self, prompt: str, images: Images = ()) -> Tokens:
        """Encode a question; images come first, unless `<image>` marks their places."""
        return self.processor.encode_prompt([user_turn(prompt, images)], images)

    def stream(
        self, prompt: str, images: Images = (), sampling: Sampling = Sampling()
    ) -> Iterator[str]:
        """Yield pieces of the answer while it is generated."""
        chunks = self.stream_chunks(self.encode_prompt(prompt, images), sampling)
        return (chunk.text for chunk in chunks)

    def stream_chunks(
        self, tokens: Tokens, sampling: Sampling = Sampling(), stop: Sequence[str] = ()
    ) -> Iterator[Chunk]:
        """Yield the answer to an encoded prompt as chunks: text, token and logits."""
        tensors = collate_prompts([tokens], self.processor.cfg)
        ids, mask, pixels = (x.to(self.model.device) for x in tensors)
        return stream_text(self.processor, steps(self.model, ids, pixels, mask, sampling), stop)

    def generate_replies(
        self, prompts: Iterable[Tokens], sampling: Sampling = Sampling(),
        stop: Sequence[str] = (), n_rows: int = 64, number: Callable[[int], int] = int,
    ) -> Iterator[tuple[int, Reply]]:  # fmt: skip
        """Yield (`number(i)`, answer) for prompt i, in the order in which they finish.

        Prompts are read lazily, when a row of the batch of `n_rows` is free (continuous batching).
        The number is added to the seed.
        """
        tokenizer = self.processor.tokenizer

        def has_stop(tokens: list[int]) -> bool:
            text = tokenizer.decode(tokens, skip_special_tokens=True).lstrip() if stop else ""
            return any(s in text for s in stop)

        encoded = (self._encode(tokens) for tokens in prompts)
        completions = generate_continuous(self.model, encoded, sampling, n_rows, has_stop, number)
        for index, tokens, logprobs in completions:
            text = answer_text(self.processor, tokens, stop)
            yield index, Reply(text, tuple(tokens), tuple(logprobs))

    def generate_answers(
        self, prompts: Iterable[Tokens], sampling: Sampling = Sampling(), n_rows: int = 64
    ) -> list[str]:
        """Answers to encoded prompts, in the order of the prompts."""
        texts = {index: r.text for index, r in self.generate_replies(prompts, sampling, (), n_rows)}
        return [texts[i] for i in range(len(texts))]

    def choice_probabilities(self, tokens: Tokens, choices: Sequence[str]) -> list[float]:
        """Probability of each of several complete answers, normalized to sum to 1.

        The likelihood of an answer is the product over its tokens, including the end of turn.
        Raises `InputError` for an answer that does not fit or spells a special token.
        """
        if not choices:
            raise InputError("choices: name at least one.")
        answers = [self.processor.encode_answer(choice).tolist() for choice in choices]
        longest, limit = max(map(len, answers)), self.processor.cfg.lm_max_position_embeddings
        if len(tokens) + longest > limit:
            size = f"the prompt has {len(tokens)} tokens and the longest choice {longest}"
            size += f", but the model's context ends at {limit}"
            raise InputError(f"choices: {size}; shorten them.")
        logprobs = score_continuations(self.model, self._encode(tokens), answers)
        scores = [float(x.sum()) for x in logprobs]
        weights = [math.exp(x - max(scores)) for x in scores]
        return [w / sum(weights) for w in weights]

    def pixel_values(self, tokens: Tokens) -> Tensor:
        """The normalized tiles of a prompt, [N, 3, H, W]."""
        return normalise(tokens.tiles, self.processor.cfg)

    def _encode(self, tokens: Tokens) -> Prompt:
        return Prompt(torch.from_numpy(tokens.ids).long(), self.pixel_values(tokens))


def user_turn(prompt: str, images: Sequence) -> Turn:
    """A user turn with a placeholder for each image; raises `InputError` if it is empty."""
    if not prompt.strip() and not images:
        raise InputError("the prompt is empty; ask something or give an image.")
    return Turn("user", prompt if "<image>" in prompt else "<image>" * len(images) + prompt)
