"""The Vision Transformer with a CLS token: transformers' ViTModel and ViTForImageClassification."""

from __future__ import annotations

from configs import ViTConfig
from models.pretrained.layouts import siglip
from models.pretrained.mapping import (
    ACTIVATIONS,
    UNSQUEEZED,
    UNSQUEEZED_TWICE,
    Fields,
    Layout,
    Table,
    first_unsupported,
    read_activation,
    read_fields,
    refuse_unless,
    weight_and_bias,
    write_fields,
)

# DINOv2 uses EMBEDDINGS and ATTENTION, too.
EMBEDDINGS: Table = [
    ("patch_embedding.conv.weight", "embeddings.patch_embeddings.projection.weight"),
    ("patch_embedding.conv.bias", "embeddings.patch_embeddings.projection.bias"),
    ("patch_embedding.cls_token", "embeddings.cls_token", UNSQUEEZED_TWICE),
    ("patch_embedding.position_embedding", "embeddings.position_embeddings", UNSQUEEZED),
    *weight_and_bias([("layer_norm", "layernorm")]),
]
ATTENTION = [
    ("attn.q_proj", "attention.attention.query"),
    ("attn.k_proj", "attention.attention.key"),
    ("attn.v_proj", "attention.attention.value"),
    ("attn.out_proj", "attention.output.dense"),
]
BLOCK = [
    *ATTENTION,
    ("ln1", "layernorm_before"),
    ("ln2", "layernorm_after"),
    ("mlp.fc1", "intermediate.dense"),
    ("mlp.fc2", "output.dense"),
]
TABLE: Table = EMBEDDINGS + weight_and_bias(BLOCK, "blocks.{i}.", "encoder.layer.{i}.")
FIELDS: Fields = [
    (field, key, 1e-12 if field == "vit_ln_eps" else default)
    for field, key, default in siglip.FIELDS
] + [("vit_qkv_bias", "qkv_bias", True)]
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
OWN = {"vit_cls_flag": True, "vit_qkv_bias": [True, False], "vit_pool": ["auto", "cls"]}


def read(config: dict, where: str) -> dict:
    refuse_unless(config, NO_DROPOUT, where)
    classifies = "ViTForImageClassification" in (config.get("architectures") or ())
    return siglip.BASE | read_fields(FIELDS, config) | {
        "vit_cls_flag": True,
        "vit_hidden_act": read_activation(config.get("hidden_act", "gelu"), where),
    } | (siglip.read_classes(config) if classifies else {})  # fmt: skip


def write(cfg: ViTConfig) -> dict:
    n, act = cfg.vit_n_classes, ACTIVATIONS[cfg.vit_hidden_act]
    kind = {"architectures": ["ViTForImageClassification" if n else "ViTModel"]}
    kind |= siglip.write_classes(cfg) if n else {}
    return kind | {"model_type": "vit", "hidden_act": act} | NO_DROPOUT | write_fields(FIELDS, cfg)


def unsupported_reason(cfg: ViTConfig) -> str:
    """The first field that ViTModel does not support, "field = value"; "" if none."""
    head = {"vit_head": "linear"} if cfg.vit_n_classes else {}
    return first_unsupported(cfg, siglip.TRUNK | OWN | head)


LAYOUT = Layout(
    ("vit",), TABLE, siglip.CLASSIFIER, ("vit.", ""), ("*pooler.*",), read, write,
    unsupported_reason,
)  # fmt: skip
