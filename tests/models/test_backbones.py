"""Encoders and decoders of transformers' real classes: in and out again, tensor by tensor."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from configs import PRESETS, InputError, LMConfig, ViTConfig
from models.backbones import FAMILIES
from models.language_model import LanguageModel
from models.pretrained import llama
from models.vision_language_model import VisionLanguageModel
from models.vision_transformer import ViT

# Large epsilons make a wrong one visible; sizes differ wherever they may.
SIZES = dict(
    hidden_size=32, num_attention_heads=2, num_hidden_layers=2, image_size=16, patch_size=4,
    layer_norm_eps=1e-3,
)  # fmt: skip
WIDE = dict(SIZES, intermediate_size=56)
VISION = {
    "siglip": (hf.SiglipVisionModel, hf.SiglipVisionConfig(**WIDE)),
    "clip": (hf.CLIPVisionModel, hf.CLIPVisionConfig(**WIDE)),
    "vit": (hf.ViTModel, hf.ViTConfig(**WIDE)),
    "vit without bias": (hf.ViTModel, hf.ViTConfig(**WIDE, qkv_bias=False, hidden_act="relu")),
    "dinov2": (hf.Dinov2Model, hf.Dinov2Config(**SIZES, mlp_ratio=2)),
    "dinov2 swiglu": (hf.Dinov2Model, hf.Dinov2Config(**SIZES, use_swiglu_ffn=True)),
    "dinov2 with registers": (
        hf.Dinov2WithRegistersModel,
        hf.Dinov2WithRegistersConfig(**SIZES, num_register_tokens=3),
    ),
    "dinov2 with registers, swiglu": (
        hf.Dinov2WithRegistersModel,
        hf.Dinov2WithRegistersConfig(**SIZES, num_register_tokens=2, use_swiglu_ffn=True),
    ),
}
DECODER = dict(
    vocab_size=101, hidden_size=48, intermediate_size=72, num_hidden_layers=5,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-3,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
LLAMA3_ROPE = dict(
    rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)  # fmt: skip
LANGUAGE = {
    "llama": hf.LlamaConfig(**DECODER),
    "llama with head_dim": hf.LlamaConfig(**DECODER, head_dim=20),
    "llama3 rope": hf.LlamaConfig(**DECODER, rope_parameters=LLAMA3_ROPE),
    "smollm2": hf.LlamaConfig(
        **DECODER,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    ),
    "smollm3": hf.SmolLM3Config(**DECODER),
    "smollm3, every second": hf.SmolLM3Config(
        **DECODER, no_rope_layers=[1, 0, 1, 0, 1], tie_word_embeddings=False
    ),
    "qwen2": hf.Qwen2Config(**DECODER),
    "qwen2.5": hf.Qwen2Config(
        **DECODER,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
    "qwen3": hf.Qwen3Config(**DECODER, head_dim=20, tie_word_embeddings=True),
}


def shake(model: torch.nn.Module) -> torch.nn.Module:
    """Every parameter random: ones, zeros and uniform attention would hide a mapping error."""
    g = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim < 2 or "position" in name:
                p.add_(0.3 * torch.randn(p.shape, generator=g))
            else:
                p.copy_(torch.randn(p.shape, generator=g) * 1.5 * p.shape[-1] ** -0.5)
    return model.eval()


def images(n: int = 3, size: int = 16, channels: int = 3) -> torch.Tensor:
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(5))


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def edit_config(folder, **changes) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def features(theirs, x: torch.Tensor) -> torch.Tensor:
    """All tokens after the last norm, which CLIP applies to one token only."""
    hidden = theirs(x).last_hidden_state
    norm = getattr(theirs, "post_layernorm", None) or getattr(
        getattr(theirs, "vision_model", None), "post_layernorm", None
    )
    return norm(hidden) if theirs.config.model_type.startswith("clip") else hidden


@pytest.fixture(params=VISION)
def encoder(request, tmp_path):
    """(theirs, directory of theirs)."""
    torch.manual_seed(0)
    cls, config = VISION[request.param]
    theirs = shake(cls(config))
    theirs.save_pretrained(tmp_path / "theirs")
    return theirs, tmp_path / "theirs"


@pytest.fixture(params=LANGUAGE)
def decoder(request, tmp_path):
    torch.manual_seed(0)
    theirs = shake(hf.AutoModelForCausalLM.from_config(LANGUAGE[request.param]))
    theirs.save_pretrained(tmp_path / "theirs")
    return theirs, tmp_path / "theirs"


def load_vit(folder, **fields) -> ViT:
    return ViT.from_pretrained(
        ViTConfig(**dict(vit_img_size=16) | fields, vit_model_type=str(folder))
    )


def load_lm(folder, **fields) -> LanguageModel:
    return LanguageModel.from_pretrained(
        LMConfig(lm_vocab_size=3, lm_model_type=str(folder), **fields)
    )


def lm_logits(lm: LanguageModel, ids: torch.Tensor) -> torch.Tensor:
    return lm.logits(lm(lm.token_embedding(ids)))


IDS = torch.randint(3, 101, (2, 70), generator=torch.Generator().manual_seed(3))


# --- In and out again ---------------------------------------------------------------------------


@torch.no_grad()
def test_encoders_equal_theirs_both_ways(encoder, tmp_path):
    theirs, folder = encoder
    ours = load_vit(folder, vit_dropout=0.1)
    wanted = features(theirs, images())
    assert wanted.std() > 0.3, "features large enough for the tolerance to mean something"
    close(ours.forward_features(images()), wanted)
    assert not ours.training and all(p.requires_grad for p in ours.parameters())
    assert ours.cfg.vit_dropout == 0.1 and ours.cfg.vit_model_type == str(folder)

    ours.save_pretrained(tmp_path / "ours")
    again, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    left = {n for n in info["missing_keys"] if not n.startswith(("head.", "pooler."))}
    assert left <= {"embeddings.mask_token"} and not info["unexpected_keys"]
    assert again.config.model_type == theirs.config.model_type
    close(features(again.eval(), images()), wanted)
    twice = load_vit(tmp_path / "ours")
    for (name, p), q in zip(ours.named_parameters(), twice.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert replace(twice.cfg, vit_model_type="") == replace(
        ours.cfg, vit_model_type="", vit_dropout=0.0
    )


@torch.no_grad()
def test_pooled_outputs_equal_theirs(tmp_path):
    for name, pool in (("siglip", "map"), ("clip", "auto"), ("dinov2", "auto")):
        theirs = shake(VISION[name][0](VISION[name][1]))
        theirs.save_pretrained(tmp_path / name)
        ours = load_vit(tmp_path / name, vit_pool=pool)
        wanted = theirs(images()).pooler_output
        close(ours(images()), wanted)
        ours.save_pretrained(tmp_path / "again")
        again = type(theirs).from_pretrained(tmp_path / "again").eval()
        close(again(images()).pooler_output, wanted)


@torch.no_grad()
def test_a_classifier_comes_along(tmp_path):
    config = hf.ViTConfig(**WIDE, num_labels=5)
    theirs = shake(hf.ViTForImageClassification(config))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_vit(tmp_path / "theirs")
    wanted = theirs(images()).logits
    close(ours(images()), wanted)
    ours.save_pretrained(tmp_path / "ours")
    again = hf.ViTForImageClassification.from_pretrained(tmp_path / "ours").eval()
    close(again(images()).logits, wanted)
    other = load_vit(tmp_path / "theirs", vit_n_classes=7, vit_cls_flag=True)
    assert other(images()).shape == (3, 7)
    hidden = other.forward_features(images())
    torch.testing.assert_close(hidden, ours.forward_features(images()), rtol=0, atol=0)


@torch.no_grad()
def test_decoders_equal_theirs_both_ways(decoder, tmp_path):
    theirs, folder = decoder
    ours = load_lm(folder, lm_dropout=0.1)
    wanted = theirs(IDS).logits
    assert wanted.std() > 0.3
    close(lm_logits(ours, IDS), wanted)
    tied = ours.head.weight is ours.token_embedding.weight
    assert tied == theirs.config.tie_word_embeddings == ours.cfg.lm_tie_weights

    ours.save_pretrained(tmp_path / "ours")
    again, info = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(again) is type(theirs)
    close(again.eval()(IDS).logits, wanted)
    twice = load_lm(tmp_path / "ours")
    assert replace(twice.cfg, lm_model_type="") == replace(
        ours.cfg, lm_model_type="", lm_dropout=0.0
    )


@torch.no_grad()
def test_generation_with_blocks_without_positions(tmp_path):
    """The cache and packing meet NoPE, too: token by token is all at once."""
    from models.attention import KVCache

    hf.SmolLM3ForCausalLM(LANGUAGE["smollm3"]).save_pretrained(tmp_path)
    ours = shake(load_lm(tmp_path)).double()
    cache = KVCache(ours.cfg, 2, 70, torch.device("cpu"), torch.float64)
    steps = [
        ours.logits(ours(x, torch.full((2, 1), t), cache=cache))
        for t, x in enumerate(ours.token_embedding(IDS).split(1, dim=1))
    ]
    torch.testing.assert_close(torch.cat(steps, 1), lm_logits(ours, IDS), rtol=0, atol=1e-10)


# --- The same weights in other clothes ------------------------------------------------------------


@torch.no_grad()
def test_eyes_of_two_tower_models(tmp_path):
    """What the Hub has: both towers, nested configs that list little, names with vision_model."""
    text = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    vision = dict(WIDE, layer_norm_eps=1e-6)
    for name, model, config in (
        ("siglip", hf.SiglipModel, hf.SiglipConfig),
        ("clip", hf.CLIPModel, hf.CLIPConfig),
    ):
        theirs = shake(model(config(text_config=text, vision_config=vision)))
        theirs.save_pretrained(tmp_path / name)
        ours = load_vit(tmp_path / name)
        wanted = theirs.vision_model(images()).last_hidden_state
        if name == "clip":
            wanted = theirs.vision_model.post_layernorm(wanted)
        close(ours.forward_features(images()), wanted)


@pytest.mark.parametrize("name", ["siglip", "clip", "vit", "dinov2"])
@torch.no_grad()
def test_either_prefix(name, tmp_path):
    cls, config = VISION[name]
    shake(cls(config)).save_pretrained(tmp_path)
    wanted = load_vit(tmp_path).forward_features(images())
    family = next(f for f in FAMILIES[ViT] if name in f.model_types[0])
    for prefix in family.prefixes:

        def rename(tensors, prefix=prefix):
            bare = {k.removeprefix("vision_model."): tensors.pop(k) for k in list(tensors)}
            for other in family.prefixes:
                bare = {k.removeprefix(other): t for k, t in bare.items()}
            tensors |= {prefix + k: t for k, t in bare.items()}

        edit_weights(tmp_path, rename)
        assert torch.equal(load_vit(tmp_path).forward_features(images()), wanted), prefix


@torch.no_grad()
def test_shards_and_a_decoder_without_its_head(tmp_path):
    theirs = shake(hf.Qwen3ForCausalLM(LANGUAGE["qwen3"]))
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    wanted = theirs(IDS).logits
    close(lm_logits(load_lm(tmp_path / "shards"), IDS), wanted)
    bare = tmp_path / "bare"
    theirs.model.save_pretrained(bare)  # names without `model.`
    close(lm_logits(load_lm(bare), IDS), wanted)
    edit_weights(bare, lambda t: t.update({"lm_head.weight": t["embed_tokens.weight"].clone()}))
    close(lm_logits(load_lm(bare), IDS), wanted)
    edit_weights(bare, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(InputError, match="embedding and head differ"):
        load_lm(bare)


@torch.no_grad()
def test_config_json_of_transformers_4(tmp_path):
    """rope_theta and rope_scaling instead of rope_parameters, tied by silence (SmolLM3)."""
    theirs = shake(hf.LlamaForCausalLM(LANGUAGE["llama3 rope"]))
    theirs.save_pretrained(tmp_path / "llama")
    config = json.loads((tmp_path / "llama" / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "head_dim": None}
    (tmp_path / "llama" / "config.json").write_text(json.dumps(config))
    ours = load_lm(tmp_path / "llama")
    close(lm_logits(ours, IDS), theirs(IDS).logits)
    theirs = shake(hf.SmolLM3ForCausalLM(LANGUAGE["smollm3"]))
    theirs.save_pretrained(tmp_path / "smollm3")
    config = json.loads((tmp_path / "smollm3" / "config.json").read_text())
    for silent in ("tie_word_embeddings", "no_rope_layers", "rope_parameters"):
        del config[silent]
    (tmp_path / "smollm3" / "config.json").write_text(json.dumps(config))
    ours = load_lm(tmp_path / "smollm3")
    close(lm_logits(ours, IDS), theirs(IDS).logits)


@pytest.mark.parametrize("kind", llama.DEFAULTS)
def test_a_silent_config_means_their_defaults(kind):
    theirs = hf.AutoConfig.for_model(kind)
    ours = llama.read({"model_type": kind}, "config.json")
    assert ours == llama.read(theirs.to_dict(), "config.json")


@pytest.mark.parametrize(
    "config",
    [hf.SiglipVisionConfig(), hf.CLIPVisionConfig(), hf.ViTConfig(), hf.Dinov2Config(),
     hf.Dinov2WithRegistersConfig()],
    ids=lambda c: c.model_type,
)  # fmt: skip
def test_a_silent_vision_config_means_their_defaults(config):
    family = next(f for f in FAMILIES[ViT] if config.model_type in f.model_types)
    silent = family.read({"model_type": config.model_type}, "config.json")
    assert silent == family.read(config.to_dict(), "config.json")


# --- Another size ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["siglip", "clip", "vit", "dinov2", "dinov2 with registers"])
@pytest.mark.parametrize("size", [8, 24, 40])
@torch.no_grad()
def test_positions_are_resampled_as_theirs(name, size, tmp_path, capsys):
    cls, config = VISION[name]
    theirs = shake(cls(config))
    theirs.save_pretrained(tmp_path)
    ours = load_vit(tmp_path, vit_img_size=size)
    grid = size // 4
    assert f"4 x 4 patches resampled (bicubic) to {grid} x {grid}" in capsys.readouterr().err
    x = images(2, size)
    # DINOv2 always does it, the others when asked.
    asked = {} if name.startswith("dinov2") else {"interpolate_pos_encoding": True}
    wanted = theirs(x, **asked).last_hidden_state
    if name == "clip":
        wanted = theirs.post_layernorm(wanted)
    close(ours.forward_features(x), wanted)
    load_vit(tmp_path)
    assert capsys.readouterr().err == ""
    with pytest.raises(InputError, match=r"vit_img_size = 18: must be a multiple .* = 4"):
        load_vit(tmp_path, vit_img_size=18, vit_patch_size=6)


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_new_rows_stand_at_the_mean(tied, tmp_path):
    config = hf.LlamaConfig(**DECODER, tie_word_embeddings=tied)
    theirs = shake(hf.LlamaForCausalLM(config))
    theirs.save_pretrained(tmp_path)
    ours = LanguageModel.from_pretrained(LMConfig(lm_vocab_size=120, lm_model_type=str(tmp_path)))
    assert ours.cfg.lm_vocab_size == 120
    old = theirs.get_input_embeddings().weight, theirs.get_output_embeddings().weight
    for new, before in zip((ours.token_embedding.weight, ours.head.weight), old):
        assert new.shape == (120, 48) and torch.equal(new[:101], before)
        torch.testing.assert_close(new[101:], before.mean(0).expand(19, -1))
    assert (ours.head.weight is ours.token_embedding.weight) == tied
    close(lm_logits(ours, IDS)[..., :101], theirs(IDS).logits)


# --- What does not fit ----------------------------------------------------------------------------


def damage(folder, first: str) -> None:
    """A leftover, a missing and a misshapen tensor at once."""

    def edit(tensors):
        names = sorted(n for n in tensors if tensors[n].ndim == 1 and ".1." in n)
        tensors["extra.weight"] = torch.zeros(3)
        del tensors[names[0]]
        tensors[names[1]] = tensors[names[1]][:-1].clone()
        edit.names = names

    edit_weights(folder, edit)
    return edit.names[:2]


def test_an_encoder_that_does_not_fit(encoder):
    _, folder = encoder
    missing, misshapen = damage(folder, "encoder")
    with pytest.raises(InputError) as error:
        load_vit(folder)
    message = str(error.value)
    assert f"left over: extra.weight; missing: {missing}; misshapen: {misshapen} is [" in message
    assert str(folder) in message


def test_a_decoder_that_does_not_fit(decoder):
    _, folder = decoder
    missing, misshapen = damage(folder, "decoder")
    with pytest.raises(InputError) as error:
        load_lm(folder)
    assert f"left over: extra.weight; missing: {missing}; misshapen: {misshapen} is [" in str(
        error.value
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "siglip2"}, "model_type = 'siglip2': must be one of siglip"),
        ({"model_type": None}, "model_type = None"),
        ({"hidden_act": "mish"}, "hidden_act = 'mish': must be one of gelu_pytorch_tanh"),
        ({"hidden_size": "wide"}, "vit_hidden_dim = 'wide': must be int"),
        ({"hidden_size": -5}, "vit_hidden_dim = -5: must be greater than 0"),
        ({"hidden_size": 10**30, "num_attention_heads": 1}, "no model has such sizes"),
        ({"num_hidden_layers": 10**9}, "blocks = 1000000000: the file has 37 tensors"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1: is not supported"),
        ({"auto_map": {"AutoModel": "x.py--Y"}}, "auto_map asks for code of its own"),
        ({"vision_config": 7}, "not the config of such a model"),
    ],
)
def test_an_encoder_config_that_makes_no_sense(changes, says, tmp_path):
    cls, config = VISION["siglip"]
    cls(config).save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda t: [t.pop(n) for n in list(t) if "head." in n])
    edit_config(tmp_path, **changes)
    with pytest.raises(InputError) as error:
        load_vit(tmp_path)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"attention_bias": True}, "attention_bias = True: is not supported, only False is"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"use_sliding_window": True}, "use_sliding_window = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type = 'yarn': must be one of default"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"model_type": "gemma2"}, "model_type = 'gemma2': must be one of llama, smollm3"),
        ({"num_key_value_heads": 3}, "lm_n_kv_heads = 3: must divide"),
        ({"num_hidden_layers": 10**12}, "blocks = 1000000000000: the file has"),
        ({"vocab_size": 10**40}, "no model has such sizes"),
    ],
)
def test_a_decoder_config_that_makes_no_sense(changes, says, tmp_path):
    hf.LlamaForCausalLM(LANGUAGE["llama"]).save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(InputError) as error:
        load_lm(tmp_path)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_irregular_blocks_without_positions_are_refused(tmp_path):
    hf.SmolLM3ForCausalLM(LANGUAGE["smollm3"]).save_pretrained(tmp_path)
    edit_config(tmp_path, no_rope_layers=[1, 0, 0, 1, 1])
    with pytest.raises(InputError, match=r"no_rope_layers = .*every so many-th"):
        load_lm(tmp_path)


def test_a_map_pool_that_the_source_lacks(tmp_path):
    VISION["vit"][0](VISION["vit"][1]).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="model_type = 'vit': has no place for another pool"):
        load_vit(tmp_path, vit_pool="map")


def test_a_source_that_is_nowhere(tmp_path):
    with pytest.raises(InputError, match=r"nowhere: no such checkpoint directory\."):
        load_vit(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"some/encoder: no such .* HF_HUB_OFFLINE is set and it"):
        load_vit("some/encoder")


# --- Our own layout -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [dict(vit_n_registers=2), dict(vit_cls_flag=True, vit_layer_scale=True, vit_pre_norm=True),
     dict(vit_pool="mean", vit_n_classes=3), dict(vit_hidden_act="swiglu", vit_inter_dim=56)],
    ids=str,
)  # fmt: skip
@torch.no_grad()
def test_an_encoder_of_no_family(fields, tmp_path):
    ours = shake(ViT(ViTConfig(**fields)))
    ours.save_pretrained(tmp_path)
    again = load_vit(tmp_path, vit_img_size=48, vit_pool=fields.get("vit_pool", "auto"))
    x = images(2, 48)
    assert torch.equal(again(x), ours(x))


def test_a_decoder_of_no_family(tmp_path):
    ours = shake(LanguageModel(LMConfig(lm_qkv_bias=True, lm_qk_norm=True, lm_nope_every=2)))
    ours.save_pretrained(tmp_path)
    assert torch.equal(lm_logits(load_lm(tmp_path), IDS), lm_logits(ours, IDS))


# --- True sizes -----------------------------------------------------------------------------------

SIGLIP_B = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                num_attention_heads=12, patch_size=16)  # fmt: skip
SMOLLM2 = dict(vocab_size=49152, max_position_embeddings=8192, rms_norm_eps=1e-5,
               tie_word_embeddings=True,
               rope_parameters={"rope_type": "default", "rope_theta": 100000.0})  # fmt: skip
TRUE = {
    "222m": (
        hf.SiglipVisionConfig(**SIGLIP_B, image_size=224),
        hf.LlamaConfig(**SMOLLM2, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                       num_attention_heads=9, num_key_value_heads=3),
    ),
    "460m": (
        hf.SiglipVisionConfig(**SIGLIP_B, image_size=512),
        hf.LlamaConfig(**SMOLLM2, hidden_size=960, intermediate_size=2560, num_hidden_layers=32,
                       num_attention_heads=15, num_key_value_heads=5),
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("preset", TRUE)
@torch.no_grad()
def test_presets_at_their_true_size(preset, tmp_path, capsys):
    """Random weights of their real configs -> files -> a VLM on both; one forward of each part."""
    vision, text = TRUE[preset]
    eyes, mouth = hf.SiglipVisionModel(vision).eval(), hf.LlamaForCausalLM(text).eval()
    eyes.save_pretrained(tmp_path / "eyes")
    mouth.save_pretrained(tmp_path / "mouth")
    cfg = replace(
        PRESETS[preset].model,
        vit_model_type=str(tmp_path / "eyes"),
        lm_model_type=str(tmp_path / "mouth"),
    )
    model = VisionLanguageModel.from_backbones(cfg)
    assert model.cfg == cfg, "the preset's sizes are those of its backbones"
    assert "resampled" not in capsys.readouterr().err
    x = images(1, vision.image_size)
    model.eval()
    close(model.vision_encoder.forward_features(x), eyes(x).last_hidden_state)
    ids = torch.randint(0, 49152, (1, 100))
    close(lm_logits(model.decoder, ids)[..., :49152], mouth(ids).logits)
    mean = mouth.get_input_embeddings().weight.mean(0)
    torch.testing.assert_close(model.decoder.token_embedding.weight[49190], mean)


# --- Really trained weights -----------------------------------------------------------------------


@torch.no_grad()
def test_stories260k_tells_the_same_story(shared):
    folder = shared / "weights" / "stories260k_llama" / "hf"
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    theirs = hf.AutoModelForCausalLM.from_pretrained(folder).eval()
    ours = load_lm(folder)
    ids = torch.tensor([[1] + tokenizer("Once upon a time", add_special_tokens=False).input_ids])
    start = ids.shape[1]
    wanted = theirs.generate(ids, do_sample=False, max_new_tokens=200, eos_token_id=None)
    for _ in range(200):
        ids = torch.cat((ids, lm_logits(ours, ids)[:, -1:].argmax(-1)), 1)
    text = tokenizer.decode(ids[0, start:])
    assert torch.equal(ids, wanted), text
    assert "there was a little girl named Lily" in text


@torch.no_grad()
def test_vit_mnist_gives_the_same_logits(shared):
    folder = shared / "weights" / "vit_mnist" / "hf_3class"
    theirs = hf.AutoModelForImageClassification.from_pretrained(folder).eval()
    ours = load_vit(folder, vit_img_size=28, vit_patch_size=7)
    assert ours.cfg.vit_image_mean == (0.1307,) * 3 and ours.cfg.vit_n_channels == 1
    x = images(16, 28, channels=1)
    close(ours(x), theirs(x).logits)
