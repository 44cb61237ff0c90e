"""Vision encoders: loaded from checkpoints of transformers' classes and saved for these classes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers as hf

from config_tools import InputError
from configs import ViTConfig
from models.pretrained.load import LAYOUTS
from models.vision_transformer import ViT

# A large epsilon makes a wrong one visible; different sizes reveal swapped dimensions.
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


def images(n: int = 3, size: int = 16, channels: int = 3) -> torch.Tensor:
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(5))


def close(model: torch.Tensor, reference: torch.Tensor) -> None:
    torch.testing.assert_close(model, reference, rtol=0, atol=1e-5)


def load_vit(folder, **fields) -> ViT:
    return ViT.from_pretrained(
        ViTConfig(**dict(vit_img_size=16) | fields, vit_model_type=str(folder))
    )


def features(reference, x: torch.Tensor) -> torch.Tensor:
    """All tokens after the last norm, which transformers' CLIP applies to the CLS token only."""
    hidden = reference(x).last_hidden_state
    norm = getattr(reference, "post_layernorm", None) or getattr(
        getattr(reference, "vision_model", None), "post_layernorm", None
    )
    return norm(hidden) if reference.config.model_type.startswith("clip") else hidden


@pytest.fixture(params=VISION)
def encoder(request, tmp_path, randomise_all):
    """(transformers' model, the directory it saved)."""
    torch.manual_seed(0)
    cls, config = VISION[request.param]
    reference = randomise_all(cls(config))
    reference.save_pretrained(tmp_path / "reference")
    return reference, tmp_path / "reference"


# --- Load and save --------------------------------------------------------------------------------


