"""The decoders of Llama, SmolLM2, SmolLM3, Qwen2, Qwen2.5 and Qwen3: transformers' ...ForCausalLM.

One table serves all of them; rows for biases and norms that a model does not have are skipped.
"""

from __future__ import annotations

from config_tools import require
from configs import LMConfig
from models.pretrained.mapping import (
    Fields,
    Layout,
    Table,
    read_fields,
    refuse_unless,
    weight_and_bias,
    write_fields,
)

BLOCK = [
    ("norm1.weight", "input_layernorm.weight"),
    ("norm2.weight", "post_attention_layernorm.weight"),
    *weight_and_bias((f"attn.{p}_proj", f"self_attn.{p}_proj") for p in "qkvo"),
    ("attn.q_norm.weight", "self_attn.q_norm.weight"),
    ("attn.k_norm.weight", "self_attn.k_norm.weight"),
    *((f"mlp.{p}_proj.weight", f"mlp.{p}_proj.weight") for p in ("gate", "up", "down")),
]

TABLE: Table = [
    ("token_embedding.weight", "embed_tokens.weight"),
    ("norm.weight", "norm.weight"),
    *((f"blocks.{{i}}.{param}", f"layers.{{i}}.{key}") for param, key in BLOCK),
]
HEAD: Table = [("head.weight", "lm_head.weight")]
IGNORE = ("*rotary_emb.inv_freq",)

FIELDS: Fields = [
    ("lm_vocab_size", "vocab_size", 151936),
    ("lm_hidden_dim", "hidden_size", 4096),
    ("lm_inter_dim", "intermediate_size", 22016),
    ("lm_n_blocks", "num_hidden_layers", 32),
    ("lm_n_heads", "num_attention_heads", 32),
    ("lm_n_kv_heads", "num_key_value_heads", 32),
    ("lm_head_dim", "head_dim", None),
    ("lm_rms_eps", "rms_norm_eps", 1e-6),
    ("lm_max_position_embeddings", "max_position_embeddings", 32768),
]
# Defaults of each config class in transformers, for keys that config.json does not have.
DEFAULTS: dict[str, dict] = {
    "llama": dict(
        vocab_size=32000, intermediate_size=11008, num_key_value_heads=None,
        max_position_embeddings=2048,
    ),
    "smollm3": dict(
        vocab_size=128256, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36,
        num_attention_heads=16, num_key_value_heads=4, rope_theta=2000000.0,
        tie_word_embeddings=True, no_rope_layer_interval=4,
    ),
    "qwen2": {},
    "qwen3": dict(head_dim=128),
}  # fmt: skip
CLASS = {"llama": "Llama", "smollm3": "SmolLM3", "qwen2": "Qwen2", "qwen3": "Qwen3"}
# The config field that only this model_type sets.
OWN_FIELD = {"smollm3": "lm_nope_every", "qwen3": "lm_qk_norm", "qwen2": "lm_qkv_bias"}
ROPE: Fields = [
    ("lm_rope_factor", "factor", 1.0),
    ("lm_rope_low_freq_factor", "low_freq_factor", 1.0),
    ("lm_rope_high_freq_factor", "high_freq_factor", 4.0),
    ("lm_rope_original_max_positions", "original_max_position_embeddings", 8192),
]
SUPPORTED = {
    "hidden_act": "silu", "use_sliding_window": False, "mlp_bias": False, "attention_bias": False,
    "attention_dropout": 0.0,
}  # fmt: skip


def read(config: dict, where: str) -> dict:
    kind = config["model_type"]
    config = DEFAULTS[kind] | {key: v for key, v in config.items() if v is not None}
    refuse_unless(config, SUPPORTED, where)
    for layer_type in config.get("layer_types", ()):
        refuse_unless({"layer_types": layer_type}, {"layer_types": "full_attention"}, where)
    fields = read_fields(FIELDS, config)
    if fields["lm_n_kv_heads"] is None:
        fields["lm_n_kv_heads"] = fields["lm_n_heads"]
    if (fields["lm_head_dim"] or 0) * fields["lm_n_heads"] == fields["lm_hidden_dim"]:
        fields["lm_head_dim"] = None  # our default
    return fields | _read_rope(config, where) | {
        "lm_qkv_bias": kind == "qwen2",
        "lm_qk_norm": kind == "qwen3",
        "lm_nope_every": _read_nope(config, where) if kind == "smollm3" else 0,
        "lm_tie_weights": config.get("tie_word_embeddings", False),
    }  # fmt: skip


