"""Sample -> Tokens and prompt -> Tokens: token ids of the text and tiles of the images.

A processor is saved with the weights, in the format of transformers' Idefics3Processor.
Not here: how images are tiled (images.py), how text is formatted (text.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from config_tools import InputError, from_dict, read_json
from configs import VLMConfig
from data import images, text
from data.types import Sample, Tokens, Turn


@dataclass(frozen=True)
class Processor:
    """Tokenizer and image settings of one model."""

    cfg: VLMConfig
    tokenizer: Tokenizer

    def encode(self, sample: Sample, max_length: int, max_tiles: int) -> Tokens:
        """A training sample of at most `max_length` tokens: `encode_whole`, then `truncate`."""
        return self.truncate(self.encode_whole(sample, max_tiles), max_length)

    def encode_whole(self, sample: Sample, max_tiles: int) -> Tokens:
        """An untruncated training sample; raises `InputError` for a bad image or too many tiles."""
        tiles, strings = self._encode_images(sample, max_tiles)
        spans = text.format_turns(sample.turns, strings)
        return Tokens(*text.encode_spans(self.tokenizer, spans), tiles, sample.row)

    def truncate(self, tokens: Tokens, max_length: int) -> Tokens:
        """Keep at most `max_length` tokens. Only text after the last image is cut, never an image.

        Raises `InputError` naming the row if its images do not fit, or if no supervised token is
        left.
        """
        ids, supervised = tokens.ids[:max_length], tokens.supervised[:max_length]
        placeholders = np.flatnonzero(tokens.ids == self.cfg.vlm_image_token_id)
        end = placeholders[-1] + 1 if len(placeholders) else 0
        if len(tokens) > max_length and end >= max_length:  # the marker after the image must fit
            problem = f"its images take {end} tokens and do not fit into {max_length}"
            fix = "raise data.max_length or lower model.max_img_size."
            raise InputError(f"{tokens.row}: {problem}; {fix}")
        if not supervised.any():
            nothing = f"no supervised token in the first {max_length} tokens"
            fix = "add an answer or raise data.max_length."
            raise InputError(f"{tokens.row}: {nothing}; {fix}")
        return replace(tokens, ids=ids, supervised=supervised)

    def encode_prompt(
        self, turns: Sequence[Turn], images: Sequence = (), max_tiles: int = 1 << 30,
        opening: str = text.START,
    ) -> Tokens:  # fmt: skip
        """A conversation that ends with "Assistant:"; no token is supervised.

        `opening` is `text.TURN_SEPARATOR` for turns that follow an answer; turns encoded one by one
        have the ids of the whole conversation. Raises `InputError` if the model's context is full.
        """
        sample = Sample((*turns, Turn("assistant", "")), tuple(images), row="prompt")
        tiles, strings = self._encode_images(sample, max_tiles)
        # The last two spans are the empty answer and what follows it.
        *spans, _answer, _newline = text.format_turns(sample.turns, strings, opening)
        ids, supervised = text.encode_spans(self.tokenizer, spans)
        limit = self.cfg.lm_max_position_embeddings
        if (n := len(ids)) >= limit:
            n_image = (ids == self.cfg.vlm_image_token_id).sum()
            has = f"the prompt has {n} tokens, {n_image} of them for images"
            raise InputError(f"{has}; the model's context ends at {limit}. Shorten the prompt.")
        return Tokens(ids, np.zeros_like(supervised), tiles, "prompt")

    def encode_answer(self, answer: str) -> np.ndarray:
        """The ids [T] int32 of `answer` and its end of turn; raises `InputError`."""
        text.check_turns([Turn("assistant", answer)], 0, self.tokenizer, f"answer {answer[:40]!r}")
        _prompt, span, _newline = text.format_turns([Turn("assistant", answer)], ())
        return text.encode_spans(self.tokenizer, [span])[0]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer, without special tokens and surrounding spaces."""
        return self.tokenizer.decode(list(map(int, ids)), skip_special_tokens=True).strip()

    def _encode_images(self, sample: Sample, max_tiles: int) -> tuple[np.ndarray, list[str]]:
        """Tiles [N, size, size, 3] uint8 of all images, and the text that replaces each `<image>`.

        `collate` (data/batches/packing.py) converts them to [N, 3, size, size] and normalises.
        """
        cfg = self.cfg
        text.check_turns(sample.turns, len(sample.images), self.tokenizer, sample.row)
        tiles, strings = [np.zeros((0, cfg.vit_img_size, cfg.vit_img_size, 3), dtype=np.uint8)], []
        for number, source in enumerate(sample.images, 1):
            image = images.open_image(source, f"{sample.row}, image {number}")
            new, (rows, cols) = images.tile(image, cfg)  # [n, size, size, 3]
            tiles.append(new)
            strings.append(text.image_string(rows, cols, cfg.tokens_per_tile))
        if (n := sum(map(len, tiles))) > max_tiles:
            raise InputError(f"{sample.row}: {n} tiles are more than data.max_tiles = {max_tiles}.")
        return np.concatenate(tiles), strings

    def save(self, directory: str | Path) -> None:
        """Write the files that transformers 4 and 5, vLLM and llama.cpp read."""
        files = {"tokenizer.json": self.tokenizer.to_str(True)}
        files["chat_template.jinja"] = text.CHAT_TEMPLATE
        for name, content in self._json_files().items():
            files[name] = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        for name, content in files.items():
            (Path(directory) / name).write_text(content, encoding="utf-8")

    def _json_files(self) -> dict[str, dict]:
        cfg = self.cfg
        off = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
        added = sorted(self.tokenizer.get_added_tokens_decoder().items())
        steps = "convert_rgb", "resize", "rescale", "normalize", "pad", "image_splitting"
        image_settings = {
            "image_processor_type": "Idefics3ImageProcessor",
            "processor_class": "Idefics3Processor",
            **{f"do_{step}": True for step in steps},
            "rescale_factor": 1 / 255,
            "resample": 1,  # Pillow's LANCZOS
            "image_mean": list(cfg.vit_image_mean),
            "image_std": list(cfg.vit_image_std),
            "size": {"longest_edge": cfg.max_img_size},
            "max_image_size": {"longest_edge": cfg.vit_img_size},
        }
        return {
            "tokenizer_config.json": {
                # With GPT2Tokenizer, transformers 4 emits token_type_ids, and 5 changes the
                # pre-tokenizer.
                "tokenizer_class": "PreTrainedTokenizerFast",
                "processor_class": "Idefics3Processor",
                "model_input_names": ["input_ids", "attention_mask"],
                "add_bos_token": False,
                "bos_token": self.tokenizer.id_to_token(cfg.vlm_bos_token_id),
                "eos_token": text.END_OF_TURN,
                "pad_token": self.tokenizer.id_to_token(cfg.vlm_pad_token_id),
                "padding_side": "left",  # for generation by transformers
                "clean_up_tokenization_spaces": False,
                "model_max_length": cfg.lm_max_position_embeddings,
                "additional_special_tokens": [text.FAKE, text.IMAGE, text.END_OF_TURN],
                "added_tokens_decoder": {
                    str(i): {"content": t.content, **off, "special": t.special} for i, t in added
                },
                "chat_template": text.CHAT_TEMPLATE,
            },
            "chat_template.json": {"chat_template": text.CHAT_TEMPLATE},
            "preprocessor_config.json": image_settings,
            "processor_config.json": {
                "processor_class": "Idefics3Processor",
                "image_seq_len": cfg.tokens_per_tile,
            },
        }


def build(cfg: VLMConfig) -> Processor:
    """The processor of a new model: `lm_tokenizer` plus Idefics3's special tokens."""
    if cfg.lm_tokenizer == "world":
        tokenizer = text.world_tokenizer(cfg.lm_vocab_size)
    else:
        tokenizer = text.load_tokenizer(cfg.lm_tokenizer)
    return Processor(cfg, text.add_special_tokens(tokenizer, cfg))


def load(directory: str | Path) -> Processor:
    """The processor saved in a checkpoint directory; raises `InputError`."""
    file = f"{directory}/config.json"
    settings = read_json(Path(file)).get("picovlm")
    if settings is None:
        raise InputError(f"{file}: no `picovlm` key; expected a checkpoint saved by picoVLM.")
    return Processor(from_dict(VLMConfig, settings, file), text.load_tokenizer(directory))
