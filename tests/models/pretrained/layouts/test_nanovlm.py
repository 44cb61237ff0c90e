"""Loading and saving nanoVLM's checkpoints: its parameter names and its unnormalised pixels.

nanoVLM is not a dependency. The files are made from our tensors without the table under test:
names are replaced one by one, and q, k and v are stacked in a loop.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from config_tools import InputError
from models.pretrained import save
from models.vision_language_model import VisionLanguageModel

BASE = 101
TILES = {f"r{r}c{c}": f"<row_{r}_col_{c}>" for r in range(1, 9) for c in range(1, 9)}
CURRENT = {
    "lm_base_vocab_size": BASE,
    "extra_token_amount": 66,
    "mp_image_token_length": 4,
    "max_img_size": 64,
    "vlm_extra_tokens": {"image_token": "<|image|>", "global_image_token": "<|global|>"} | TILES,
}
FIRST_RELEASE = {"lm_eos_token_id": 0, "lm_max_length": 79}
COMMON = (
    "vit_hidden_dim vit_inter_dim vit_patch_size vit_img_size vit_n_heads vit_dropout vit_n_blocks "
    "vit_ln_eps vit_cls_flag vit_model_type lm_hidden_dim lm_inter_dim lm_rms_eps lm_re_base "
    "lm_max_position_embeddings lm_n_heads lm_n_kv_heads lm_dropout lm_n_blocks lm_tie_weights "
    "lm_model_type lm_tokenizer mp_pixel_shuffle_factor"
)


def nano_tensors(model: VisionLanguageModel, vocab: int) -> dict[str, torch.Tensor]:
    """nanoVLM's names and vocabulary size; tied weights are stored once, as the head."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for i in range(model.cfg.vit_n_blocks):
        for kind in ("weight", "bias"):
            name = f"vision_encoder.blocks.{i}.attn."
            rows = []
            for p in "qkv":
                rows += list(state.pop(f"{name}{p}_proj.{kind}"))
            state[f"{name}qkv_proj.{kind}"] = torch.stack(rows)
    for i in range(model.cfg.lm_n_blocks):
        name = f"decoder.blocks.{i}.attn."
        state[f"{name}out_proj.weight"] = state.pop(f"{name}o_proj.weight")
    position = "vision_encoder.patch_embedding.position_embedding"
    state[position] = state[position].unsqueeze(0)
    state["decoder.rotary_embd.inv_freq"] = torch.ones(6)
    for name in ("decoder.token_embedding.weight", "decoder.head.weight"):
        state[name] = state[name][:vocab].clone()
    if model.cfg.lm_tie_weights:
        del state["decoder.token_embedding.weight"]
    return state


@pytest.fixture
def write(small_model, tmp_path):
    def write(kind: dict, vocab: int, **fields):
        """(a model of the same weights for pixels in [0, 1], directory)."""
        model = small_model(lm_vocab_size=vocab, **fields)
        config = {name: getattr(model.cfg, name) for name in COMMON.split()} | kind
        config |= {"lm_vocab_size": vocab, "lm_re_base": 10000, "lm_attn_scaling": 1.0}
        (tmp_path / "config.json").write_text(json.dumps(config))
        save_file(nano_tensors(model, vocab), tmp_path / "model.safetensors")
        return model, tmp_path

    return write


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("kind", "vocab"), [(CURRENT, BASE + 66), (FIRST_RELEASE, BASE)])
@torch.no_grad()
def test_normalised_pixels_give_the_logits_of_raw_pixels(kind, vocab, tied, write, make_sample):
    reference, folder = write(kind, vocab, lm_tie_weights=tied)
    model = VisionLanguageModel.from_pretrained(folder)
    ids, _ = make_sample(reference.cfg, 2, 20, seed=0)
    ids = ids.clamp(max=BASE - 1)
    raw = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    expected, _ = reference(ids[None], raw)
    is_image = ids == reference.cfg.vlm_image_token_id
    model_ids = ids.masked_fill(is_image, model.cfg.vlm_image_token_id)
    logits, _ = model(model_ids[None], (raw - 0.5) / 0.5)
    torch.testing.assert_close(logits[..., :BASE], expected[..., :BASE], rtol=0, atol=1e-5)
    assert (model(model_ids[None], raw)[0][..., :BASE] - expected[..., :BASE]).abs().max() > 0.1
    assert model.cfg.lm_vocab_size == BASE + 128 and model.cfg.lm_tie_weights == tied
    assert model.cfg.max_img_size == (64 if kind is CURRENT else 16)


