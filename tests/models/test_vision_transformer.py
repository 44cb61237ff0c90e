"""The encoder equals transformers' SigLIP and ViT, and every parameter is initialised."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import SiglipVisionConfig, SiglipVisionModel, ViTModel
from transformers import ViTConfig as HFViTConfig

from configs import ViTConfig
from models import vision_transformer
from models.ops import init
from models.pretrained.layouts import siglip
from models.pretrained.mapping import expand, import_tensors
from models.vision_transformer import ViT, ViTPatchEmbeddings

SIZES = dict(
    vit_img_size=16,
    vit_patch_size=4,
    vit_hidden_dim=32,
    vit_inter_dim=56,
    vit_n_heads=2,
    vit_n_blocks=2,
)
HF_SIZES = dict(
    image_size=16,
    patch_size=4,
    hidden_size=32,
    intermediate_size=56,
    num_attention_heads=2,
    num_hidden_layers=2,
)


def images(n: int = 3, size: int = 16) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(5))


def sharpen(model: torch.nn.Module) -> torch.nn.Module:
    """Enlarge matrices: transformers' default (std 0.02) makes attention nearly uniform."""
    g = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=g) * 1.5 * p.shape[-1] ** -0.5)
    return model


def test_patch_embedding_equals_cut_flatten_multiply(randomise):
    patches = randomise(ViT(ViTConfig(**SIZES))).patch_embedding
    x = images()
    cut = [  # in reading order, each flattened as (channel, row, column)
        x[:, :, r : r + 4, c : c + 4].flatten(1) for r in range(0, 16, 4) for c in range(0, 16, 4)
    ]
    weight, bias = patches.conv.weight.flatten(1), patches.conv.bias
    expected = torch.stack(cut, dim=1) @ weight.T + bias + patches.position_embedding
    torch.testing.assert_close(patches(x), expected, rtol=0, atol=1e-5)
    reshaped = x.reshape(3, 16, -1) @ weight.T + bias + patches.position_embedding
    assert (patches(x) - reshaped).abs().max() > 0.5, "a reshape would cut rows, not squares"


@pytest.fixture
def siglip_pair(randomise):
    """(model, transformers' model) with the same weights; a large epsilon shows a wrong one."""
    torch.manual_seed(0)
    hf_cfg = SiglipVisionConfig(**HF_SIZES, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-3)
    reference = randomise(sharpen(SiglipVisionModel(hf_cfg)))
    model = ViT(ViTConfig(**SIZES, vit_ln_eps=1e-3, vit_pool="map")).eval()
    trunk = {k: v for k, v in model.state_dict().items() if not k.startswith("map_pool")}
    found = {k: v for k, v in reference.state_dict().items() if not k.startswith("head.")}
    names = expand(siglip.TABLE, {"": 2})
    tensors = import_tensors(found, names, trunk, siglip.IGNORE, "siglip")
    head = reference.head
    for kind in ("weight", "bias"):
        q, k, v = getattr(head.attention, f"in_proj_{kind}").chunk(3)
        tensors |= {f"map_pool.attn.{n}_proj.{kind}": t for n, t in zip("qkv", (q, k, v))}
        tensors[f"map_pool.attn.out_proj.{kind}"] = getattr(head.attention.out_proj, kind)
        tensors[f"map_pool.ln.{kind}"] = getattr(head.layernorm, kind)
        tensors[f"map_pool.mlp.fc1.{kind}"] = getattr(head.mlp.fc1, kind)
        tensors[f"map_pool.mlp.fc2.{kind}"] = getattr(head.mlp.fc2, kind)
    tensors["map_pool.probe"] = head.probe
    model.load_state_dict(tensors)
    return model, reference


@torch.no_grad()
def test_equals_siglip(siglip_pair):
    model, reference = siglip_pair
    expected = reference(images())
    features = model.forward_features(images())
    torch.testing.assert_close(features, expected.last_hidden_state, rtol=0, atol=1e-5)
    torch.testing.assert_close(model(images()), expected.pooler_output, rtol=0, atol=1e-5)


