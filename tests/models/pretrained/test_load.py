"""Saving and loading whole models: bit-identical, in transformers, and from damaged files."""

from __future__ import annotations

import json
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from config_tools import InputError
from models.vision_language_model import VisionLanguageModel

LLAMA3 = dict(
    lm_rope_type="llama3",
    lm_rope_factor=8.0,
    lm_rope_low_freq_factor=1.0,
    lm_rope_high_freq_factor=4.0,
    lm_rope_original_max_positions=64,
    lm_re_base=500.0,
)
IDEFICS3 = {
    "tied": {},
    "untied": dict(lm_tie_weights=False),
    "llama3 rope": dict(lm_tie_weights=False, **LLAMA3),
    "linear rope": dict(lm_rope_type="linear", lm_rope_factor=4.0),
    "head_dim": dict(lm_head_dim=20, lm_n_kv_heads=1),
    "qwen2": dict(lm_tie_weights=False, lm_qkv_bias=True),
    "qwen3": dict(lm_tie_weights=False, lm_qk_norm=True, lm_head_dim=20, lm_rms_eps=1e-6),
    "gelu": dict(vit_hidden_act="gelu", vit_ln_eps=1e-3, lm_rms_eps=1e-3),
}
OWN_LAYOUT = {
    "cls": dict(vit_cls_flag=True),
    "registers": dict(vit_n_registers=2, lm_tie_weights=False),
    "no bias": dict(vit_qkv_bias=False),
    "qwen2 and 3": dict(lm_qkv_bias=True, lm_qk_norm=True),
}


@pytest.fixture
def samples(small_config, make_sample):
    cfg = small_config()
    return [make_sample(cfg, n, words, seed) for seed, (n, words) in enumerate([(2, 5), (1, 12)])]


@pytest.fixture
def saved(small_model, tmp_path):
    """(model, directory) of the tied default."""
    model = small_model()
    model.save_pretrained(tmp_path)
    return model, tmp_path


def read_config(directory) -> dict:
    return json.loads((directory / "config.json").read_text())


@pytest.mark.parametrize("name", IDEFICS3 | OWN_LAYOUT)
@torch.no_grad()
def test_save_and_load_is_bit_identical(name, small_model, samples, pad_rows, tmp_path):
    model = small_model(**(IDEFICS3 | OWN_LAYOUT)[name])
    model.save_pretrained(tmp_path / "new" / "folder")
    again = VisionLanguageModel.from_pretrained(tmp_path / "new" / "folder").eval()
    assert again.cfg == model.cfg
    batch = pad_rows(model.cfg, samples, "left")
    assert torch.equal(again(*batch)[0], model(*batch)[0])
    state, other = model.state_dict(), again.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[key], other[key]) for key in state)
    assert all(p.requires_grad and not p.is_meta for p in again.parameters())
    tied = again.decoder.head.weight is again.decoder.token_embedding.weight
    assert tied == model.cfg.lm_tie_weights
    kind = "idefics3" if name in IDEFICS3 else "picovlm"
    assert read_config(tmp_path / "new" / "folder")["model_type"] == kind


def test_loaded_tensors_are_aligned(saved):
    """MKL rounds products of unaligned tensors differently; resuming would not be bit-identical."""
    _, directory = saved
    with safe_open(directory / "model.safetensors", "pt") as file:
        names = list(file.keys())
        assert any(file.get_tensor(name).data_ptr() % 64 for name in names), "unaligned in the file"
    model = VisionLanguageModel.from_pretrained(directory)
    assert {p.data_ptr() % 64 for p in model.parameters()} == {0}


def test_tied_weights_stay_tied_in_training(saved):
    _, directory = saved
    model = VisionLanguageModel.from_pretrained(directory)
    ids = torch.full((1, 4), 9)
    model(ids, targets=ids)[1].backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert torch.equal(model.decoder.head.weight, model.decoder.token_embedding.weight)


