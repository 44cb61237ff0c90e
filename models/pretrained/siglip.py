"""SigLIP and fixed-resolution SigLIP2: transformers' SiglipVisionModel, or the eyes of SiglipModel.

Idefics3's encoder has the same names.
"""

from configs import ViTConfig
from models.pretrained.engine import (
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


def read(config: dict, where: str) -> dict:
    vision = config.get("vision_config", config)
    act = vision.get("hidden_act", "gelu_pytorch_tanh")
    refuse_unless(vision, {"attention_dropout": 0.0}, where)
    fields = read_fields(FIELDS, vision)
    return PLAIN | fields | {"vit_hidden_act": read_activation(act, where)}


def sizes(cfg: ViTConfig) -> dict:
    """Every size by their key, as Idefics3 writes them too."""
    act = ACTIVATIONS[cfg.vit_hidden_act]
    return write_fields(FIELDS, cfg) | {"hidden_act": act, "attention_dropout": 0.0}


def write(cfg: ViTConfig) -> dict:
    has_head = cfg.vit_pool == "map"
    kind = {"architectures": ["SiglipVisionModel"], "model_type": "siglip_vision_model"}
    return kind | {"vision_use_head": has_head} | sizes(cfg)


def misfit(cfg: ViTConfig) -> str:
    """What a SigLIP-type encoder has no place for, in words."""
    return first_of(
        {
            "a CLS token": cfg.vit_cls_flag,
            "registers": cfg.vit_n_registers > 0,
            "CLIP's first norm": cfg.vit_pre_norm,
            "layer scales": cfg.vit_layer_scale,
            "an attention without biases": not cfg.vit_qkv_bias,
            "swiglu": cfg.vit_hidden_act == "swiglu",
            "a classifier": cfg.vit_n_classes > 0,
            "pooling by mean": cfg.vit_pool == "mean",
        }
    )


FAMILY = Family(
    ("siglip", "siglip_vision_model"), TABLE + HEAD, [], ("vision_model.", ""),
    (*IGNORE, "head.*", "vision_model.head.*", "text_model.*", "logit_scale", "logit_bias"),
    read, write, misfit,
)  # fmt: skip
