"""Idefics3 and SmolVLM (transformers' Idefics3ForConditionalGeneration): our own layout on disk.

A SigLIP-type encoder, a pixel shuffle, one projection, a Llama-type decoder.
"""

from __future__ import annotations

from configs import VLMConfig
from models.pretrained import llama, siglip
from models.pretrained.engine import Table, expand, prefixed

TABLE: Table = [
    *prefixed(siglip.TABLE, "vision_encoder.", "model.vision_model."),
    ("MP.proj.weight", "model.connector.modality_projection.proj.weight"),
    *prefixed(llama.TABLE, "decoder.", "model.text_model."),
    ("decoder.head.weight", "lm_head.weight"),
]
IGNORE = siglip.IGNORE + llama.IGNORE

HIDDEN_ACT = {
    "gelu_tanh": "gelu_pytorch_tanh",
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}


def names(cfg: VLMConfig) -> dict[str, str]:
    """Our name of every tensor -> theirs."""
    return expand(TABLE, {"vision_encoder.": cfg.vit_n_blocks, "decoder.": cfg.lm_n_blocks})


def is_expressible(cfg: VLMConfig) -> bool:
    """Whether Idefics3 has a place for everything.

    Its encoder knows neither CLS nor registers nor other pools, and no decoder of its kind has both
    a bias on queries, keys and values alone (Qwen2) and a norm of queries and keys (Qwen3).
    """
    return (
        not cfg.vit_cls_flag
        and not cfg.vit_n_registers
        and cfg.vit_qkv_bias
        and cfg.vit_pool in ("auto", "none")
        and not (cfg.lm_qkv_bias and cfg.lm_qk_norm)
    )


def _vision_config(cfg: VLMConfig) -> dict:
    return {
        "model_type": "idefics3_vision",
        "hidden_size": cfg.vit_hidden_dim,
        "intermediate_size": cfg.vit_inter_dim,
        "num_hidden_layers": cfg.vit_n_blocks,
        "num_attention_heads": cfg.vit_n_heads,
        "num_channels": cfg.vit_n_channels,
        "image_size": cfg.vit_img_size,
        "patch_size": cfg.vit_patch_size,
        "hidden_act": HIDDEN_ACT[cfg.vit_hidden_act],
        "layer_norm_eps": cfg.vit_ln_eps,
        "attention_dropout": 0.0,
    }


def config_json(cfg: VLMConfig, dtype: str) -> dict:
    """config.json as transformers 4 and 5, vLLM, llama.cpp and MLX read it; every size explicit.

    The head is declared untied and its weight written even when we tie it: v4 and v5 disagree about
    which of the two flags decides, and a head both sides find in the file needs neither.
    """
    rope: dict[str, object] = {"rope_type": cfg.lm_rope_type, "rope_theta": cfg.lm_re_base}
    if cfg.lm_rope_type != "default":
        rope["factor"] = cfg.lm_rope_factor
    if cfg.lm_rope_type == "llama3":
        rope |= {
            "low_freq_factor": cfg.lm_rope_low_freq_factor,
            "high_freq_factor": cfg.lm_rope_high_freq_factor,
            "original_max_position_embeddings": cfg.lm_rope_original_max_positions,
        }
    kind = "qwen3" if cfg.lm_qk_norm else "qwen2" if cfg.lm_qkv_bias else "llama"
    ids = {
        "pad_token_id": cfg.vlm_pad_token_id,
        "bos_token_id": cfg.vlm_bos_token_id,
        "eos_token_id": cfg.vlm_eos_token_id,
    }
    text = {
        "model_type": kind,
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "vocab_size": cfg.lm_vocab_size,
        "hidden_size": cfg.lm_hidden_dim,
        "intermediate_size": cfg.lm_inter_dim,
        "num_hidden_layers": cfg.lm_n_blocks,
        "num_attention_heads": cfg.lm_n_heads,
        "num_key_value_heads": cfg.lm_n_kv_heads,
        "head_dim": cfg.lm_head_width,
        "rms_norm_eps": cfg.lm_rms_eps,
        "max_position_embeddings": cfg.lm_max_position_embeddings,
        "rope_theta": cfg.lm_re_base,
        "rope_parameters": rope,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        **ids,
    }
    if cfg.lm_rope_type != "default":
        text["rope_scaling"] = {
            k: v for k, v in rope.items() if k != "rope_theta"
        }  # v4's name for it
    return {
        "architectures": ["Idefics3ForConditionalGeneration"],
        "model_type": "idefics3",
        "torch_dtype": dtype,
        "image_token_id": cfg.vlm_image_token_id,
        "scale_factor": cfg.mp_pixel_shuffle_factor,
        "vocab_size": cfg.lm_vocab_size,
        "tie_word_embeddings": False,
        **ids,
        "text_config": text,
        "vision_config": _vision_config(cfg),
    }