@torch.no_grad()
def test_tokens_with_the_same_meaning_keep_their_row(write):
    reference, folder = write(CURRENT, BASE + 66, lm_tie_weights=False)
    model = VisionLanguageModel.from_pretrained(folder)
    for before, after in (
        (reference.decoder.token_embedding.weight, model.decoder.token_embedding.weight),
        (reference.decoder.head.weight, model.decoder.head.weight),
    ):
        assert torch.equal(after[:BASE], before[:BASE])
        assert torch.equal(after[BASE], before[BASE + 1])  # the global view
        assert torch.equal(after[BASE + 1 + 6 * 2 + 3], before[BASE + 2 + 8 * 2 + 3])  # row 3 col 4
        assert torch.equal(after[BASE + 38], before[BASE])  # <image>
        assert torch.equal(after[BASE + 127], before[2])  # the end of turn was <|im_end|>
        torch.testing.assert_close(after[BASE + 37], before[:BASE].mean(0))


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_save_nanovlm(tied, small_model, tmp_path):
    model = small_model(lm_tie_weights=tied)
    save.save_nanovlm(model, tmp_path)
    expected = nano_tensors(model, BASE)
    conv = "vision_encoder.patch_embedding.conv."
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == expected.keys()
    same = found.keys() - {conv + "weight", conv + "bias", "decoder.rotary_embd.inv_freq"}
    assert all(torch.equal(found[name], expected[name]) for name in same)
    raw = torch.rand(2, 3, 16, 16)
    patches = model.vision_encoder.patch_embedding.conv((raw - 0.5) / 0.5)
    found_patches = torch.conv2d(raw, found[conv + "weight"], found[conv + "bias"], stride=4)
    torch.testing.assert_close(found_patches, patches, rtol=0, atol=1e-5)
    freq = found["decoder.rotary_embd.inv_freq"]
    torch.testing.assert_close(freq, 10000.0 ** (-torch.arange(0, 12, 2) / 12))
    config = json.loads((tmp_path / "config.json").read_text())
    assert set(COMMON.split()) <= set(config) and config["mp_image_token_length"] == 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(vit_cls_flag=True), "vit_cls_flag = True"),
        (dict(lm_qk_norm=True), "lm_qk_norm = True"),
        (dict(vit_hidden_act="gelu"), "vit_hidden_act = 'gelu'"),
        (dict(lm_head_dim=20), "lm_head_dim = 20"),
        (dict(vit_image_mean=(0.5, 0.4, 0.5)), r"vit_image_mean = \(0\.5, 0\.4, 0\.5\)"),
    ],
)
def test_fields_that_nanovlm_does_not_support(fields, message, small_model, tmp_path):
    with pytest.raises(InputError, match=message):
        save.save_nanovlm(small_model(**fields), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tensors_and_fields_that_do_not_match(write):
    _, folder = write(CURRENT, BASE + 66)
    tensors = load_file(folder / "model.safetensors")
    tensors["decoder.extra"] = torch.zeros(2)
    del tensors["decoder.blocks.1.norm2.weight"]
    qkv = "vision_encoder.blocks.0.attn.qkv_proj.weight"
    tensors[qkv] = tensors[qkv][:-1].clone()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError) as error:
        VisionLanguageModel.from_pretrained(folder)
    for words in ("left over: decoder.extra", "missing: decoder.blocks.1.norm2.weight",
                  f"misshapen: {qkv} is [95, 32], expected [96, 32]"):  # fmt: skip
        assert words in str(error.value)
    config = json.loads((folder / "config.json").read_text())
    del config["lm_hidden_dim"], config["vit_n_heads"]
    (folder / "config.json").write_text(json.dumps(config | {"lm_hidden_dim": 48}))
    with pytest.raises(InputError, match=r"missing fields = \['vit_n_heads'\]"):
        VisionLanguageModel.from_pretrained(folder)
