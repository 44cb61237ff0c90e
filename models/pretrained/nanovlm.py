"""nanoVLM's own checkpoints: today's layout and the one of its first release, the 222M.

Its images are not normalised, ours are: the difference is folded into the patch convolution. Its
prompts differ, too, and no table can change that: a model from there must learn ours by training.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from configs import VLMConfig, require
from models.pretrained.engine import (
    FUSED,
    ONE_MORE,
    Fields,
    Pair,
    Table,
    expand,
    first_of,
    read_fields,
    refuse_unless,
    write_fields,
)

KINDS = ("weight", "bias")
VISION = ["ln1", "ln2", "attn.out_proj", "mlp.fc1", "mlp.fc2"]
LANGUAGE = [
    "norm1", "norm2", "attn.q_proj", "attn.k_proj", "attn.v_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
]  # fmt: skip
QKV = "vision_encoder.blocks.{i}.attn."
POSITION = "vision_encoder.patch_embedding.position_embedding"
CONV, BIAS = (f"vision_encoder.patch_embedding.conv.{kind}" for kind in KINDS)
EMBEDDING, HEAD = "decoder.token_embedding.weight", "decoder.head.weight"
SAME_NAMES = [
    CONV,
    BIAS,
    *(f"vision_encoder.layer_norm.{kind}" for kind in KINDS),
    *(f"vision_encoder.blocks.{{i}}.{name}.{kind}" for name in VISION for kind in KINDS),
    "MP.proj.weight",
    EMBEDDING,
    "decoder.norm.weight",
    HEAD,
    *(f"decoder.blocks.{{i}}.{name}.weight" for name in LANGUAGE),
]
TABLE: Table = [
    *((name, name) for name in SAME_NAMES),
    (POSITION, POSITION, ONE_MORE),
    *(
        (tuple(f"{QKV}{p}_proj.{kind}" for p in "qkv"), f"{QKV}qkv_proj.{kind}", FUSED)
        for kind in KINDS
    ),
    ("decoder.blocks.{i}.attn.o_proj.weight", "decoder.blocks.{i}.attn.out_proj.weight"),
]
INV_FREQ = "decoder.rotary_embd.inv_freq"  # a buffer that its loader insists on
IGNORE = (INV_FREQ,)

VIT = ["hidden_dim", "inter_dim", "patch_size", "img_size", "n_heads", "n_blocks", "ln_eps"]
LM = ["hidden_dim", "inter_dim", "rms_eps", "re_base", "max_position_embeddings", "vocab_size",
      "n_heads", "n_kv_heads", "n_blocks", "tie_weights", "tokenizer"]  # fmt: skip
NAMES = [f"vit_{name}" for name in VIT] + [f"lm_{name}" for name in LM]
NAMES += ["mp_pixel_shuffle_factor", "max_img_size"]
FIELDS: Fields = [(name, name, None) for name in NAMES]  # it writes all, so none needs a default
SPECIAL = dict(vlm_pad_token_id=0, vlm_bos_token_id=1, vlm_eos_token_id=2)  # SmolLM2's


def is_one(config: Mapping) -> bool:
    """Whether a config.json is nanoVLM's: it has no model_type, but its names."""
    return "vit_hidden_dim" in config and "lm_hidden_dim" in config


def has_image_token(config: Mapping) -> bool:
    """The 222M puts its 49 image embeddings in front of the text, without a token for them."""
    return "vlm_extra_tokens" in config or "mp_image_token_length" in config


def read(config: dict, where: str) -> dict:
    """Its config.json -> the fields of a VLMConfig; the 222M gets one row for an image token."""
    only = {"vit_cls_flag": False, "lm_attn_scaling": 1.0, "vit_dropout": 0.0, "lm_dropout": 0.0}
    refuse_unless(config, only, where)
    missing = [name for name in NAMES if name not in config and name != "max_img_size"]
    require(not missing, f"{where}: fields", missing, "are missing")
    fields = read_fields(FIELDS, config)
    fields["lm_re_base"] = float(fields["lm_re_base"])
    if fields["max_img_size"] is None:
        fields["max_img_size"] = fields["vit_img_size"]
    base = config.get("lm_base_vocab_size", fields["lm_vocab_size"])
    if not has_image_token(config):
        fields["lm_vocab_size"] += 1
    return fields | SPECIAL | {"vlm_image_token_id": base}


def write(cfg: VLMConfig) -> dict:
    """config.json of today's layout. Its tokenizer gets the names it wants for our tokens."""
    tiles = {f"r{r}c{c}": f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)}
    return write_fields(FIELDS, cfg) | {
        "vit_dropout": 0.0,
        "vit_cls_flag": False,
        "vit_model_type": cfg.vit_model_type,
        "lm_base_vocab_size": cfg.lm_vocab_size,
        "extra_token_amount": 0,  # they are in the tokenizer already
        "lm_dropout": 0.0,
        "lm_attn_scaling": 1.0,
        "lm_use_tokens": False,
        "lm_model_type": cfg.lm_model_type,
        "mp_image_token_length": cfg.tokens_per_tile,
        "vlm_extra_tokens": {
            "image_token": "<image>",
            "global_image_token": "<global-img>",
            **tiles,
        },
        "vlm_load_backbone_weights": False,
    }


def misfit(cfg: VLMConfig) -> str:
    """What nanoVLM has no place for beyond what Idefics3 has none for, in words."""
    return first_of(
        {
            "another activation than gelu_tanh": cfg.vit_hidden_act != "gelu_tanh",
            "a bias on queries, keys and values": cfg.lm_qkv_bias,
            "a norm of queries and keys": cfg.lm_qk_norm,
            "blocks without positions": cfg.lm_nope_every,
            "another rope than the default": cfg.lm_rope_type != "default",
            "a head width of its own": cfg.lm_head_width * cfg.lm_n_heads != cfg.lm_hidden_dim,
            "another normalisation than 0.5": {*cfg.vit_image_mean, *cfg.vit_image_std} != {0.5},
        }
    )


def pairs(cfg: VLMConfig) -> list[Pair]:
    """Every tensor of the model, ours and theirs."""
    return expand(TABLE, {"vision_encoder.": cfg.vit_n_blocks, "decoder.": cfg.lm_n_blocks})


def fold(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """From pixels in [0, 1] to ours in [-1, 1]: x = (y + 1) / 2, so W x + b = W/2 y + (b + W/2)."""
    half = tensors[CONV] / 2
    return tensors | {CONV: half, BIAS: tensors[BIAS] + half.sum((1, 2, 3))}


def unfold(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `fold`."""
    weight = tensors[CONV]
    return tensors | {CONV: weight * 2, BIAS: tensors[BIAS] - weight.sum((1, 2, 3))}
