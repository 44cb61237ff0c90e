"""Pictures and strings in, text out: model and processor together, in one call.

Not here: how a token is chosen (models/generation.py), a web page (demo.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from configs import InputError
from data import processor as processors
from data.packing import collate_prompts
from data.processor import Processor
from data.sample import Tokens, Turn
from data.text import load_tokenizer
from engine.checkpoint import resolve
from models.generation import Sampling
from models.vision_language_model import VisionLanguageModel

MOST_TOKENS = 1 << 13  # of the prompts answered together: their keys and values fill the memory


def open_checkpoint(source: str | Path) -> tuple[VisionLanguageModel, Processor]:
    """Model and processor of a checkpoint directory, a run folder's newest one, or a Hub id.

    Raises `InputError`.
    """
    folder = resolve(source)
    model = VisionLanguageModel.from_pretrained(folder)
    if (folder / "tokenizer.json").is_file() or model.cfg.lm_tokenizer == "world":
        return model, Processor(model.cfg, load_tokenizer(folder))
    return model, processors.build(model.cfg)  # nanoVLM keeps no tokenizer beside the weights


@dataclass(frozen=True)
class Chat:
    """A model that can be asked. `Chat.load("runs/demo")("What is this?", ["cat.png"])`."""

    model: VisionLanguageModel
    processor: Processor

    @classmethod
    def load(cls, checkpoint: str | Path, device: str | torch.device = "cpu") -> Chat:
        """From a checkpoint directory, a run folder's newest one, or the Hub; or `InputError`."""
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
        if not prompt.strip() and not images:
            raise InputError("the prompt is empty; ask something or give an image.")
        if "<image>" not in prompt:
            prompt = "<image>" * len(images) + prompt
        return self.processor.encode_prompt([Turn("user", prompt)], images)

    def stream(
        self,
        prompt: str,
        images: Sequence[str | Path | Image.Image] = (),
        sampling: Sampling = Sampling(),
    ) -> Iterator[str]:
        """The answer in pieces, as it is made; joined they are the whole answer."""
        return self.stream_tokens(self.prompt(prompt, images), sampling)

    def stream_tokens(self, tokens: Tokens, sampling: Sampling) -> Iterator[str]:
        """One piece per token of the answer to `tokens`; "" while a character is incomplete.

        One more where the end cuts a character off.
        """
        ids, mask, pixels = (
            x.to(self.model.device) for x in collate_prompts([tokens], self.processor.cfg)
        )
        new, said, text = [], "", ""
        for token in self.model.stream(ids, pixels, mask, sampling):
            new.append(int(token))
            text = self.processor.decode(new)
            complete = text.startswith(said) and not text.endswith("\N{REPLACEMENT CHARACTER}")
            piece = text[len(said) :] if complete else ""
            said += piece
            yield piece
        if len(text) > len(said):
            yield text[len(said) :]

    def answers(
        self, prompts: Sequence[Tokens], sampling: Sampling = Sampling(), batch_size: int = 64
    ) -> list[str]:
        """Answers to encoded prompts, in their order. Prompts of like length share a batch."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        texts = [""] * len(prompts)
        while order:
            n = next(
                n
                for n in range(min(batch_size, len(order)), 0, -1)
                if n == 1 or n * len(prompts[order[n - 1]]) <= MOST_TOKENS
            )
            chosen, order = order[:n], order[n:]
            ids, mask, pixels = (
                x.to(self.model.device)
                for x in collate_prompts([prompts[i] for i in chosen], self.processor.cfg)
            )
            for i, row in zip(chosen, self.model.generate(ids, pixels, mask, sampling).tolist()):
                stop = (
                    row.index(self.processor.cfg.vlm_eos_token_id)
                    if self.processor.cfg.vlm_eos_token_id in row
                    else len(row)
                )
                texts[i] = self.processor.decode(row[:stop])
        return texts
