"""CLIP's vision encoder: transformers' CLIPVisionModel, also inside a CLIPModel.

`ViT.forward_features` applies the final norm to all tokens, transformers only to the pooled CLS
token.
"""

from __future__ import annotations

from configs import ViTConfig
from models.pretrained.layouts import siglip
from models.pretrained.mapping import (
    ACTIVATIONS,
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

TABLE: Table = [
    ("patch_embedding.conv.weight", "embeddings.patch_embedding.weight"),
    ("patch_embedding.cls_token", "embeddings.class_embedding"),
    ("patch_embedding.position_embedding", "embeddings.position_embedding.weight"),
    *weight_and_bias([("pre_norm", "pre_layrnorm")]),  # spelled so in transformers
    *siglip.BLOCKS,
    *siglip.LAST_NORM,
]
DEFAULTS = {"vit_patch_size": 32, "vit_ln_eps": 1e-5}
FIELDS: Fields = [
    (field, key, DEFAULTS.get(field, default)) for field, key, default in siglip.FIELDS
]
OWN = {"vit_cls_flag": True, "vit_pre_norm": True}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def read(config: dict, where: str) -> dict:
    vision = config.get("vision_config", config)
    refuse_unless(vision, {"attention_dropout": 0.0}, where)
    act = read_activation(vision.get("hidden_act", "quick_gelu"), where)
    own = OWN | {"vit_hidden_act": act, "vit_image_mean": MEAN, "vit_image_std": STD}
    return siglip.BASE | read_fields(FIELDS, vision) | own


def write(cfg: ViTConfig) -> dict:
    kind = {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model"}
    return kind | write_fields(FIELDS, cfg) | {
        "hidden_act": ACTIVATIONS[cfg.vit_hidden_act],
        "projection_dim": cfg.vit_hidden_dim,
    }  # fmt: skip


def unsupported_reason(cfg: ViTConfig) -> str:
    """The first field that CLIPVisionModel does not support, "field = value"; "" if none."""
    allowed = OWN | {"vit_n_classes": 0, "vit_pool": ["auto", "cls"]}
    return first_unsupported(cfg, siglip.TRUNK | allowed)


LAYOUT = Layout(
    ("clip", "clip_vision_model"), TABLE, [], ("vision_model.", ""),
    ("*position_ids", "text_model.*", "text_projection.weight", "visual_projection.weight",
     "logit_scale"), read, write, unsupported_reason,
)  # fmt: skip