@torch.no_grad()
def test_encoders_equal_transformers_both_ways(encoder, tmp_path):
    reference, folder = encoder
    model = load_vit(folder, vit_dropout=0.1)
    expected = features(reference, images())
    assert expected.std() > 0.3, "features must be large compared with the tolerance"
    close(model.forward_features(images()), expected)
    assert not model.training and all(p.requires_grad for p in model.parameters())
    assert model.cfg.vit_dropout == 0.1 and model.cfg.vit_model_type == str(folder)

    model.save_pretrained(tmp_path / "model")
    again, info = type(reference).from_pretrained(tmp_path / "model", output_loading_info=True)
    left = {n for n in info["missing_keys"] if not n.startswith(("head.", "pooler."))}
    assert left <= {"embeddings.mask_token"} and not info["unexpected_keys"]
    assert again.config.model_type == reference.config.model_type
    close(features(again.eval(), images()), expected)
    twice = load_vit(tmp_path / "model")
    for (name, p), q in zip(model.named_parameters(), twice.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert replace(twice.cfg, vit_model_type="") == replace(
        model.cfg, vit_model_type="", vit_dropout=0.0
    )


@torch.no_grad()
def test_pooled_outputs_equal_transformers(tmp_path, randomise_all):
    for name, pool in (("siglip", "map"), ("clip", "auto"), ("dinov2", "auto")):
        reference = randomise_all(VISION[name][0](VISION[name][1]))
        reference.save_pretrained(tmp_path / name)
        model = load_vit(tmp_path / name, vit_pool=pool)
        expected = reference(images()).pooler_output
        close(model(images()), expected)
        model.save_pretrained(tmp_path / "again")
        again = type(reference).from_pretrained(tmp_path / "again").eval()
        close(again(images()).pooler_output, expected)


@torch.no_grad()
def test_classifiers_are_loaded_with_the_encoder(tmp_path, randomise_all):
    config = hf.ViTConfig(**WIDE, num_labels=5)
    reference = randomise_all(hf.ViTForImageClassification(config))
    reference.save_pretrained(tmp_path / "reference")
    model = load_vit(tmp_path / "reference")
    expected = reference(images()).logits
    close(model(images()), expected)
    model.save_pretrained(tmp_path / "model")
    again = hf.ViTForImageClassification.from_pretrained(tmp_path / "model").eval()
    close(again(images()).logits, expected)
    other = load_vit(tmp_path / "reference", vit_n_classes=7, vit_cls_flag=True)
    assert other(images()).shape == (3, 7)
    hidden = other.forward_features(images())
    torch.testing.assert_close(hidden, model.forward_features(images()), rtol=0, atol=0)


# --- The same weights in other files --------------------------------------------------------------


@torch.no_grad()
def test_vision_encoders_of_two_tower_models(tmp_path, randomise_all):
    """As on the Hub: both towers, nested configs with few keys, names with a prefix."""
    text = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    vision = dict(WIDE, layer_norm_eps=1e-6)
    for name, cls, config_cls in (
        ("siglip", hf.SiglipModel, hf.SiglipConfig),
        ("clip", hf.CLIPModel, hf.CLIPConfig),
    ):
        reference = randomise_all(cls(config_cls(text_config=text, vision_config=vision)))
        reference.save_pretrained(tmp_path / name)
        model = load_vit(tmp_path / name)
        expected = reference.vision_model(images()).last_hidden_state
        if name == "clip":
            expected = reference.vision_model.post_layernorm(expected)
        close(model.forward_features(images()), expected)


@pytest.mark.parametrize("name", ["siglip", "clip", "vit", "dinov2"])
@torch.no_grad()
def test_every_prefix(name, tmp_path, edit_weights, randomise_all):
    cls, config = VISION[name]
    randomise_all(cls(config)).save_pretrained(tmp_path)
    expected = load_vit(tmp_path).forward_features(images())
    layout = next(each for each in LAYOUTS[ViT] if name in each.model_types[0])
    for prefix in layout.prefixes:

        def rename(tensors, prefix=prefix):
            bare = {k.removeprefix("vision_model."): tensors.pop(k) for k in list(tensors)}
            for other in layout.prefixes:
                bare = {k.removeprefix(other): t for k, t in bare.items()}
            tensors |= {prefix + k: t for k, t in bare.items()}

        edit_weights(tmp_path, rename)
        assert torch.equal(load_vit(tmp_path).forward_features(images()), expected), prefix


@pytest.mark.parametrize(
    "config",
    [hf.SiglipVisionConfig(), hf.CLIPVisionConfig(), hf.ViTConfig(), hf.Dinov2Config(),
     hf.Dinov2WithRegistersConfig()],
    ids=lambda c: c.model_type,
)  # fmt: skip
def test_absent_keys_get_the_defaults_of_transformers(config):
    layout = next(each for each in LAYOUTS[ViT] if config.model_type in each.model_types)
    absent = layout.read({"model_type": config.model_type}, "config.json")
    assert absent == layout.read(config.to_dict(), "config.json")


# --- Another size ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["siglip", "clip", "vit", "dinov2", "dinov2 with registers"])
@pytest.mark.parametrize("size", [8, 24, 40])
@torch.no_grad()
def test_positions_are_resampled_as_in_transformers(name, size, tmp_path, capsys, randomise_all):
    cls, config = VISION[name]
    reference = randomise_all(cls(config))
    reference.save_pretrained(tmp_path)
    model = load_vit(tmp_path, vit_img_size=size)
    grid = size // 4
    assert f"4 x 4 patches resampled (bicubic) to {grid} x {grid}" in capsys.readouterr().err
    x = images(2, size)
    # DINOv2 always interpolates, the other encoders only on request.
    options = {} if name.startswith("dinov2") else {"interpolate_pos_encoding": True}
    expected = reference(x, **options).last_hidden_state
    if name == "clip":
        expected = reference.post_layernorm(expected)
    close(model.forward_features(x), expected)
    load_vit(tmp_path)
    assert capsys.readouterr().err == ""
    with pytest.raises(InputError, match=r"vit_img_size = 18: must be a multiple .* = 4"):
        load_vit(tmp_path, vit_img_size=18, vit_patch_size=6)


# --- Error messages -------------------------------------------------------------------------------


def test_tensors_that_do_not_match(encoder, damage):
    _, folder = encoder
    missing, misshapen = damage(folder)
    with pytest.raises(InputError) as error:
        load_vit(folder)
    message = str(error.value)
    assert f"left over: extra.weight; missing: {missing}; misshapen: {misshapen} is [" in message
    assert str(folder) in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "siglip2"}, "model_type = 'siglip2': must be one of siglip"),
        ({"model_type": None}, "model_type = None"),
        ({"hidden_act": "mish"}, "hidden_act = 'mish': must be one of gelu_pytorch_tanh"),
        ({"hidden_size": "wide"}, "vit_hidden_dim = 'wide': must be int"),
        ({"hidden_size": -5}, "vit_hidden_dim = -5: must be greater than 0"),
        (
            {"hidden_size": 10**30, "num_attention_heads": 1},
            "a model of these sizes cannot be built",
        ),
        ({"num_hidden_layers": 10**9}, "blocks = 1000000000: exceed the file's 37 tensors"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1: is not supported"),
        ({"auto_map": {"AutoModel": "x.py--Y"}}, "auto_map asks for custom code"),
        ({"vision_config": 7}, "not a valid config of this model type"),
    ],
)
def test_errors_of_an_encoder_config(changes, message, tmp_path, edit_weights, edit_config):
    cls, config = VISION["siglip"]
    cls(config).save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda t: [t.pop(n) for n in list(t) if "head." in n])
    edit_config(tmp_path, **changes)
    with pytest.raises(InputError) as error:
        load_vit(tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_map_pool_without_weights(tmp_path):
    VISION["vit"][0](VISION["vit"][1]).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="model_type = 'vit': does not support vit_pool = 'map'"):
        load_vit(tmp_path, vit_pool="map")


def test_missing_source(tmp_path):
    with pytest.raises(InputError, match=r"nowhere: no such checkpoint directory\."):
        load_vit(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"some/encoder: no such .* HF_HUB_OFFLINE is set and"):
        load_vit("some/encoder")


# --- Our own layout -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [dict(vit_n_registers=2), dict(vit_cls_flag=True, vit_layer_scale=True, vit_pre_norm=True),
     dict(vit_pool="mean", vit_n_classes=3), dict(vit_hidden_act="swiglu", vit_inter_dim=56)],
    ids=str,
)  # fmt: skip
@torch.no_grad()
def test_encoders_that_transformers_does_not_support(fields, tmp_path, randomise_all):
    model = randomise_all(ViT(ViTConfig(**fields)))
    model.save_pretrained(tmp_path)
    again = load_vit(tmp_path, vit_img_size=48, vit_pool=fields.get("vit_pool", "auto"))
    x = images(2, 48)
    assert torch.equal(again(x), model(x))


# --- Trained weights ------------------------------------------------------------------------------


@torch.no_grad()
def test_vit_mnist_gives_the_same_logits(shared):
    folder = shared / "weights" / "vit_mnist" / "hf_3class"
    reference = hf.AutoModelForImageClassification.from_pretrained(folder).eval()
    model = load_vit(folder, vit_img_size=28, vit_patch_size=7)
    assert model.cfg.vit_image_mean == (0.1307,) * 3 and model.cfg.vit_n_channels == 1
    x = images(16, 28, channels=1)
    close(model(x), reference(x).logits)
