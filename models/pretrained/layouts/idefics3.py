"""Idefics3 format, in which picoVLM saves: transformers' Idefics3ForConditionalGeneration.

A SigLIP-type vision encoder, a pixel shuffle, one projection and a Llama-type decoder.
"""

from __future__ import annotations

from typing import Any

from config_tools import InputError, require
from configs import VLMConfig
from models.pretrained.layouts import llama, siglip
from models.pretrained.mapping import Pair, Table, expand, first_unsupported, prefixed

TABLE: Table = [
    *prefixed(siglip.TABLE, "vision_encoder.", "model.vision_model."),
    ("MP.proj.weight", "model.connector.modality_projection.proj.weight"),
    *prefixed(llama.TABLE, "decoder.", "model.text_model."),
    ("decoder.head.weight", "lm_head.weight"),
]
IGNORE = siglip.IGNORE + llama.IGNORE
SPECIAL = dict(
    vlm_bos_token_id="<|im_start|>", vlm_pad_token_id="<|im_end|>",
    vlm_eos_token_id="<end_of_utterance>", vlm_image_token_id="<image>",
)  # fmt: skip
MODEL_TYPES = ("idefics3", "smolvlm")
# Defaults of Idefics3VisionConfig, which apply where config.json has no such key.
VISION_DEFAULTS = dict(
    hidden_size=1152, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=16,
    num_channels=3, image_size=224, patch_size=32,
)  # fmt: skip


def pairs(cfg: VLMConfig) -> list[Pair]:
    """Every parameter of the model and its key in Idefics3's files."""
    return expand(TABLE, {"vision_encoder.": cfg.vit_n_blocks, "decoder.": cfg.lm_n_blocks})


def unsupported_reason(cfg: VLMConfig) -> str:
    """The first field that Idefics3 does not support, "field = value"; "" if none."""
    return (
        siglip.unsupported_reason(cfg)
        or llama.unsupported_reason(cfg)
        or first_unsupported(cfg, {"vit_pool": ["auto", "none"]})
    )


def write(cfg: VLMConfig, dtype: str) -> dict:
    """config.json for transformers 4 and 5, vLLM, llama.cpp and MLX, with every size.

    The head is always declared untied, and its weight is saved: transformers 4 and 5 read different
    ones of the two tie_word_embeddings.
    """
    ids = {
        "pad_token_id": cfg.vlm_pad_token_id,
        "bos_token_id": cfg.vlm_bos_token_id,
        "eos_token_id": cfg.vlm_eos_token_id,
    }
    return {
        "architectures": ["Idefics3ForConditionalGeneration"],
        "model_type": "idefics3",
        "torch_dtype": dtype,
        "image_token_id": cfg.vlm_image_token_id,
        "scale_factor": cfg.mp_pixel_shuffle_factor,
        "vocab_size": cfg.lm_vocab_size,
        "tie_word_embeddings": False,
        **ids,
        "text_config": llama.write(cfg) | ids | {"tie_word_embeddings": False},
        "vision_config": {"model_type": "idefics3_vision"} | siglip.write_sizes(cfg),
    }


def read(config: dict, images: dict, tokens: dict[str, int], where: str) -> dict:
    """config.json, image settings and token ids of a published model -> fields of a VLMConfig.

    `tie_word_embeddings` is read at the top level, else in text_config, else False. Raises
    `InputError`.
    """
    text: Any = config.get("text_config")
    vision: Any = config.get("vision_config")
    for name, part in (("text_config", text), ("vision_config", vision)):
        require(isinstance(part, dict), f"{where}: {name}", part, "must be an object")
    kind = text.get("model_type")
    if kind not in llama.DEFAULTS:
        known = ", ".join(llama.DEFAULTS)
        raise InputError(f"{where}: text_config.model_type = {kind!r}: must be one of {known}.")
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    fields = siglip.read(VISION_DEFAULTS | vision, where) | llama.read(text, where)
    return fields | {
        "lm_tie_weights": tied,
        "mp_pixel_shuffle_factor": config.get("scale_factor", 2),
        "vlm_image_token_id": config.get("image_token_id", 128257),
        **_read_images(fields["vit_img_size"], images, where),
        **_read_tokens(config, tokens, where),
    }


def _read_tokens(config: dict, tokens: dict[str, int], where: str) -> dict:
    """Special token ids by name from the tokenizer, or from config.json without a tokenizer.

    The tokenizer comes first because published configs disagree on the ids of pad and end of turn.
    """
    if not tokens:
        kinds = ("pad", "bos", "eos")
        both = [config, config["text_config"]]
        found = {k: [c[f"{k}_token_id"] for c in both if f"{k}_token_id" in c] for k in kinds}
        return {f"vlm_{kind}_token_id": ids[0] for kind, ids in found.items() if ids}
    missing = ", ".join(token for token in SPECIAL.values() if token not in tokens)
    if missing:
        raise InputError(f"{where}: the tokenizer has no {missing}, which picoVLM's prompts need.")
    return special_ids(tokens)


def special_ids(tokens: dict[str, int]) -> dict[str, int]:
    """Config fields of the special tokens; empty unless the tokenizer has all of them."""
    has_all = set(SPECIAL.values()) <= set(tokens)
    return {name: tokens[token] for name, token in SPECIAL.items()} if has_all else {}


def _read_images(tile: int, images: dict, where: str) -> dict:
    """Tile size and normalisation from preprocessor_config.json."""
    size, tiles = (images.get(key, {}).get("longest_edge") for key in ("size", "max_image_size"))
    fix = f"must equal vision_config.image_size = {tile}, the size of a tile"
    require(tiles == tile, f"{where}: max_image_size", tiles, fix)
    if images.get("do_image_splitting") is False:
        raise InputError(f"{where}: do_image_splitting = False: is not supported; expected True.")
    return {
        "max_img_size": size,
        "vit_image_mean": tuple(images.get("image_mean") or (0.5, 0.5, 0.5)),
        "vit_image_std": tuple(images.get("image_std") or (0.5, 0.5, 0.5)),
    }