def test_bf16_is_kept(small_model, tmp_path):
    model = small_model().bfloat16()
    model.save_pretrained(tmp_path)
    assert read_config(tmp_path)["torch_dtype"] == "bfloat16"
    again = VisionLanguageModel.from_pretrained(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters()))
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", IDEFICS3)
@torch.no_grad()
def test_transformers_loads_it(name, small_model, samples, pad_rows, tmp_path):
    """Alone and as a batch of unequal tile counts, which transformers pads with all-zero images."""
    model = small_model(**IDEFICS3[name])
    model.save_pretrained(tmp_path)
    reference, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    reference.eval()
    assert reference.dtype == torch.float32 and type(reference).__name__.startswith("Idefics3")

    ids, images, mask = pad_rows(model.cfg, samples, "left")
    padded = torch.zeros(2, 2, 3, 16, 16)
    padded[0], padded[1, 0] = images[:2], images[2]
    expected = reference(input_ids=ids, attention_mask=mask, pixel_values=padded).logits
    assert expected.std() > 0.3, "logits must be large compared with the tolerance"
    real = mask.bool()
    torch.testing.assert_close(model(ids, images, mask)[0][real], expected[real], rtol=0, atol=1e-5)
    one, tiles = samples[0]
    expected = reference(input_ids=one[None], pixel_values=tiles[None]).logits
    torch.testing.assert_close(model(one[None], tiles)[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fields", [{}, dict(lm_tie_weights=False), LLAMA3], ids=str)
def test_config_json_has_every_key_that_engines_need(fields, small_model, tmp_path):
    """Without one of these keys, some inference engine silently uses its default."""
    model = small_model(**fields)
    model.save_pretrained(tmp_path)
    config = read_config(tmp_path)
    text, vision = config["text_config"], config["vision_config"]
    assert config["architectures"] == ["Idefics3ForConditionalGeneration"]
    assert config["model_type"] == "idefics3" and config["torch_dtype"] == "float32"
    assert (config["image_token_id"], config["scale_factor"], config["vocab_size"]) == (3, 2, 101)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    assert config.items() >= ids.items() and text.items() >= ids.items()
    # transformers 5 reads the top flag, 4 and vLLM the text flag; MLX-VLM has no tied head.
    assert config["tie_word_embeddings"] is text["tie_word_embeddings"] is False
    assert text["model_type"] == "llama"
    assert text["architectures"] == ["LlamaForCausalLM"]  # llama.cpp
    # transformers 4 and MLX-VLM read rope_theta, 5 reads rope_parameters.
    base = fields.get("lm_re_base", 10000.0)
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"] == base
    kind = fields.get("lm_rope_type", "default")
    assert text["rope_parameters"]["rope_type"] == kind
    if kind == "llama3":
        stretch = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
        stretch |= dict(rope_type="llama3", original_max_position_embeddings=64)
        assert text["rope_parameters"].items() >= stretch.items()
        assert text["rope_scaling"].items() >= stretch.items()
    sizes = dict(vocab_size=101, hidden_size=48, intermediate_size=72, num_hidden_layers=3)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=12, rms_norm_eps=1e-5)
    sizes |= dict(max_position_embeddings=128, hidden_act="silu", attention_bias=False)
    assert text.items() >= sizes.items()
    sizes = dict(hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_channels=3)
    sizes |= dict(num_attention_heads=2, image_size=16, patch_size=4, layer_norm_eps=1e-6)
    sizes |= dict(model_type="idefics3_vision", hidden_act="gelu_pytorch_tanh")
    assert vision.items() >= sizes.items()  # the defaults of the class are those of SigLIP so400m

    assert json.loads((tmp_path / "generation_config.json").read_text()) == ids | {
        "eos_token_id": [2]
    }
    weights = tmp_path / "model.safetensors"
    assert stat.S_IMODE(weights.stat().st_mode) == 0o644
    with safe_open(weights, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert {"lm_head.weight", "model.text_model.embed_tokens.weight"} <= set(file.keys())


# --- Damaged directories ------------------------------------------------------------------------


def refused(directory, *words: str) -> None:
    """The error is one sentence and contains the directory and `words`."""
    with pytest.raises(InputError) as error:
        VisionLanguageModel.from_pretrained(directory)
    message = str(error.value)
    assert "\n" not in message and message[-1] in ".?", message
    for word in (str(directory), *words):
        assert word in message, message


EMBED = "model.text_model.embed_tokens.weight"
NORM = "model.text_model.layers.1.input_layernorm.weight"


def test_a_leftover_a_missing_and_a_misshapen_tensor(saved, edit_weights):
    """One error lists all of them."""
    _, directory = saved

    def edit(tensors):
        tensors["model.extra.weight"] = torch.zeros(3)
        del tensors[NORM]
        position = "model.vision_model.embeddings.position_embedding.weight"
        tensors[position] = tensors[position][:9].clone()

    edit_weights(directory, edit)
    refused(
        directory,
        "left over: model.extra.weight",
        f"missing: {NORM}",
        "misshapen: model.vision_model.embeddings.position_embedding.weight is [9, 32]",
        "[16, 32]",
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinite_weights_raise(saved, edit_weights, value):
    """One such number makes the model answer every question with the same token."""
    _, directory = saved
    edit_weights(directory, lambda tensors: tensors[NORM][3:4].fill_(value))
    refused(directory, f"NaN or infinite weights in {NORM}; use another checkpoint")


@pytest.mark.parametrize("names", [[EMBED], ["lm_head.weight"]])
def test_one_missing_tied_weight_raises(names, saved, edit_weights):
    """picoVLM's own files hold both."""
    _, directory = saved
    edit_weights(directory, lambda tensors: [tensors.pop(name) for name in names])
    refused(directory, "missing", *names)


def test_tied_config_with_different_head_raises(saved, edit_weights):
    _, directory = saved
    edit_weights(directory, lambda tensors: tensors["lm_head.weight"].add_(0.01))
    refused(directory, "lm_tie_weights", "differ")


@torch.no_grad()
def test_buffers_of_older_transformers_are_ignored(saved, samples, pad_rows, edit_weights):
    model, directory = saved

    def edit(tensors):
        tensors["model.text_model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(6)
        tensors["model.vision_model.embeddings.position_ids"] = torch.arange(16)

    edit_weights(directory, edit)
    batch = pad_rows(model.cfg, samples, "right")
    again = VisionLanguageModel.from_pretrained(directory).eval()
    assert torch.equal(again(*batch)[0], model(*batch)[0])


@pytest.mark.parametrize("keep", [0, 4, 200, 60_000])
def test_a_truncated_file(keep, saved):
    _, directory = saved
    weights = directory / "model.safetensors"
    assert weights.stat().st_size > 2 * keep
    weights.write_bytes(weights.read_bytes()[:keep])
    refused(directory, "model.safetensors", "not a whole safetensors file")


def test_missing_files(saved):
    _, directory = saved
    (directory / "model.safetensors").unlink()
    refused(directory, "model.safetensors: no such file")
    (directory / "config.json").unlink()
    refused(directory, "config.json: no such file")
    with pytest.raises(InputError, match=r"nowhere: no such checkpoint directory\."):
        VisionLanguageModel.from_pretrained(directory / "nowhere")


def test_broken_configs(saved):
    _, directory = saved
    config = read_config(directory)

    def write(changed) -> None:
        (directory / "config.json").write_text(json.dumps(changed))

    (directory / "config.json").write_text('{"model_type": ')
    refused(directory, "config.json", "not JSON")
    write([1])
    refused(directory, "config.json", "JSON object")
    write({k: v for k, v in config.items() if k != "picovlm"})
    refused(
        directory, "preprocessor_config.json: no such file"
    )  # it is then read as a published checkpoint
    write({"model_type": "llava"})
    refused(directory, "config.json", "'llava'", "picovlm")
    write(config | {"picovlm": config["picovlm"] | {"vit_hiden_dim": 4}})
    refused(directory, "config.json", "'vit_hiden_dim'", "did you mean 'vit_hidden_dim'?")
    write(config | {"picovlm": config["picovlm"] | {"vit_hidden_dim": "wide"}})
    refused(directory, "vit_hidden_dim", "'wide'")
    write(config | {"picovlm": config["picovlm"] | {"format_version": 99}})
    refused(directory, "format_version", "99")
    write({k: v for k, v in config.items() if k != "model_type"})
    refused(directory, "config.json", "model_type")


# --- Shards -------------------------------------------------------------------------------------


@pytest.fixture
def sharded(saved):
    """The same checkpoint in two shards, as transformers writes large ones."""
    model, directory = saved
    tensors = load_file(directory / "model.safetensors")
    names = sorted(tensors)
    files = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in (0, 1)}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, directory / file)
    weight_map = {name: file for file, part in files.items() for name in part}
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    )
    (directory / "model.safetensors").unlink()
    return model, directory, weight_map


@torch.no_grad()
def test_shards_load(sharded, samples, pad_rows):
    model, directory, _ = sharded
    batch = pad_rows(model.cfg, samples, "right")
    again = VisionLanguageModel.from_pretrained(directory).eval()
    assert torch.equal(again(*batch)[0], model(*batch)[0])


def test_saving_over_shards_replaces_them(sharded, small_model, samples, pad_rows):
    """Also in transformers, which prefers the single file if there are both."""
    _, directory, _ = sharded
    new = small_model(lm_n_blocks=2)
    batch = pad_rows(new.cfg, samples, "right")
    index = (directory / "model.safetensors.index.json").read_bytes()
    for both in (False, True):
        new.save_pretrained(directory)
        if both:  # as in a Hub repository that had shards
            (directory / "model.safetensors.index.json").write_bytes(index)
        again = VisionLanguageModel.from_pretrained(directory).eval()
        assert torch.equal(again(*batch)[0], new(*batch)[0])


def test_a_missing_shard(sharded):
    _, directory, _ = sharded
    (directory / "model-00002-of-00002.safetensors").unlink()
    refused(directory, "model-00002-of-00002.safetensors: no such file")


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "x.bin", "..", "", 7, None],
)
def test_an_index_cannot_name_files_elsewhere(name, sharded):
    """Even if that file exists and is valid: a checkpoint is one directory."""
    _, directory, weight_map = sharded
    outside = directory.parent / "x.safetensors"
    save_file({"lm_head.weight": torch.zeros(101, 48)}, outside)
    weight_map["lm_head.weight"] = name
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    refused(directory, "index.json", str(name))
    outside.unlink()


@pytest.mark.parametrize("content", [{}, {"weight_map": ["a"]}, {"weight_map": None}], ids=str)
def test_an_index_without_a_map(content, sharded):
    _, directory, _ = sharded
    (directory / "model.safetensors.index.json").write_text(json.dumps(content))
    refused(directory, "weight_map")
