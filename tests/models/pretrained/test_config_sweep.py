"""Every field of transformers' backbone configs, varied: equal outputs, or refused by name."""

from __future__ import annotations

import copy
import json
import logging
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers as hf

from config_tools import InputError
from configs import LMConfig
from models.language_model import LanguageModel
from models.pretrained.load import open_vit

DECODER = dict(
    vocab_size=101, hidden_size=48, intermediate_size=72, num_hidden_layers=5,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-3,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
SIZES = dict(
    hidden_size=32, num_attention_heads=2, num_hidden_layers=2, image_size=16, patch_size=4,
    layer_norm_eps=1e-3,
)  # fmt: skip
WIDE = dict(SIZES, intermediate_size=56)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
DECODERS = {
    "llama": hf.LlamaConfig(**DECODER),
    "qwen2": hf.Qwen2Config(**DECODER),
    "qwen3": hf.Qwen3Config(**DECODER, head_dim=20),
    "smollm3": hf.SmolLM3Config(**DECODER),
}
ENCODERS = {
    "siglip": (hf.SiglipVisionModel, hf.SiglipVisionConfig(**WIDE)),
    "clip": (hf.CLIPVisionModel, hf.CLIPVisionConfig(**WIDE)),
    "vit": (hf.ViTModel, hf.ViTConfig(**WIDE)),
    "dinov2": (hf.Dinov2Model, hf.Dinov2Config(**SIZES, mlp_ratio=2)),
    "dinov2 with registers": (
        hf.Dinov2WithRegistersModel,
        hf.Dinov2WithRegistersConfig(**SIZES, num_register_tokens=3),
    ),
}
ROPES = [
    dict(rope_type="default", rope_theta=777.0), dict(rope_theta=50.0),
    dict(rope_type="linear", factor=4.0), dict(type="linear", factor=2.0), LLAMA3,
    LLAMA3 | dict(original_max_position_embeddings=32, rope_theta=500.0), YARN,
    dict(rope_type="dynamic", factor=4.0),
    dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5),
]  # fmt: skip
SLIDING = ["sliding_attention"] * 2 + ["full_attention"] * 3
# Key -> legal values; keys that are not here are varied by the type of their value.
VALUES: dict[str, list] = {
    "hidden_act": ["relu", "gelu", "gelu_new", "quick_gelu", "gelu_pytorch_tanh", "silu"],
    "rope_parameters": ROPES, "rope_scaling": ROPES, "rope_theta": [77.0],
    "partial_rotary_factor": [0.5], "num_key_value_heads": [1, 4, None],
    "head_dim": [8, 12, 16, 20, None], "no_rope_layer_interval": [2, 3], "max_window_layers": [1],
    "no_rope_layers": [[1, 0, 1, 0, 1], [0, 1, 1, 1, 1], [1] * 5, [1, 1, 0, 0, 1]],
    "layer_types": [["full_attention"] * 5], "sliding_window": [4], "vocab_size": [120],
    "id2label": [{0: "a", 1: "b", 2: "c"}], "out_indices": [[1]], "out_features": [["stage1"]],
    "torch_dtype": ["bfloat16"], "pooler_act": ["relu"], "num_channels": [1], "image_size": [24],
    "patch_size": [8], "mlp_ratio": [3, 1], "num_attention_heads": [2, 8], "hidden_size": [64],
    "num_hidden_layers": [3], "rms_norm_eps": [0.1], "layer_norm_eps": [0.1],
}  # fmt: skip
TOGETHER = [  # keys that mean something only beside others
    dict(rope_scaling=LLAMA3, rope_parameters=None),
    dict(rope_scaling=YARN, rope_parameters=dict(rope_type="default", rope_theta=1e4)),
    dict(rope_parameters=LLAMA3, original_max_position_embeddings=16),
    dict(rope_theta=77.0, rope_parameters=None), dict(partial_rotary_factor=0.5, rope_theta=77.0),
    dict(sliding_window=4, layer_types=SLIDING), dict(sliding_window=4, use_sliding_window=True),
]  # fmt: skip
NOT_VARIED = {"model_type", "architectures", "_name_or_path", "transformers_version", "label2id",
              "problem_type", "stage_names", "dtype"}  # fmt: skip
