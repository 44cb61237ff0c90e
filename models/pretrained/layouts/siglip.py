"""SigLIP and fixed-resolution SigLIP2: transformers' SiglipVisionModel, or the eyes of SiglipModel.

Idefics3's encoder has the same names.
"""

from configs import ViTConfig
from models.pretrained.mapping import (
    ACTIVATIONS,
    FUSED,
    Family,
    Fields,
    Table,
    first_of,
    read_activation,
    read_fields,
    refuse_unless,
    write_fields,
)

KINDS = ("weight", "bias")
BLOCK = [
    ("ln1", "layer_norm1"),
    ("ln2", "layer_norm2"),
    ("attn.q_proj", "self_attn.q_proj"),
    ("attn.k_proj", "self_attn.k_proj"),
    ("attn.v_proj", "self_attn.v_proj"),
    ("attn.out_proj", "self_attn.out_proj"),
    ("mlp.fc1", "mlp.fc1"),
    ("mlp.fc2", "mlp.fc2"),
]
BLOCKS: Table = [
    (f"blocks.{{i}}.{ours}.{kind}", f"encoder.layers.{{i}}.{theirs}.{kind}")
    for ours, theirs in BLOCK
    for kind in KINDS
]
TABLE: Table = [
    ("patch_embedding.conv.weight", "embeddings.patch_embedding.weight"),
    ("patch_embedding.conv.bias", "embeddings.patch_embedding.bias"),
    ("patch_embedding.position_embedding", "embeddings.position_embedding.weight"),
    *BLOCKS,
    *((f"layer_norm.{kind}", f"post_layernorm.{kind}") for kind in KINDS),
]
# The pooling head, asked for by vit_pool = map alone.
HEAD: Table = [
    ("map_pool.probe", "head.probe"),
    *(
        (tuple(f"map_pool.attn.{p}_proj.{kind}" for p in "qkv"),
         f"head.attention.in_proj_{kind}", FUSED)
        for kind in KINDS
    ),
    *(
        (f"map_pool.{ours}.{kind}", f"head.{theirs}.{kind}")
        for ours, theirs in (("attn.out_proj", "attention.out_proj"), ("ln", "layernorm"),
                             ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2"))
        for kind in KINDS
    ),
]  # fmt: skip
CLASSIFIER: Table = [(f"head.{kind}", f"classifier.{kind}") for kind in KINDS]
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
# What makes an encoder this one and none of its relatives.
PLAIN = dict(
    vit_cls_flag=False, vit_n_registers=0, vit_pre_norm=False, vit_layer_scale=False,
    vit_qkv_bias=True, vit_n_classes=0,
    vit_image_mean=(0.5, 0.5, 0.5), vit_image_std=(0.5, 0.5, 0.5),
)  # fmt: skip


def classes(config: dict) -> dict:
    """Number and names of the classes; their class's default is two."""
    names = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    names = [str(names[key]) for key in sorted(names, key=int)]
    # Published checkpoints name some of ImageNet's classes alike.
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
    found = classes(config) if classifies else {}
    return PLAIN | fields | {"vit_hidden_act": read_activation(act, where)} | found


def sizes(cfg: ViTConfig) -> dict:
    """Every size by their key, as Idefics3 writes them too."""
    act = ACTIVATIONS[cfg.vit_hidden_act]
    return write_fields(FIELDS, cfg) | {"hidden_act": act, "attention_dropout": 0.0}


def write(cfg: ViTConfig) -> dict:
    has_head = cfg.vit_pool == "map"
    kind = {"architectures": ["SiglipVisionModel"], "model_type": "siglip_vision_model"}
    return kind | {"vision_use_head": has_head} | sizes(cfg)


def write_classifier(cfg: ViTConfig) -> dict:
    kind = {"architectures": ["SiglipForImageClassification"], "model_type": "siglip"}
    return kind | write_classes(cfg) | {
        "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False}
        | sizes(cfg)
    }  # fmt: skip


def unsupported_reason(cfg: ViTConfig) -> str:
    """What a SigLIP-type encoder has no place for, in words."""
    return unsupported_trunk(cfg) or first_of(
        {"a classifier": cfg.vit_n_classes > 0, "pooling by mean": cfg.vit_pool == "mean"}
    )


def unsupported_classifier(cfg: ViTConfig) -> str:
    return unsupported_trunk(cfg) or first_of(
        {
            "an encoder alone": not cfg.vit_n_classes,
            "another pool than the mean": cfg.vit_pooling != "mean",
            "a head with a hidden layer": cfg.vit_head != "linear",
        }
    )


def unsupported_trunk(cfg: ViTConfig) -> str:
    return first_of(
        {
            "a CLS token": cfg.vit_cls_flag,
            "registers": cfg.vit_n_registers > 0,
            "CLIP's first norm": cfg.vit_pre_norm,
            "layer scales": cfg.vit_layer_scale,
            "an attention without biases": not cfg.vit_qkv_bias,
            "swiglu": cfg.vit_hidden_act == "swiglu",
        }
    )


FAMILY = Family(
    ("siglip", "siglip_vision_model"), TABLE + HEAD, [], ("vision_model.", ""),
    (*IGNORE, "head.*", "vision_model.head.*", "text_model.*", "logit_scale", "logit_bias"),
    read, write, unsupported_reason,
)  # fmt: skip
FAMILY_CLASSIFIER = Family(
    ("siglip",), TABLE, CLASSIFIER, ("vision_model.", ""), (*IGNORE, "vision_model.head.*"),
    read, write_classifier, unsupported_classifier,
)  # fmt: skip
