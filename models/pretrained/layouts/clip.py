"""CLIP's eyes: transformers' CLIPVisionModel, or those of CLIPModel.

Our features are after the last norm, which they apply to the CLS token of the pooled output alone.
"""

from configs import ViTConfig
from models.pretrained.layouts import siglip
from models.pretrained.mapping import (
    ACTIVATIONS,
    Family,
    Fields,
    Table,
    first_of,
    read_activation,
    read_fields,
    refuse_unless,
    write_fields,
)

TABLE: Table = [
    ("patch_embedding.conv.weight", "embeddings.patch_embedding.weight"),
    ("patch_embedding.cls_token", "embeddings.class_embedding"),
    ("patch_embedding.position_embedding", "embeddings.position_embedding.weight"),
    *((f"pre_norm.{kind}", f"pre_layrnorm.{kind}") for kind in siglip.KINDS),  # sic
    *siglip.BLOCKS,
    *((f"layer_norm.{kind}", f"post_layernorm.{kind}") for kind in siglip.KINDS),
]
OWN_DEFAULTS = {"vit_patch_size": 32, "vit_ln_eps": 1e-5}
FIELDS: Fields = [
    (ours, theirs, OWN_DEFAULTS.get(ours, default)) for ours, theirs, default in siglip.FIELDS
]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def read(config: dict, where: str) -> dict:
    vision = config.get("vision_config", config)
    refuse_unless(vision, {"attention_dropout": 0.0}, where)
    return siglip.PLAIN | read_fields(FIELDS, vision) | {
        "vit_cls_flag": True,
        "vit_pre_norm": True,
        "vit_hidden_act": read_activation(vision.get("hidden_act", "quick_gelu"), where),
        "vit_image_mean": MEAN,
        "vit_image_std": STD,
    }  # fmt: skip


def write(cfg: ViTConfig) -> dict:
    kind = {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model"}
    return kind | write_fields(FIELDS, cfg) | {
        "hidden_act": ACTIVATIONS[cfg.vit_hidden_act],
        "projection_dim": cfg.vit_hidden_dim,
    }  # fmt: skip


def unsupported_reason(cfg: ViTConfig) -> str:
    return first_of(
        {
            "no CLS token": not cfg.vit_cls_flag,
            "no first norm": not cfg.vit_pre_norm,
            "registers": cfg.vit_n_registers > 0,
            "layer scales": cfg.vit_layer_scale,
            "an attention without biases": not cfg.vit_qkv_bias,
            "swiglu": cfg.vit_hidden_act == "swiglu",
            "a classifier": cfg.vit_n_classes > 0,
            "another pool than CLS": cfg.vit_pool not in ("auto", "cls"),
        }
    )


FAMILY = Family(
    ("clip", "clip_vision_model"), TABLE, [], ("vision_model.", ""),
    ("*position_ids", "text_model.*", "text_projection.weight", "visual_projection.weight",
     "logit_scale"), read, write, unsupported_reason,
)  # fmt: skip