IDS = torch.randint(3, 100, (2, 50), generator=torch.Generator().manual_seed(3))


def variants(config: hf.PretrainedConfig, together: list[dict]) -> list[dict]:
    """Changes of a config: one key each, and the combinations of `together`."""
    values = config.to_dict()
    extra = {"rope_scaling", "rope_theta", "partial_rotary_factor", "layer_types"} & set(VALUES)
    found: list[dict] = []
    for key in [*values, *(extra if together else ())]:
        old = values.get(key)
        if key in VALUES:
            new = VALUES[key]
        elif isinstance(old, bool):
            new = [not old]
        elif isinstance(old, int | float):
            new = [old + 1, old * 2 + 1] if isinstance(old, int) else [0.5, old * 2 + 0.1]
        else:
            new = [1, True] if old is None else []
        if key not in NOT_VARIED:
            found += [{key: value} for value in new if value != old]
    return found + together


def images(config) -> torch.Tensor:
    shape = (2, config.num_channels, config.image_size, config.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def features(model: torch.nn.Module) -> torch.Tensor:
    """All tokens after the last norm, which transformers' CLIP applies to the CLS token only."""
    hidden = model(images(model.config)).last_hidden_state
    is_clip = model.config.model_type.startswith("clip")
    return model.post_layernorm(hidden) if is_clip else hidden


@torch.no_grad()
def outcome(folder: Path, config, changes: dict, cls: type, randomise) -> str:
    """match, refused, illegal (for transformers), or what is wrong."""
    edited = {k: v for k, v in config.to_dict().items() if k not in ("dtype", "architectures")}
    edited = {k: v for k, v in (edited | changes).items() if v is not None or k not in changes}
    is_decoder = cls is hf.AutoModelForCausalLM
    try:  # weights of the varied sizes, then the edited config.json as it is
        made = type(config).from_dict(copy.deepcopy(edited))
        model = cls.from_config(made) if is_decoder else cls(made)
        randomise(model).save_pretrained(folder)
        edited["architectures"] = [type(model).__name__]
        (folder / "config.json").write_text(json.dumps(edited))
        model = cls.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        reference = model(IDS).logits if is_decoder else features(model)
    except Exception:  # whatever transformers says, it cannot be loaded there
        return "illegal"
    try:
        if is_decoder:
            cfg = LMConfig(lm_vocab_size=3, lm_model_type=str(folder))
            lm = LanguageModel.from_pretrained(cfg).eval()
            output = lm.logits(lm(lm.token_embedding(IDS)))
        else:
            output = open_vit(str(folder)).forward_features(images(model.config))
    except InputError as error:
        assert str(folder) in str(error) and "\n" not in str(error), error
        return "refused"
    difference = (output - reference).abs().max() / reference.abs().max()
    return "match" if difference < 1e-5 else f"differs by {difference:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*DECODERS, *ENCODERS])
def test_every_field_matches_transformers_or_is_refused(kind, tmp_path, randomise_all):
    logging.getLogger("transformers").setLevel(logging.CRITICAL)
    cls, config = ENCODERS.get(kind, (hf.AutoModelForCausalLM, DECODERS.get(kind)))
    found = {}
    for i, changes in enumerate(variants(config, TOGETHER if kind in DECODERS else [])):
        folder = tmp_path / str(i)
        folder.mkdir()
        found[str(changes)] = outcome(folder, config, changes, cls, randomise_all)
    counts = Counter(found.values())
    wrong = {k: v for k, v in found.items() if v not in ("match", "refused", "illegal")}
    assert not wrong
    assert counts["match"] > 15 and counts["illegal"] < len(found) / 5
    print(f"{kind}: {dict(counts)}")
