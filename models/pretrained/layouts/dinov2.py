"""DINOv2: transformers' Dinov2Model and Dinov2WithRegistersModel, with either kind of MLP."""

from __future__ import annotations

from configs import ViTConfig
from models.pretrained.layouts import siglip, vit
from models.pretrained.mapping import (
    ACTIVATIONS,
    UNSQUEEZED,
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

PARAM, KEY = "blocks.{i}.", "encoder.layer.{i}."
TABLE: Table = [
    *vit.EMBEDDINGS,
    ("patch_embedding.registers", "embeddings.register_tokens", UNSQUEEZED),
    *weight_and_bias([*vit.ATTENTION, ("ln1", "norm1"), ("ln2", "norm2")], PARAM, KEY),
    *((f"{PARAM}scale{n}.scale", f"{KEY}layer_scale{n}.lambda1") for n in (1, 2)),
]
MLP = weight_and_bias([("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2")], PARAM, KEY)
SWIGLU = weight_and_bias(
    [("mlp.fc1", "mlp.weights_in"), ("mlp.fc2", "mlp.weights_out")], PARAM, KEY
)
FIELDS: Fields = [row for row in siglip.FIELDS if row[0] != "vit_inter_dim"] + [
    ("vit_qkv_bias", "qkv_bias", True)
]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
ALLOWED = vit.OWN | {"vit_layer_scale": True, "vit_pre_norm": False, "vit_n_classes": 0}


def inter_dim(hidden: int, ratio: float, swiglu: bool) -> int:
    """Width of the MLP; SwiGLU uses two thirds of it, rounded up to a multiple of eight."""
    width = int(hidden * ratio)
    return (int(width * 2 / 3) + 7) // 8 * 8 if swiglu else width


def read(config: dict, where: str) -> dict:
    refuse_unless(config, vit.NO_DROPOUT | {"apply_layernorm": True}, where)
    with_registers = config.get("model_type") == "dinov2_with_registers"
    fields = read_fields(FIELDS, {"patch_size": 16 if with_registers else 14} | config)
    swiglu = bool(config.get("use_swiglu_ffn", False))
    act = read_activation(config.get("hidden_act", "gelu"), where)
    width = inter_dim(fields["vit_hidden_dim"], config.get("mlp_ratio", 4), swiglu)
    return siglip.BASE | fields | {
        "vit_cls_flag": True,
        "vit_n_registers": config.get("num_register_tokens", 4) if with_registers else 0,
        "vit_layer_scale": True,
        "vit_inter_dim": width,
        "vit_hidden_act": "swiglu" if swiglu else act,
        "vit_image_mean": MEAN,
        "vit_image_std": STD,
    }  # fmt: skip


def _mlp_ratio(cfg: ViTConfig) -> int:
    """The integer mlp_ratio that gives `vit_inter_dim`; 0 if there is none."""
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
        "mlp_ratio": _mlp_ratio(cfg),
        **write_fields(FIELDS, cfg),
    }  # fmt: skip


def unsupported_reason(cfg: ViTConfig) -> str:
    """The first field that Dinov2Model does not support, "field = value"; "" if none.

    A SwiGLU MLP has its own layout. The MLP width must belong to an integer mlp_ratio.
    """
    reason = first_unsupported(cfg, ALLOWED | {"vit_hidden_act": list(ACTIVATIONS)})
    return reason or _unsupported_width(cfg)


def unsupported_swiglu(cfg: ViTConfig) -> str:
    """`unsupported_reason` of the layout with a SwiGLU MLP."""
    reason = first_unsupported(cfg, ALLOWED | {"vit_hidden_act": "swiglu"})
    return reason or _unsupported_width(cfg)


def _unsupported_width(cfg: ViTConfig) -> str:
    return "" if _mlp_ratio(cfg) else f"vit_inter_dim = {cfg.vit_inter_dim}"


PREFIXES = ("", "dinov2.", "dinov2_with_registers.")
IGNORE = ("*mask_token", "classifier.*")
TYPES = ("dinov2", "dinov2_with_registers")
LAYOUT = Layout(TYPES, TABLE + MLP, [], PREFIXES, IGNORE, read, write, unsupported_reason)
LAYOUT_SWIGLU = Layout(TYPES, TABLE + SWIGLU, [], PREFIXES, IGNORE, read, write, unsupported_swiglu)
