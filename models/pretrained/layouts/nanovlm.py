"""nanoVLM's own checkpoints: today's layout and the one of its first release, the 222M.

Its images are not normalised, ours are: the difference is folded into the patch convolution. Its
prompts differ, too, which no table can change: a model from there learns ours by further training.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from config_tools import require
from configs import VLMConfig
from models.pretrained.mapping import (
    FUSED,
    ONE_MORE,
    Fields,
    Pair,
    Table,
    expand,
    extend_rows,
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
START, END = 1, 2  # SmolLM2's <|im_start|> and <|im_end|>
# Our tokens behind its base vocabulary, in SmolVLM's order and with its gap before the last.
GLOBAL, TILES, IMAGE, END_OF_TURN, N_NEW = 0, 1, 38, 127, 128


def is_one(config: Mapping) -> bool:
    """Whether a config.json is nanoVLM's: it has no model_type, but its names."""
    return "vit_hidden_dim" in config and "lm_hidden_dim" in config


def read(config: dict, where: str) -> dict:
    """Its config.json -> the fields of a VLMConfig, with SmolVLM's tokens in place of its own."""
    only = {"vit_cls_flag": False, "lm_attn_scaling": 1.0, "vit_dropout": 0.0, "lm_dropout": 0.0}
    refuse_unless(config, only, where)
    missing = [name for name in NAMES if name not in config and name != "max_img_size"]
    require(not missing, f"{where}: fields", missing, "are missing")
    fields = read_fields(FIELDS, config)
    fields["lm_re_base"] = float(fields["lm_re_base"])
    if fields["max_img_size"] is None:
        fields["max_img_size"] = fields["vit_img_size"]
    base = _base(config)
    return fields | {
        "lm_vocab_size": base + N_NEW,
        "vlm_pad_token_id": END,
        "vlm_bos_token_id": START,
        "vlm_eos_token_id": base + END_OF_TURN,
        "vlm_image_token_id": base + IMAGE,
    }


def _base(config: Mapping) -> int:
    """Rows of the tokenizer it started from; the 222M has no others."""
    return config.get("lm_base_vocab_size", config["lm_vocab_size"])


def swap_tokens(table: Tensor, config: Mapping) -> Tensor:
    """Its embedding or head -> one with SmolVLM's tokens behind the base vocabulary.

    Those that mean the same keep their row, the end of turn gets that of <|im_end|>, others the
    mean.
    """
    base = _base(config)
    if len(table) != config["lm_vocab_size"]:
        return table  # misshapen, as will be found
    theirs = {name: base + i for i, name in enumerate(config.get("vlm_extra_tokens", {}))}
    new = extend_rows(table[:base], base + N_NEW)
    same = {"global_image_token": GLOBAL, "image_token": IMAGE}
    same |= {f"r{r}c{c}": TILES + 6 * (r - 1) + c - 1 for r in range(1, 7) for c in range(1, 7)}
    for name, place in same.items():
        if theirs.get(name, len(table)) < len(table):
            new[base + place] = table[theirs[name]]
    new[base + END_OF_TURN] = table[END]
    return new


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


def unsupported_reason(cfg: VLMConfig) -> str:
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
