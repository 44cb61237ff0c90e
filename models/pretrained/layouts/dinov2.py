"""DINOv2: transformers' Dinov2Model and Dinov2WithRegistersModel, with either kind of MLP."""

from configs import ViTConfig
from models.pretrained.layouts import siglip, vit
from models.pretrained.mapping import (
    ACTIVATIONS,
    ONE_MORE,
    Family,
    Fields,
    Table,
    first_of,
    read_activation,
    read_fields,
    refuse_unless,
    write_fields,
)

BLOCK = [*vit.ATTENTION, ("ln1", "norm1"), ("ln2", "norm2")]
TABLE: Table = [
    *vit.EMBEDDINGS,
    ("patch_embedding.registers", "embeddings.register_tokens", ONE_MORE),
    *(
        (f"blocks.{{i}}.{ours}.{kind}", f"encoder.layer.{{i}}.{theirs}.{kind}")
        for ours, theirs in BLOCK
        for kind in siglip.KINDS
    ),
    *(
        (f"blocks.{{i}}.scale{n}.scale", f"encoder.layer.{{i}}.layer_scale{n}.lambda1")
        for n in (1, 2)
    ),
]
MLP: Table = [
    (f"blocks.{{i}}.mlp.fc{n}.{kind}", f"encoder.layer.{{i}}.mlp.fc{n}.{kind}")
    for n in (1, 2)
    for kind in siglip.KINDS
]
SWIGLU: Table = [
    (f"blocks.{{i}}.mlp.fc{n}.{kind}", f"encoder.layer.{{i}}.mlp.weights_{name}.{kind}")
    for n, name in ((1, "in"), (2, "out"))
    for kind in siglip.KINDS
]
FIELDS: Fields = [row for row in siglip.FIELDS if row[0] != "vit_inter_dim"] + [
    ("vit_qkv_bias", "qkv_bias", True)
]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


def inter_dim(hidden: int, ratio: float, swiglu: bool) -> int:
    """Width of the MLP; swiglu keeps two thirds of it, rounded up to a multiple of eight."""
    width = int(hidden * ratio)
    return (int(width * 2 / 3) + 7) // 8 * 8 if swiglu else width


def read(config: dict, where: str) -> dict:
    refuse_unless(config, vit.NO_DROPOUT | {"apply_layernorm": True}, where)
    with_registers = config.get("model_type") == "dinov2_with_registers"
    fields = read_fields(FIELDS, {"patch_size": 16 if with_registers else 14} | config)
    swiglu = bool(config.get("use_swiglu_ffn", False))
    act = read_activation(config.get("hidden_act", "gelu"), where)
    width = inter_dim(fields["vit_hidden_dim"], config.get("mlp_ratio", 4), swiglu)
    return siglip.PLAIN | fields | {
        "vit_cls_flag": True,
        "vit_n_registers": config.get("num_register_tokens", 4) if with_registers else 0,
        "vit_layer_scale": True,
        "vit_inter_dim": width,
        "vit_hidden_act": "swiglu" if swiglu else act,
        "vit_image_mean": MEAN,
        "vit_image_std": STD,
    }  # fmt: skip


def _ratio(cfg: ViTConfig) -> int:
    """Their mlp_ratio: a whole number that gives our width, 0 if there is none."""
    is_swiglu = cfg.vit_hidden_act == "swiglu"
    widths = {inter_dim(cfg.vit_hidden_dim, ratio, is_swiglu): ratio for ratio in range(1, 17)}
    return widths.get(cfg.vit_inter_dim, 0)


def write(cfg: ViTConfig) -> dict:
    kind = {"architectures": ["Dinov2Model"], "model_type": "dinov2"}
    if cfg.vit_n_registers:
        kind = {
            "architectures": ["Dinov2WithRegistersModel"],
            "model_type": "dinov2_with_registers",
            "num_register_tokens": cfg.vit_n_registers,
        }
    is_swiglu = cfg.vit_hidden_act == "swiglu"
    return kind | vit.NO_DROPOUT | {
        "hidden_act": "gelu" if is_swiglu else ACTIVATIONS[cfg.vit_hidden_act],
        "use_swiglu_ffn": is_swiglu,
        "mlp_ratio": _ratio(cfg),
        **write_fields(FIELDS, cfg),
    }  # fmt: skip


def unsupported_reason(cfg: ViTConfig) -> str:
    return first_of(
        {
            "no CLS token": not cfg.vit_cls_flag,
            "no layer scales": not cfg.vit_layer_scale,
            "CLIP's first norm": cfg.vit_pre_norm,
            "a classifier": cfg.vit_n_classes > 0,
            "another pool than CLS": cfg.vit_pool not in ("auto", "cls"),
            "an MLP whose width is no multiple of its input's": not _ratio(cfg),
        }
    )


PREFIXES = ("", "dinov2.", "dinov2_with_registers.")
IGNORE = ("*mask_token", "classifier.*")
TYPES = ("dinov2", "dinov2_with_registers")
FAMILY = Family(
    TYPES, TABLE + MLP, [], PREFIXES, IGNORE, read, write,
    lambda cfg: "swiglu" if cfg.vit_hidden_act == "swiglu" else unsupported_reason(cfg),
)  # fmt: skip
FAMILY_SWIGLU = Family(
    TYPES, TABLE + SWIGLU, [], PREFIXES, IGNORE, read, write,
    lambda cfg: unsupported_reason(cfg) if cfg.vit_hidden_act == "swiglu" else "no swiglu",
)  # fmt: skip
