"""SigLIP and fixed-resolution SigLIP2: transformers' SiglipVisionModel, also inside a SiglipModel.

Idefics3's vision encoder uses the same names.
"""

from __future__ import annotations

from configs import ViTConfig
from models.pretrained.mapping import (
    ACTIVATIONS,
    FUSED_QKV,
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

KINDS = ("weight", "bias")
BLOCKS: Table = weight_and_bias(
    [
        ("ln1", "layer_norm1"),
        ("ln2", "layer_norm2"),
        ("attn.q_proj", "self_attn.q_proj"),
        ("attn.k_proj", "self_attn.k_proj"),
        ("attn.v_proj", "self_attn.v_proj"),
        ("attn.out_proj", "self_attn.out_proj"),
        ("mlp.fc1", "mlp.fc1"),
        ("mlp.fc2", "mlp.fc2"),
    ],
    "blocks.{i}.",
    "encoder.layers.{i}.",
)
LAST_NORM: Table = weight_and_bias([("layer_norm", "post_layernorm")])
TABLE: Table = [
    ("patch_embedding.conv.weight", "embeddings.patch_embedding.weight"),
    ("patch_embedding.conv.bias", "embeddings.patch_embedding.bias"),
    ("patch_embedding.position_embedding", "embeddings.position_embedding.weight"),
    *BLOCKS,
    *LAST_NORM,
]
# The attention pooling head, which only vit_pool = "map" uses.
HEAD: Table = [
    ("map_pool.probe", "head.probe"),
    *(
        (tuple(f"map_pool.attn.{p}_proj.{kind}" for p in "qkv"),
         f"head.attention.in_proj_{kind}", FUSED_QKV)
        for kind in KINDS
    ),
    *weight_and_bias(
        [("attn.out_proj", "attention.out_proj"), ("ln", "layernorm"), ("mlp.fc1", "mlp.fc1"),
         ("mlp.fc2", "mlp.fc2")],
        "map_pool.", "head.",
    ),
]  # fmt: skip
CLASSIFIER: Table = weight_and_bias([("head", "classifier")])
IGNORE = ("*position_ids",)

FIELDS: Fields = [
    ("vit_hidden_dim", "hidden_size", 768),
    ("vit_inter_dim", "intermediate_size", 3072),
    ("vit_n_blocks", "num_hidden_layers", 12),
    ("vit_n_heads", "num_attention_heads", 12),
    ("vit_n_channels", "num_channels", 3),
    ("vit_img_size", "image_size", 224),
    ("vit_patch_size", "patch_size", 16),
    ("vit_ln_eps", "layer_norm_eps", 1e-6),
]
# Fields without a key in config.json; each of the other encoders changes some of them.
ARCHITECTURE = dict(
    vit_cls_flag=False, vit_n_registers=0, vit_pre_norm=False, vit_layer_scale=False,
    vit_qkv_bias=True,
)  # fmt: skip
BASE = ARCHITECTURE | dict(
    vit_n_classes=0, vit_image_mean=(0.5, 0.5, 0.5), vit_image_std=(0.5, 0.5, 0.5)
)
TRUNK = ARCHITECTURE | {"vit_hidden_act": list(ACTIVATIONS)}


def read_classes(config: dict) -> dict:
    """Number and names of the classes; without names two, as is transformers' default."""
    names = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    names = [str(names[key]) for key in sorted(names, key=int)]
    # Published ImageNet checkpoints give several classes the same name.
    labels = names if len(set(names)) == len(names) else [f"{i} {n}" for i, n in enumerate(names)]
    return {"vit_n_classes": len(labels), "vit_labels": labels}


def write_classes(cfg: ViTConfig) -> dict:
    labels = cfg.vit_labels or tuple(map(str, range(cfg.vit_n_classes)))
    id2label = {str(i): label for i, label in enumerate(labels)}
    return {"id2label": id2label, "label2id": {label: i for i, label in enumerate(labels)}}


def read(config: dict, where: str) -> dict:
    vision = config.get("vision_config", config)
    act = vision.get("hidden_act", "gelu_pytorch_tanh")
    refuse_unless(vision, {"attention_dropout": 0.0}, where)
    fields = read_fields(FIELDS, vision)
    classifies = "SiglipForImageClassification" in (config.get("architectures") or ())
    found = read_classes(config) if classifies else {}
    return BASE | fields | {"vit_hidden_act": read_activation(act, where)} | found


def write_sizes(cfg: ViTConfig) -> dict:
    """Every size under its key; Idefics3's vision_config uses the same keys."""
    act = ACTIVATIONS[cfg.vit_hidden_act]
    return write_fields(FIELDS, cfg) | {"hidden_act": act, "attention_dropout": 0.0}


def write(cfg: ViTConfig) -> dict:
    has_head = cfg.vit_pool == "map"
    kind = {"architectures": ["SiglipVisionModel"], "model_type": "siglip_vision_model"}
    return kind | {"vision_use_head": has_head} | write_sizes(cfg)


def write_classifier(cfg: ViTConfig) -> dict:
    kind = {"architectures": ["SiglipForImageClassification"], "model_type": "siglip"}
    return kind | write_classes(cfg) | {
        "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False}
        | write_sizes(cfg)
    }  # fmt: skip


def unsupported_reason(cfg: ViTConfig) -> str:
    """The first field that SiglipVisionModel does not support, "field = value"; "" if none."""
    allowed = {"vit_n_classes": 0, "vit_pool": ["auto", "none", "map"]}
    return first_unsupported(cfg, TRUNK | allowed)


def unsupported_classifier(cfg: ViTConfig) -> str:
    """`unsupported_reason` of SiglipForImageClassification."""
    reason = first_unsupported(cfg, TRUNK | {"vit_pooling": "mean", "vit_head": "linear"})
    return reason or ("" if cfg.vit_n_classes else "vit_n_classes = 0")


LAYOUT = Layout(
    ("siglip", "siglip_vision_model"), TABLE + HEAD, [], ("vision_model.", ""),
    (*IGNORE, "head.*", "vision_model.head.*", "text_model.*", "logit_scale", "logit_bias"),
    read, write, unsupported_reason,
)  # fmt: skip
LAYOUT_CLASSIFIER = Layout(
    ("siglip",), TABLE, CLASSIFIER, ("vision_model.", ""), (*IGNORE, "vision_model.head.*"),
    read, write_classifier, unsupported_classifier,
)  # fmt: skip
