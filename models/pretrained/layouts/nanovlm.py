"""nanoVLM's checkpoints: the current layout and that of its first release, the 222M model.

nanoVLM does not normalise images, picoVLM does; the patch convolution absorbs the difference. The
prompt formats differ, too, so an imported model needs further training on picoVLM's.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from config_tools import require
from configs import VLMConfig
from models.pretrained.mapping import (
    FUSED_QKV,
    UNSQUEEZED,
    Fields,
    Pair,
    Table,
    expand,
    extend_rows,
    first_unsupported,
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
    (POSITION, POSITION, UNSQUEEZED),
    *(
        (tuple(f"{QKV}{p}_proj.{kind}" for p in "qkv"), f"{QKV}qkv_proj.{kind}", FUSED_QKV)
        for kind in KINDS
    ),
    ("decoder.blocks.{i}.attn.o_proj.weight", "decoder.blocks.{i}.attn.out_proj.weight"),
]
INV_FREQ = "decoder.rotary_embd.inv_freq"  # a buffer that nanoVLM's loader requires
IGNORE = (INV_FREQ,)

VIT = ["hidden_dim", "inter_dim", "patch_size", "img_size", "n_heads", "n_blocks", "ln_eps"]
LM = ["hidden_dim", "inter_dim", "rms_eps", "re_base", "max_position_embeddings", "vocab_size",
      "n_heads", "n_kv_heads", "n_blocks", "tie_weights", "tokenizer"]  # fmt: skip
NAMES = [f"vit_{name}" for name in VIT] + [f"lm_{name}" for name in LM]
NAMES += ["mp_pixel_shuffle_factor", "max_img_size"]
FIELDS: Fields = [(name, name, None) for name in NAMES]  # nanoVLM writes all of them
START, END = 1, 2  # SmolLM2's <|im_start|> and <|im_end|>
# Offsets of picoVLM's tokens after the base vocabulary, as in SmolVLM: a gap precedes the last one.
GLOBAL, TILES, IMAGE, END_OF_TURN, N_NEW = 0, 1, 38, 127, 128


def is_config(config: Mapping) -> bool:
    """Whether a config.json is nanoVLM's, judged by field names because it has no model_type."""
    return "vit_hidden_dim" in config and "lm_hidden_dim" in config


def read(config: dict, special_ids: dict[str, int], where: str) -> dict:
    """nanoVLM's config.json -> fields of a VLMConfig. Raises `InputError`.

    `special_ids` are the ids of picoVLM's special tokens if the tokenizer has them, as in an export
    by picoVLM. Otherwise the vocabulary is that of `replace_tokens`.
    """
    no_dropout = {"vit_dropout": 0.0, "lm_dropout": 0.0}
    refuse_unless(config, no_dropout | {"vit_cls_flag": False, "lm_attn_scaling": 1.0}, where)
    missing = [name for name in NAMES if name not in config and name != "max_img_size"]
    require(not missing, f"{where}: missing fields", missing, "nanoVLM writes all of them")
    fields = read_fields(FIELDS, config)
    fields["lm_re_base"] = float(fields["lm_re_base"])
    if fields["max_img_size"] is None:
        fields["max_img_size"] = fields["vit_img_size"]
    if special_ids:
        return fields | special_ids
    base = _base(config)
    return fields | {
        "lm_vocab_size": base + N_NEW,
        "vlm_pad_token_id": END,
        "vlm_bos_token_id": START,
        "vlm_eos_token_id": base + END_OF_TURN,
        "vlm_image_token_id": base + IMAGE,
    }


def _base(config: Mapping) -> int:
    """Vocabulary size without added tokens; the first release adds none."""
    return config.get("lm_base_vocab_size", config["lm_vocab_size"])


def replace_tokens(table: Tensor, config: Mapping) -> Tensor:
    """nanoVLM's embedding or head [V, D] -> [base + 128, D], with SmolVLM's added tokens.

    Tokens with the same meaning keep their row, the end of turn copies <|im_end|>, and the others
    are the mean.
    """
    base = _base(config)
    if len(table) != config["lm_vocab_size"]:
        return table  # misshapen: import_tensors reports it
    old = {name: base + i for i, name in enumerate(config.get("vlm_extra_tokens", {}))}
    new = extend_rows(table[:base], base + N_NEW)
    same = {"global_image_token": GLOBAL, "image_token": IMAGE}
    same |= {f"r{r}c{c}": TILES + 6 * (r - 1) + c - 1 for r in range(1, 7) for c in range(1, 7)}
    for name, offset in same.items():
        if old.get(name, len(table)) < len(table):
            new[base + offset] = table[old[name]]
    new[base + END_OF_TURN] = table[END]
    return new


def write(cfg: VLMConfig) -> dict:
    """config.json of the current layout; vlm_extra_tokens maps nanoVLM's names to our tokens."""
    tiles = {f"r{r}c{c}": f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)}
    return write_fields(FIELDS, cfg) | {
        "vit_dropout": 0.0,
        "vit_cls_flag": False,
        "vit_model_type": cfg.vit_model_type,
        "lm_base_vocab_size": cfg.lm_vocab_size,
        "extra_token_amount": 0,  # the tokenizer has them already
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
    """The first field that nanoVLM does not support but Idefics3 does; "" if none."""
    allowed = {
        "vit_hidden_act": "gelu_tanh",
        "lm_qkv_bias": False,
        "lm_qk_norm": False,
        "lm_nope_every": 0,
        "lm_rope_type": "default",
        "lm_head_dim": [None, cfg.lm_hidden_dim / cfg.lm_n_heads],
        "vit_image_mean": (0.5, 0.5, 0.5),
        "vit_image_std": (0.5, 0.5, 0.5),
    }
    return first_unsupported(cfg, allowed)


def pairs(cfg: VLMConfig) -> list[Pair]:
    """Every parameter of the model and its key in nanoVLM's files."""
    return expand(TABLE, {"vision_encoder.": cfg.vit_n_blocks, "decoder.": cfg.lm_n_blocks})


def fold(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convolution of pixels x in [0, 1] -> of y = 2 x - 1: W x + b = W/2 y + (b + sum W/2)."""
    half = tensors[CONV] / 2
    return tensors | {CONV: half, BIAS: tensors[BIAS] + half.sum((1, 2, 3))}


def unfold(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `fold`."""
    weight = tensors[CONV]
    return tensors | {CONV: weight * 2, BIAS: tensors[BIAS] - weight.sum((1, 2, 3))}
