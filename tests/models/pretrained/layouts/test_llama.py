"""Decoders: loaded from checkpoints of transformers' classes and saved for these classes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import transformers as hf

from config_tools import InputError
from configs import LMConfig
from models.language_model import LanguageModel
from models.pretrained.layouts import llama

# A large epsilon makes a wrong one visible; different sizes reveal swapped dimensions.
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
IDS = torch.randint(3, 101, (2, 70), generator=torch.Generator().manual_seed(3))


def close(model: torch.Tensor, reference: torch.Tensor) -> None:
    torch.testing.assert_close(model, reference, rtol=0, atol=1e-5)


def load_lm(folder, **fields) -> LanguageModel:
    return LanguageModel.from_pretrained(
        LMConfig(lm_vocab_size=3, lm_model_type=str(folder), **fields)
    )


def lm_logits(lm: LanguageModel, ids: torch.Tensor) -> torch.Tensor:
    return lm.logits(lm(lm.token_embedding(ids)))


@pytest.fixture(params=LANGUAGE)
def decoder(request, tmp_path, randomise_all):
    torch.manual_seed(0)
    reference = randomise_all(hf.AutoModelForCausalLM.from_config(LANGUAGE[request.param]))
    reference.save_pretrained(tmp_path / "reference")
    return reference, tmp_path / "reference"


# --- Load and save --------------------------------------------------------------------------------


@torch.no_grad()
def test_decoders_equal_transformers_both_ways(decoder, tmp_path):
    reference, folder = decoder
    model = load_lm(folder, lm_dropout=0.1)
    expected = reference(IDS).logits
    assert expected.std() > 0.3
    close(lm_logits(model, IDS), expected)
    tied = model.head.weight is model.token_embedding.weight
    assert tied == reference.config.tie_word_embeddings == model.cfg.lm_tie_weights

    model.save_pretrained(tmp_path / "model")
    again, info = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(again) is type(reference)
    close(again.eval()(IDS).logits, expected)
    twice = load_lm(tmp_path / "model")
    assert replace(twice.cfg, lm_model_type="") == replace(
        model.cfg, lm_model_type="", lm_dropout=0.0
    )


@torch.no_grad()
def test_cached_decoding_with_nope_blocks(tmp_path, randomise_all):
    """With NoPE blocks, decoding token by token equals one forward pass."""
    from models.inference.kv_cache import KVCache

    hf.SmolLM3ForCausalLM(LANGUAGE["smollm3"]).save_pretrained(tmp_path)
    model = randomise_all(load_lm(tmp_path)).double()
    cache = KVCache(model.cfg, 2, 70, torch.device("cpu"), torch.float64)
    steps = [
        model.logits(model(x, torch.full((2, 1), t), cache=cache))
        for t, x in enumerate(model.token_embedding(IDS).split(1, dim=1))
    ]
    torch.testing.assert_close(torch.cat(steps, 1), lm_logits(model, IDS), rtol=0, atol=1e-10)


# --- The same weights in other files --------------------------------------------------------------


@torch.no_grad()
def test_shards_and_a_decoder_without_a_head(tmp_path, randomise_all, edit_weights):
    reference = randomise_all(hf.Qwen3ForCausalLM(LANGUAGE["qwen3"]))
    reference.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    expected = reference(IDS).logits
    close(lm_logits(load_lm(tmp_path / "shards"), IDS), expected)
    bare = tmp_path / "bare"
    reference.model.save_pretrained(bare)  # names without `model.`
    close(lm_logits(load_lm(bare), IDS), expected)
    edit_weights(bare, lambda t: t.update({"lm_head.weight": t["embed_tokens.weight"].clone()}))
    close(lm_logits(load_lm(bare), IDS), expected)
    edit_weights(bare, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(InputError, match="embedding and head differ"):
        load_lm(bare)


@torch.no_grad()
def test_config_json_of_transformers_4(tmp_path, randomise_all):
    """rope_theta and rope_scaling replace rope_parameters; SmolLM3 is tied by default."""
    reference = randomise_all(hf.LlamaForCausalLM(LANGUAGE["llama3 rope"]))
    reference.save_pretrained(tmp_path / "llama")
    config = json.loads((tmp_path / "llama" / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "head_dim": None}
    (tmp_path / "llama" / "config.json").write_text(json.dumps(config))
    model = load_lm(tmp_path / "llama")
    close(lm_logits(model, IDS), reference(IDS).logits)
    reference = randomise_all(hf.SmolLM3ForCausalLM(LANGUAGE["smollm3"]))
    reference.save_pretrained(tmp_path / "smollm3")
    config = json.loads((tmp_path / "smollm3" / "config.json").read_text())
    for key in ("tie_word_embeddings", "no_rope_layers", "rope_parameters"):
        del config[key]
    (tmp_path / "smollm3" / "config.json").write_text(json.dumps(config))
    model = load_lm(tmp_path / "smollm3")
    close(lm_logits(model, IDS), reference(IDS).logits)


@pytest.mark.parametrize("kind", llama.DEFAULTS)
def test_absent_keys_get_the_defaults_of_transformers(kind):
    reference = hf.AutoConfig.for_model(kind)
    model = llama.read({"model_type": kind}, "config.json")
    assert model == llama.read(reference.to_dict(), "config.json")


# --- Another size ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_new_rows_are_the_mean(tied, tmp_path, randomise_all):
    config = hf.LlamaConfig(**DECODER, tie_word_embeddings=tied)
    reference = randomise_all(hf.LlamaForCausalLM(config))
    reference.save_pretrained(tmp_path)
    model = LanguageModel.from_pretrained(LMConfig(lm_vocab_size=120, lm_model_type=str(tmp_path)))
    assert model.cfg.lm_vocab_size == 120
    old = reference.get_input_embeddings().weight, reference.get_output_embeddings().weight
    for new, before in zip((model.token_embedding.weight, model.head.weight), old):
        assert new.shape == (120, 48) and torch.equal(new[:101], before)
        torch.testing.assert_close(new[101:], before.mean(0).expand(19, -1))
    assert (model.head.weight is model.token_embedding.weight) == tied
    close(lm_logits(model, IDS)[..., :101], reference(IDS).logits)


# --- Error messages -------------------------------------------------------------------------------


def test_tensors_that_do_not_match(decoder, damage):
    _, folder = decoder
    missing, misshapen = damage(folder)
    with pytest.raises(InputError) as error:
        load_lm(folder)
    assert f"left over: extra.weight; missing: {missing}; misshapen: {misshapen} is [" in str(
        error.value
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "attention_bias = True: is not supported; expected False"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"use_sliding_window": True}, "use_sliding_window = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type = 'yarn': must be one of default"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"model_type": "gemma2"}, "model_type = 'gemma2': must be one of llama, smollm3"),
        ({"num_key_value_heads": 3}, "lm_n_kv_heads = 3: must divide"),
        ({"num_hidden_layers": 10**12}, "blocks = 1000000000000: exceed the file's"),
        ({"vocab_size": 10**40}, "a model of these sizes cannot be built"),
    ],
)
def test_errors_of_a_decoder_config(changes, message, tmp_path, edit_config):
    hf.LlamaForCausalLM(LANGUAGE["llama"]).save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(InputError) as error:
        load_lm(tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_irregular_nope_blocks_raise(tmp_path, edit_config):
    hf.SmolLM3ForCausalLM(LANGUAGE["smollm3"]).save_pretrained(tmp_path)
    edit_config(tmp_path, no_rope_layers=[1, 0, 0, 1, 1])
    with pytest.raises(InputError, match=r"no_rope_layers = .*at a fixed interval"):
        load_lm(tmp_path)


# --- Our own layout -------------------------------------------------------------------------------


def test_decoders_that_transformers_does_not_support(tmp_path, randomise_all):
    model = randomise_all(
        LanguageModel(LMConfig(lm_qkv_bias=True, lm_qk_norm=True, lm_nope_every=2))
    )
    model.save_pretrained(tmp_path)
    assert torch.equal(lm_logits(load_lm(tmp_path), IDS), lm_logits(model, IDS))


# --- Trained weights ------------------------------------------------------------------------------


@torch.no_grad()
def test_stories260k_generates_the_same_text(shared):
    folder = shared / "weights" / "stories260k_llama" / "hf"
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    reference = hf.AutoModelForCausalLM.from_pretrained(folder).eval()
    model = load_lm(folder)
    ids = torch.tensor([[1] + tokenizer("Once upon a time", add_special_tokens=False).input_ids])
    start = ids.shape[1]
    expected = reference.generate(ids, do_sample=False, max_new_tokens=200, eos_token_id=None)
    for _ in range(200):
        ids = torch.cat((ids, lm_logits(model, ids)[:, -1:].argmax(-1)), 1)
    text = tokenizer.decode(ids[0, start:])
    assert torch.equal(ids, expected), text
    assert "there was a little girl named Lily" in text