def _read_rope(config: dict, where: str) -> dict:
    """Read the rotary embedding as transformers 5 does.

    `rope_scaling` (transformers 4) outranks `rope_parameters`, and the top-level
    `original_max_position_embeddings` that in either; without one it is `max_position_embeddings`.
    """
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    require(isinstance(rope, dict), f"{where}: rope_parameters", rope, "must be an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    allowed = ("default", "linear", "llama3")
    fix = f"must be one of {', '.join(allowed)}"
    require(kind in allowed, f"{where}: rope_type", kind, fix)
    refuse_unless(config | rope, {"partial_rotary_factor": 1.0}, where)
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    original = "original_max_position_embeddings"
    default = rope.get(original, config.get("max_position_embeddings", 32768))
    scaling = rope | ({original: config.get(original, default)} if kind == "llama3" else {})
    return {"lm_rope_type": kind, "lm_re_base": theta} | read_fields(ROPE, scaling)


def _read_nope(config: dict, where: str) -> int:
    """SmolLM3's interval of blocks without RoPE (NoPE), also from a list of all blocks."""
    every, n = config["no_rope_layer_interval"], config.get("num_hidden_layers")
    listed = config.get("no_rope_layers")
    if not listed:
        return every
    listed = [bool(x) for x in listed][:n]
    every = listed.index(False) + 1 if False in listed else 0
    regular = nope_layers(len(listed), every)
    fix = "must turn off RoPE at a fixed interval"
    require(listed == [bool(x) for x in regular], f"{where}: no_rope_layers", listed, fix)
    return every


def nope_layers(n: int, every: int) -> list[int]:
    """SmolLM3's list: 1 for a block with RoPE, 0 for one without."""
    return [int(not every or (i + 1) % every != 0) for i in range(n)]


def kind_of(cfg: LMConfig) -> str:
    """The model_type that has the architecture of `cfg`."""
    return next((kind for kind, field in OWN_FIELD.items() if getattr(cfg, field)), "llama")


def write(cfg: LMConfig) -> dict:
    """config.json of a decoder, for transformers 4 and 5, vLLM, llama.cpp and MLX."""
    rope: dict[str, object] = {"rope_type": cfg.lm_rope_type, "rope_theta": cfg.lm_re_base}
    scaling = write_fields(ROPE, cfg)
    if cfg.lm_rope_type != "default":
        rope["factor"] = scaling["factor"]
    if cfg.lm_rope_type == "llama3":
        rope |= scaling
    kind = kind_of(cfg)
    config = {
        "model_type": kind,
        "architectures": [f"{CLASS[kind]}ForCausalLM"],
        **write_fields(FIELDS, cfg),
        "head_dim": cfg.lm_head_width,
        "rope_theta": cfg.lm_re_base,
        "rope_parameters": rope,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": cfg.lm_tie_weights,
    }
    if kind == "smollm3":
        every = cfg.lm_nope_every
        config["no_rope_layers"] = nope_layers(cfg.lm_n_blocks, every)
        config["no_rope_layer_interval"] = every
    if cfg.lm_rope_type != "default":
        # transformers 4
        config["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    return config | {f"{name}_token_id": None for name in ("pad", "bos", "eos")}


def unsupported_reason(cfg: LMConfig) -> str:
    """The fields that none of these decoders combines; "" if there are none."""
    own = [field for field in OWN_FIELD.values() if getattr(cfg, field)]
    return " together with ".join(own) if len(own) > 1 else ""


LAYOUT = Layout(
    tuple(DEFAULTS), TABLE, HEAD, ("model.", ""), IGNORE, read, write, unsupported_reason
)