@torch.no_grad()
def test_equals_vit_with_cls(randomise):
    hf_cfg = HFViTConfig(**HF_SIZES, hidden_act="gelu", layer_norm_eps=1e-12)
    reference = randomise(sharpen(ViTModel(hf_cfg, add_pooling_layer=False)))
    cfg = ViTConfig(**SIZES, vit_hidden_act="gelu", vit_ln_eps=1e-12, vit_cls_flag=True)
    model = ViT(cfg).eval()
    found = reference.state_dict()
    tensors = {
        "patch_embedding.cls_token": found.pop("embeddings.cls_token")[0, 0],
        "patch_embedding.position_embedding": found.pop("embeddings.position_embeddings")[0],
    }
    renames = {
        "embeddings.patch_embeddings.projection": "patch_embedding.conv",
        "layernorm_before": "ln1",
        "layernorm_after": "ln2",
        "attention.o_proj": "attn.out_proj",
        "attention.": "attn.",
        "layers.": "blocks.",
        "layernorm": "layer_norm",
    }
    for name, tensor in found.items():
        for old, new in renames.items():
            name = name.replace(old, new)
        tensors[name] = tensor
    model.load_state_dict(tensors)
    expected = reference(images()).last_hidden_state
    torch.testing.assert_close(model.forward_features(images()), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(model(images()), expected[:, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("act", ["gelu_tanh", "gelu", "quick_gelu", "relu"])
def test_activations_equal_transformers(act):
    from transformers.activations import ACT2FN

    hf_name = {"gelu_tanh": "gelu_pytorch_tanh"}.get(act, act)
    x = torch.linspace(-5, 5, 1001)
    expected = ACT2FN[hf_name](x)
    torch.testing.assert_close(vision_transformer.ACTIVATIONS[act](x), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("n_registers", [0, 3])
@pytest.mark.parametrize("cls", [False, True])
@torch.no_grad()
def test_cls_and_registers_precede_patches(cls, n_registers, randomise):
    cfg = ViTConfig(**SIZES, vit_cls_flag=cls, vit_n_registers=n_registers)
    vit = randomise(ViT(cfg))
    n_prefix = int(cls) + n_registers
    tokens, features = vit.patch_embedding(images()), vit.forward_features(images())
    assert tokens.shape == features.shape == (3, n_prefix + 16, 32)
    if cls:
        first = vit.patch_embedding.cls_token + vit.patch_embedding.position_embedding[0]
        assert torch.equal(tokens[:, 0], first.expand(3, -1))
    if n_registers:
        registers = vit.patch_embedding.registers  # without a position
        assert torch.equal(tokens[:, int(cls) : n_prefix], registers.expand(3, -1, -1))
    conv = vit.patch_embedding.conv(images()).flatten(2).transpose(1, 2)
    placed = conv + vit.patch_embedding.position_embedding[int(cls) :]
    assert torch.equal(tokens[:, n_prefix:], placed)
    assert torch.equal(vit.patches(images()), features[:, n_prefix:])
    assert torch.equal(vit(images()), features[:, 0] if cls else features[:, n_prefix:])


@torch.no_grad()
def test_pools(randomise):
    sizes = SIZES | dict(vit_cls_flag=True, vit_n_registers=2)
    for pool, pool_tokens in {
        "cls": lambda x: x[:, 0],
        "none": lambda x: x[:, 3:],
        "mean": lambda x: x[:, 3:].sum(1) / 16,  # without CLS and registers
    }.items():
        vit = randomise(ViT(ViTConfig(**sizes, vit_pool=pool)))
        expected = pool_tokens(vit.forward_features(images()))
        torch.testing.assert_close(vit(images()), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 3, 20, 16), (2, 3, 32, 32), (2, 1, 16, 16), (2, 3, 8, 32)])
def test_wrong_image_shapes_raise(shape):
    with pytest.raises(ValueError, match=rf"{shape[1]}, {shape[2]}, {shape[3]}.*3, 16, 16"):
        ViT(ViTConfig(**SIZES))(torch.zeros(shape))


VARIANTS = [
    {},
    dict(vit_pool="map"),
    dict(vit_pool="map", vit_qkv_bias=False),
    dict(vit_pool="mean", vit_n_registers=2),
    dict(vit_cls_flag=True, vit_n_registers=2, vit_qkv_bias=False),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_parameter_is_initialised(variant, monkeypatch):
    """NaN in every new parameter first: PyTorch's defaults cannot hide a missing initialisation."""
    original = init.init_weights

    def fill_with_nan_first(module, n_residual):
        for p in module.parameters():
            torch.nn.init.constant_(p, torch.nan)
        original(module, n_residual)

    monkeypatch.setattr(vision_transformer, "init_weights", fill_with_nan_first)
    torch.manual_seed(0)
    vit = ViT(ViTConfig(**SIZES, **variant))
    for name, p in vit.named_parameters():
        assert p.isfinite().all(), name
        if p.ndim == 1 and "cls_token" not in name:
            expected = 1.0 if name.endswith("weight") else 0.0
            assert (p == expected).all(), f"{name}: a norm's weight or a bias"
        else:
            assert p.std() > 0.005, name
    assert vit(images()).isfinite().all()


def test_the_residual_stream_keeps_its_scale_with_depth():
    """Weights have variance 1/fan_in, and those of the 2 n residual branches 1/(2 n) of it."""
    torch.manual_seed(0)
    vit = ViT(ViTConfig(**SIZES | dict(vit_n_blocks=16, vit_hidden_dim=64, vit_inter_dim=128)))
    fan_in = vit.blocks[3].mlp.fc1.weight.std() * 64**0.5
    residual = vit.blocks[3].mlp.fc2.weight.std() * 128**0.5 * 32**0.5
    assert 0.95 < fan_in < 1.05 and 0.95 < residual < 1.05  # 8192 draws: a standard error of 0.8 %


@torch.no_grad()
def test_dropout_is_active_in_training_only(randomise):
    vit = randomise(ViT(ViTConfig(**SIZES, vit_dropout=0.5)))
    plain = randomise(ViT(ViTConfig(**SIZES)))
    plain.load_state_dict(vit.state_dict())
    assert torch.equal(vit(images()), plain(images()))
    assert torch.equal(plain.train()(images()), plain.eval()(images()))
    vit.train()
    assert not torch.equal(vit(images()), vit(images()))
    attn = vit.blocks[0].attn  # has no nn.Dropout; it passes its rate to the kernel
    x = torch.randn(2, 5, 32)
    assert not torch.equal(attn(x), attn(x))
    attn.eval()
    assert torch.equal(attn(x), attn(x))


@pytest.mark.parametrize("silent", ["attn", "mlp"])
@torch.no_grad()
def test_dropout_applies_to_both_branches(silent, monkeypatch):
    block = ViT(ViTConfig(**SIZES, vit_dropout=0.5)).blocks[0].train()
    block.attn.eval()  # no dropout inside attention, only on the branch
    monkeypatch.setattr(getattr(block, silent), "forward", torch.zeros_like)
    x = torch.randn(2, 5, 32)
    assert not torch.equal(block(x), block(x))


def test_patch_embedding_gradient_reaches_every_position():
    patches = ViTPatchEmbeddings(ViTConfig(**SIZES, vit_cls_flag=True, vit_n_registers=1))
    for p in patches.parameters():
        torch.nn.init.normal_(p)
    F.mse_loss(patches(images()), torch.zeros(3, 18, 32)).backward()
    for name, p in patches.named_parameters():
        assert (p.grad.flatten(1) if p.ndim > 1 else p.grad).abs().sum(-1).min() > 0, name
