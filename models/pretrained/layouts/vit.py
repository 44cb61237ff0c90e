"""The Vision Transformer with a CLS token: transformers' ViTModel and ViTForImageClassification."""

from configs import ViTConfig
from models.pretrained.layouts import siglip
from models.pretrained.mapping import (
    ACTIVATIONS,
    ONE_MORE,
    TWO_MORE,
    Family,
    Fields,
    Table,
    first_of,
    read_activation,
    read_fields,
    refuse_unless,
    write_fields,
)

# Up to here DINOv2 has the same names.
EMBEDDINGS: Table = [
    ("patch_embedding.conv.weight", "embeddings.patch_embeddings.projection.weight"),
    ("patch_embedding.conv.bias", "embeddings.patch_embeddings.projection.bias"),
    ("patch_embedding.cls_token", "embeddings.cls_token", TWO_MORE),
    ("patch_embedding.position_embedding", "embeddings.position_embeddings", ONE_MORE),
    *((f"layer_norm.{kind}", f"layernorm.{kind}") for kind in siglip.KINDS),
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
TABLE: Table = EMBEDDINGS + [
    (f"blocks.{{i}}.{ours}.{kind}", f"encoder.layer.{{i}}.{theirs}.{kind}")
    for ours, theirs in BLOCK
    for kind in siglip.KINDS
]
FIELDS: Fields = [
    (ours, theirs, 1e-12 if ours == "vit_ln_eps" else default)
    for ours, theirs, default in siglip.FIELDS
] + [("vit_qkv_bias", "qkv_bias", True)]
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def read(config: dict, where: str) -> dict:
    refuse_unless(config, NO_DROPOUT, where)
    classifies = "ViTForImageClassification" in (config.get("architectures") or ())
    return siglip.PLAIN | read_fields(FIELDS, config) | {
        "vit_cls_flag": True,
        "vit_hidden_act": read_activation(config.get("hidden_act", "gelu"), where),
    } | (siglip.classes(config) if classifies else {})  # fmt: skip


def write(cfg: ViTConfig) -> dict:
    n, act = cfg.vit_n_classes, ACTIVATIONS[cfg.vit_hidden_act]
    kind = {"architectures": ["ViTForImageClassification" if n else "ViTModel"]}
    kind |= siglip.write_classes(cfg) if n else {}
    return kind | {"model_type": "vit", "hidden_act": act} | NO_DROPOUT | write_fields(FIELDS, cfg)


def unsupported_reason(cfg: ViTConfig) -> str:
    return first_of(
        {
            "no CLS token": not cfg.vit_cls_flag,
            "registers": cfg.vit_n_registers > 0,
            "CLIP's first norm": cfg.vit_pre_norm,
            "layer scales": cfg.vit_layer_scale,
            "swiglu": cfg.vit_hidden_act == "swiglu",
            "another pool than CLS": cfg.vit_pool not in ("auto", "cls"),
            "a head with a hidden layer": cfg.vit_n_classes > 0 and cfg.vit_head != "linear",
        }
    )


FAMILY = Family(
    ("vit",), TABLE, siglip.CLASSIFIER, ("vit.", ""), ("*pooler.*",), read, write, unsupported_reason
)  # fmt: skip
