"""The ViT as a classifier: heads, preset sizes, new heads on a checkpoint, use in a VLM."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from config_tools import InputError
from configs import ViTConfig
from configs_classify import PATCHES, PRESETS, SIZES
from models.classifier import Classifier
from models.pretrained.load import open_vit
from models.pretrained.save import transformers_class
from models.vision_language_model import VisionLanguageModel
from models.vision_transformer import ViT

SMALL = dict(
    vit_img_size=16, vit_patch_size=4, vit_hidden_dim=32, vit_inter_dim=56, vit_n_heads=2,
    vit_n_blocks=2, vit_n_classes=5, vit_cls_flag=True, vit_hidden_act="gelu",
)  # fmt: skip


def classifier(randomise, **changes) -> Classifier:
    torch.manual_seed(0)
    return Classifier(randomise(ViT(ViTConfig(**SMALL | changes))))


def images(n: int = 4, size: int = 16, channels: int = 3) -> torch.Tensor:
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(3))


# Table 1 of the ViT paper and table 1 of DeiT (5.7 M and 22 M), with 1000 classes.
PAPER = {"ti16": 5_717_416, "s16": 22_050_664, "b16": 86_567_656, "b32": 88_224_232,
         "l16": 304_326_632, "l32": 306_535_400}  # fmt: skip


@pytest.mark.parametrize("name", [f"{s}{p}" for s in SIZES for p in PATCHES])
def test_presets_match_the_paper(name):
    cfg = PRESETS[name].model
    with torch.device("meta"):
        model = ViT(ViTConfig(**vars(cfg) | {"vit_n_classes": 1000}))
        reference = hf.ViTForImageClassification(
            hf.ViTConfig(
                hidden_size=cfg.vit_hidden_dim, intermediate_size=cfg.vit_inter_dim,
                num_hidden_layers=cfg.vit_n_blocks, num_attention_heads=cfg.vit_n_heads,
                patch_size=int(name.lstrip("tisbl")), num_labels=1000,
            )
        )  # fmt: skip
    count = sum(p.numel() for p in model.parameters())
    assert count == sum(p.numel() for p in reference.parameters())
    assert count == PAPER.get(name, count)
    assert f"{count:,}" in str(Classifier(model)) and "1000 classes" in str(Classifier(model))


def test_a_model_prints_as_a_table(randomise):
    model = classifier(randomise, vit_head="mlp", vit_pool="map")
    lines = str(model).splitlines()
    assert [line.split()[0] for line in lines] == [
        "patch_embedding", "blocks", "layer_norm", "map_pool", "head", "total"]  # fmt: skip
    counts = [int(line.split()[1].replace(",", "")) for line in lines]
    assert sum(counts[:-1]) == counts[-1] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("pool", ["cls", "mean", "map"])
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_logits_and_loss_equal_explicit_formulas(pool, head, randomise):
    model = classifier(randomise, vit_pool=pool, vit_head=head)
    logits, loss = model(images(), torch.tensor([0, 4, 2, 2]))
    x = model.vit.forward_features(images())
    pooled = {"cls": x[:, 0], "mean": x[:, 1:].mean(1)}.get(pool)
    pooled = model.vit.map_pool(x) if pool == "map" else pooled
    layer = model.vit.head
    if head == "mlp":
        pooled, layer = torch.tanh(pooled @ layer.hidden.weight.T + layer.hidden.bias), layer.out
    expected = pooled @ layer.weight.T + layer.bias
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    expected_loss = -(expected.log_softmax(-1)[range(4), [0, 4, 2, 2]]).mean()
    torch.testing.assert_close(loss, expected_loss, rtol=0, atol=1e-5)
    summed = model(images(), torch.tensor([0, 4, 2, 2]), reduction="sum")[1]
    torch.testing.assert_close(summed, 4 * loss, rtol=0, atol=1e-4)
    assert model(images())[1] is None


def test_soft_targets_weigh_the_classes(randomise):
    model = classifier(randomise)
    a, b = (model(images(), torch.tensor(t))[1] for t in ([0, 0, 0, 0], [1, 1, 1, 1]))
    soft = torch.tensor([[0.25, 0.75, 0, 0, 0]]).expand(4, -1)
    torch.testing.assert_close(model(images(), soft)[1], 0.25 * a + 0.75 * b, rtol=0, atol=1e-5)


def test_parts_hold_every_parameter_once(randomise):
    model = classifier(randomise, vit_pool="map", vit_head="mlp")
    parts = [id(p) for part in model.parts.values() for p in part.parameters()]
    assert sorted(parts) == sorted(map(id, model.parameters())) and len(set(parts)) == len(parts)
    names = {name for name, _ in model.parts["trunk"].named_parameters()}
    assert "blocks.1.attn.q_proj.weight" in names and not any("head" in n for n in names)


def test_stochastic_depth_skips_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    vit = ViT(ViTConfig(**SMALL | dict(vit_drop_path=0.5))).train()
    assert [block.drop_path.rate for block in vit.blocks] == [0.0, 0.5]
    x = torch.ones(4000, 2, 3)
    dropped = vit.blocks[1].drop_path(x)
    assert {tuple(sample.flatten().tolist()) for sample in dropped} == {(0.0,) * 6, (2.0,) * 6}
    assert abs(dropped.mean().item() - 1) < 0.07  # four standard errors of 4,000 coins
    assert torch.equal(vit.eval().blocks[1].drop_path(x), x)


# --- Files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "hf_class"),
    [
        ({}, "ViTForImageClassification"),
        (dict(vit_qkv_bias=False, vit_hidden_act="relu"), "ViTForImageClassification"),
        (dict(vit_n_classes=0), "ViTModel"),
        (dict(vit_cls_flag=False), "SiglipForImageClassification"),
        (dict(vit_head="mlp"), ""),
        (dict(vit_pool="mean"), ""),
        (dict(vit_cls_flag=False, vit_pool="map"), ""),
    ],
    ids=str,
)
@torch.no_grad()
def test_transformers_loads_what_it_supports(changes, hf_class, randomise, tmp_path):
    labels = tuple("abcde") if changes.get("vit_n_classes", 5) else ()
    torch.manual_seed(0)
    vit = randomise(ViT(ViTConfig(**SMALL | dict(vit_labels=labels) | changes)))
    vit.save_pretrained(tmp_path)
    assert transformers_class(vit) == hf_class
    if hf_class:
        out = getattr(hf, hf_class).from_pretrained(tmp_path).eval()(images())
        expected = out.logits if labels else out.last_hidden_state[:, 0]
        torch.testing.assert_close(vit(images()), expected, rtol=0, atol=1e-5)
        if labels:
            opened = hf.AutoConfig.from_pretrained(tmp_path)
            assert opened.id2label == dict(enumerate("abcde"))
    again = open_vit(str(tmp_path))
    assert again.cfg.vit_labels == labels
    torch.testing.assert_close(again(images()), vit(images()), rtol=0, atol=1e-6)


@torch.no_grad()
def test_siglip_classifiers_load(tmp_path, randomise):
    vision = dict(hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=2,
                  image_size=16, patch_size=4)  # fmt: skip
    config = hf.SiglipConfig(vision_config=vision, num_labels=3)
    torch.manual_seed(0)
    reference = randomise(hf.SiglipForImageClassification(config))
    reference.save_pretrained(tmp_path)
    model = open_vit(str(tmp_path))
    torch.testing.assert_close(model(images()), reference(images()).logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_new_head_keeps_the_trunk_and_same_head_is_kept(randomise, tmp_path, capsys):
    model = classifier(randomise, vit_labels=tuple("abcde"))
    model.save_pretrained(tmp_path)

    def load(**fields) -> ViT:
        cfg = dict(vit_img_size=16, vit_model_type=str(tmp_path)) | fields
        return ViT.from_pretrained(ViTConfig(**cfg))

    expected = model.vit.forward_features(images())
    same = load(vit_n_classes=5, vit_labels=tuple("abcde"))
    assert torch.equal(same(images()), model(images())[0])
    assert capsys.readouterr().err == ""
    for fields in (
        dict(vit_n_classes=7),
        dict(vit_n_classes=5, vit_labels=tuple("vwxyz")),
        dict(vit_n_classes=5, vit_labels=tuple("abcde"), vit_head="mlp"),
    ):
        other = load(**fields)
        assert torch.equal(other.forward_features(images()), expected)
        assert other(images()).shape == (4, fields["vit_n_classes"])
        assert other.cfg.vit_labels == fields.get("vit_labels", ())
        assert "new classifier head" in capsys.readouterr().err
    larger = load(vit_img_size=32)
    assert larger(images(size=32)).shape == (4, 5)


@torch.no_grad()
def test_classifier_to_vlm_and_back(randomise, small_config, tmp_path):
    """A classifier becomes the encoder of a VLM, and this encoder a classifier again."""
    model = classifier(randomise, vit_cls_flag=False, vit_hidden_act="gelu_tanh")
    model.save_pretrained(tmp_path / "step-000001")
    cfg = small_config(
        vit_model_type=str(tmp_path)
    )  # of a run folder, the newest checkpoint is loaded
    vlm = VisionLanguageModel.from_backbones(cfg)
    expected = model.vit.patches(images())
    assert torch.equal(vlm.vision_encoder.patches(images()), expected)
    assert vlm.cfg.vit_n_classes == 0
    vlm.save_pretrained(tmp_path / "vlm")
    probe = dict(vit_img_size=16, vit_n_classes=3, vit_model_type=str(tmp_path / "vlm"))
    vit = ViT.from_pretrained(ViTConfig(**probe))
    assert vit.cfg.vit_pooling == "mean" and vit(images()).shape == (4, 3)
    assert torch.equal(vit.patches(images()), expected)
    with pytest.raises(InputError, match="has no weights for it; use cls or mean"):
        open_vit(str(tmp_path / "vlm"), pool="map")


@torch.no_grad()
def test_encoder_with_cls_and_registers_in_a_vlm(randomise, small_config, tmp_path):
    model = classifier(randomise, vit_n_registers=2)
    model.save_pretrained(tmp_path)
    vlm = VisionLanguageModel.from_backbones(small_config(vit_model_type=str(tmp_path)))
    assert torch.equal(vlm.vision_encoder.patches(images()), model.vit.patches(images()))
    assert vlm.embed_images(images()).shape[:2] == (4, vlm.cfg.tokens_per_tile)


@torch.no_grad()
def test_vit_mnist_has_one_channel_relu_and_no_biases(shared):
    vit = open_vit(str(shared / "weights" / "vit_mnist" / "hf_3class"))
    assert (vit.cfg.vit_n_channels, vit.cfg.vit_hidden_act, vit.cfg.vit_qkv_bias) \
        == (1, "relu", False)  # fmt: skip
    assert (vit.cfg.vit_labels, vit.cfg.vit_img_size) == (("0", "1", "2"), 28)
    reference = hf.ViTForImageClassification.from_pretrained(
        shared / "weights" / "vit_mnist" / "hf_3class"
    ).eval()
    x = images(16, 28, 1)
    torch.testing.assert_close(vit(x), reference(x).logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_other_pools_of_one_checkpoint(randomise, tmp_path):
    model = classifier(randomise, vit_pool="map")
    model.save_pretrained(tmp_path / "map")
    features = model.vit.forward_features(images())
    for pool, expected in (("cls", features[:, 0]), ("mean", features[:, 1:].mean(1)),
                         ("auto", model.vit.pool(features))):  # fmt: skip
        found = open_vit(str(tmp_path / "map"), pool)
        torch.testing.assert_close(found.pool(found.forward_features(images())), expected)
    cfg = ViTConfig(vit_img_size=16, vit_model_type=str(tmp_path / "map"))
    assert torch.equal(ViT.from_pretrained(cfg)(images()), model(images())[0])
    for head, message in (
        ("mlp", "has no weights for it"),
        ("linear", "does not support vit_pool = 'map'"),
    ):
        classifier(randomise, vit_head=head).save_pretrained(tmp_path / head)
        with pytest.raises(InputError, match=message):
            open_vit(str(tmp_path / head), "map")


TRUNKS = {
    "vit": (hf.ViTModel, hf.ViTConfig, {}),
    "siglip": (hf.SiglipVisionModel, hf.SiglipVisionConfig, dict(intermediate_size=56)),
    "clip": (hf.CLIPVisionModel, hf.CLIPVisionConfig, dict(projection_dim=32)),
    "dinov2": (hf.Dinov2WithRegistersModel, hf.Dinov2WithRegistersConfig, {}),
}


@pytest.mark.parametrize("name", TRUNKS)
@torch.no_grad()
def test_new_head_on_every_encoder_family(name, tmp_path, randomise, capsys):
    cls, config, more = TRUNKS[name]
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16,
                 patch_size=4)  # fmt: skip
    torch.manual_seed(0)
    reference = randomise(cls(config(**sizes | more)))
    reference.save_pretrained(tmp_path / "reference")
    fields = dict(vit_img_size=16, vit_n_classes=3, vit_labels=tuple("abc"))
    vit = ViT.from_pretrained(ViTConfig(**fields, vit_model_type=str(tmp_path / "reference")))
    hidden = reference(images()).last_hidden_state
    if name == "clip":  # transformers normalises the CLS token only
        hidden = getattr(reference, "vision_model", reference).post_layernorm(hidden)
    pooled = hidden.mean(1) if name == "siglip" else hidden[:, 0]
    expected = pooled @ vit.head.weight.T + vit.head.bias
    torch.testing.assert_close(vit(images()), expected, rtol=0, atol=1e-5)
    vit.save_pretrained(tmp_path / "saved")
    again = open_vit(str(tmp_path / "saved"))
    assert again.cfg.vit_labels == ("a", "b", "c")
    torch.testing.assert_close(again(images()), expected, rtol=0, atol=1e-5)


def test_classifier_needs_classes():
    with pytest.raises(ValueError, match="vit_n_classes = 0"):
        Classifier(ViT(ViTConfig(**SMALL | dict(vit_n_classes=0))))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(vit_pool="none"), "must be mean, cls or map in a classifier"),
        (dict(vit_labels=("a", "b")), "5 different names"),
        (dict(vit_labels=tuple("aabcd")), "5 different names"),
        (dict(vit_drop_path=1.0), "below 1"),
    ],
)
def test_invalid_classifier_configs_raise(fields, message):
    with pytest.raises(InputError, match=message):
        ViTConfig(**SMALL | fields)
