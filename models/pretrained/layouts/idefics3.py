"""Idefics3 and SmolVLM (transformers' Idefics3ForConditionalGeneration): our own layout on disk.

A SigLIP-type encoder, a pixel shuffle, one projection, a Llama-type decoder.
"""

from __future__ import annotations

from config_tools import InputError, require
from configs import VLMConfig
from models.pretrained.layouts import llama, siglip
from models.pretrained.mapping import Pair, Table, expand, prefixed

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
# What Idefics3VisionConfig takes for granted where config.json is silent.
VISION_DEFAULTS = dict(
    hidden_size=1152, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=16,
    num_channels=3, image_size=224, patch_size=32,
)  # fmt: skip


def pairs(cfg: VLMConfig) -> list[Pair]:
    """Every tensor of the model, ours and theirs."""
    return expand(TABLE, {"vision_encoder.": cfg.vit_n_blocks, "decoder.": cfg.lm_n_blocks})


def unsupported_reason(cfg: VLMConfig) -> str:
    """What Idefics3 has no place for, in words; "" when everything has its place."""
    return (
        siglip.unsupported_reason(cfg)
        or llama.unsupported_reason(cfg)
        or ("" if cfg.vit_pool in ("auto", "none") else "a pooled encoder")
    )


def config_json(cfg: VLMConfig, dtype: str) -> dict:
    """config.json as transformers 4 and 5, vLLM, llama.cpp and MLX read it; every size explicit.

    The head is declared untied and its weight written even when we tie it: v4 and v5 disagree about
    which of the two flags decides, and a head both sides find in the file needs neither.
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
        "vision_config": {"model_type": "idefics3_vision"} | siglip.sizes(cfg),
    }


def read(config: dict, images: dict, tokens: dict[str, int], where: str) -> dict:
    """A published checkpoint's config.json, image settings and token ids -> a VLMConfig's fields.

    Raises `InputError`. The head is tied as the top flag says, else the text flag, else not.
    """
    text, vision = config.get("text_config"), config.get("vision_config")
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
    """Our prompt's special tokens by name; config.json's ids where there is no tokenizer.

    Published ids of pad and end of turn are not to be trusted: they differ from file to file.
    """
    if not tokens:
        kinds = ("pad", "bos", "eos")
        both = [config, config["text_config"]]
        found = {k: [c[f"{k}_token_id"] for c in both if f"{k}_token_id" in c] for k in kinds}
        return {f"vlm_{kind}_token_id": ids[0] for kind, ids in found.items() if ids}
    missing = ", ".join(token for token in SPECIAL.values() if token not in tokens)
    if missing:
        raise InputError(f"{where}: its tokenizer has no {missing}, which our prompts need.")
    return special_ids(tokens)


def special_ids(tokens: dict[str, int]) -> dict[str, int]:
    """Our config's fields of the special tokens, of a tokenizer that has them all; else empty."""
    has_all = set(SPECIAL.values()) <= set(tokens)
    return {name: tokens[token] for name, token in SPECIAL.items()} if has_all else {}


def _read_images(tile: int, images: dict, where: str) -> dict:
    """How pictures are cut, from preprocessor_config.json."""
    size, tiles = (images.get(key, {}).get("longest_edge") for key in ("size", "max_image_size"))
    fix = f"must be image_size = {tile} of vision_config, as tiles are"
    require(tiles == tile, f"{where}: max_image_size", tiles, fix)
    if images.get("do_image_splitting") is False:
        raise InputError(f"{where}: do_image_splitting = False: is not supported, only True is.")
    return {
        "max_img_size": size,
        "vit_image_mean": tuple(images.get("image_mean") or (0.5, 0.5, 0.5)),
        "vit_image_std": tuple(images.get("image_std") or (0.5, 0.5, 0.5)),
    }
