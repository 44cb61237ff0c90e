"""int8 weights: rounding per row, and products with the rounded weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from config_tools import InputError
from engine.inference.chat import Chat
from engine.training.distributed import missing_compiler
from models.inference import int8
from models.inference.compile import compile_decoding
from models.inference.generate import steps
from models.inference.int8 import Int8Linear, quantize_int8
from models.inference.sampling import Sampling


def weights(n: int, k: int) -> torch.Tensor:
    """Rows of very different scales, one of them zero."""
    g = torch.Generator().manual_seed(0)
    rows = 10 ** torch.linspace(-3, 2, n)[:, None]
    return torch.randn(n, k, generator=g) * rows * (torch.arange(n) != 2)[:, None]


def test_weights_are_rounded_per_row():
    expected = weights(7, 20)
    found = Int8Linear(expected).weight
    tolerance = expected.abs().amax(1, keepdim=True) / 127 / 2  # half a rounding step
    assert ((found - expected).abs() <= tolerance * 1.0001).all()
    assert (found - expected).norm() > 1e-4 * expected.norm(), "weights are rounded"
    assert not found[2].any()


def test_every_byte_is_read_as_signed():
    """All 255 levels in each of the four bytes of a word."""
    levels = torch.arange(-127, 128.0)
    wide = torch.stack([torch.roll(levels, i) for i in range(4)]).T.contiguous()  # [255, 4]
    wide = torch.cat((wide, torch.full((255, 4), 127.0)), 1)  # makes every scale 1
    layer = Int8Linear(wide)
    assert torch.equal(layer.weight, wide)
    assert torch.equal(layer(torch.eye(8)), wide.T)
    assert torch.equal(layer._by_lanes(torch.eye(8)) * layer.scale, wide.T)


@pytest.mark.parametrize("shape", [(20,), (1, 20), (3, 1, 20), (9, 20), (2, 0, 20)], ids=str)
@pytest.mark.parametrize("max_bytes", [1 << 19, 50])
def test_product_equals_that_of_the_rounded_matrix(shape, max_bytes, monkeypatch):
    """Both implementations, for any number of rows, whole or in chunks."""
    monkeypatch.setattr(int8, "MAX_WEIGHT_BYTES", max_bytes)
    layer, x = Int8Linear(weights(7, 20)), torch.randn(shape)
    expected = F.linear(x, layer.weight) / layer.scale  # in units of a rounding step
    lanes = layer._by_lanes(x.reshape(-1, 20)).view(expected.shape)
    for found in (layer(x) / layer.scale, lanes):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)


def test_fp16_products_stay_finite():
    """The scale is applied after the sum: levels up to 127 would overflow fp16's 65,504."""
    layer = Int8Linear(torch.ones(4, 576))
    assert layer(torch.ones(9, 576).half()).tolist() == [[576.0] * 4] * 9


def test_words_keep_their_bits_when_the_dtype_changes():
    """`module.to(dtype)` would convert them, since they are stored as floats."""
    layer = Int8Linear(weights(7, 20))
    before = layer.weight
    x = torch.randn(3, 20).bfloat16()
    layer.bfloat16()
    assert torch.equal(layer.weight, before)
    found = layer(x)
    assert found.dtype == torch.bfloat16
    expected = F.linear(x.float(), before)  # rounded before and after the scale
    torch.testing.assert_close(found.float(), expected, rtol=2**-7, atol=0)


def test_other_layers_are_not_quantized():
    odd, biased, even = nn.Linear(6, 4, bias=False), nn.Linear(8, 4), nn.Linear(8, 4, bias=False)
    model = nn.Sequential(odd, biased, nn.Sequential(even))
    quantize_int8(model)
    assert model[0] is odd and model[1] is biased and type(model[2][0]) is Int8Linear


SHORT = Sampling(max_new_tokens=6)


@pytest.fixture
def chat_and_prompt(small_checkpoint):
    chat = Chat.load(small_checkpoint)
    return chat, chat.encode_prompt("What is this?")


def test_decoder_answers_with_its_rounded_weights(chat_and_prompt, small_checkpoint):
    """All matrices of the decoder, none of the encoder; a tied embedding is unchanged."""
    chat, tokens = chat_and_prompt
    int8_chat, reference = Chat.load(small_checkpoint), Chat.load(small_checkpoint)
    quantize_int8(int8_chat.model.decoder)
    layers = dict(int8_chat.model.named_modules())
    for name, module in chat.model.named_modules():
        if isinstance(module, nn.Linear):
            is_rounded = name.startswith("decoder")
            assert (type(layers[name]) is Int8Linear) == is_rounded, name
            if is_rounded and name != "decoder.head":
                reference.model.get_submodule(name).weight.data.copy_(layers[name].weight)
    reference.model.decoder.head.weight = nn.Parameter(layers["decoder.head"].weight)
    assert torch.equal(
        layers["decoder.token_embedding"].weight, chat.model.decoder.token_embedding.weight
    )
    logits, int8_logits, expected = (
        next(iter(c.stream_chunks(tokens))).logits for c in (chat, int8_chat, reference)
    )
    torch.testing.assert_close(int8_logits, expected, rtol=1e-4, atol=1e-4)
    assert (int8_logits - logits).norm() > 1e-3 * logits.norm()
    answers = (c.generate_answers([tokens], SHORT) for c in (int8_chat, reference))
    assert next(answers) == next(answers)


def test_int8_models_cannot_be_saved(chat_and_prompt, tmp_path):
    model = chat_and_prompt[0].model
    quantize_int8(model.decoder)
    for part in (model, model.decoder):
        with pytest.raises(InputError, match="an int8 model cannot be saved; save it before"):
            part.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_loss_with_an_int8_head(chat_and_prompt):
    """Evaluation uses the dequantized head."""
    decoder = chat_and_prompt[0].model.decoder
    quantize_int8(decoder)
    hidden, targets = torch.randn(1, 5, decoder.cfg.lm_hidden_dim), torch.arange(5)[None]
    with torch.no_grad():
        expected = F.cross_entropy(decoder.logits(hidden)[0], targets[0])
        torch.testing.assert_close(decoder.loss(hidden, targets), expected)


@pytest.mark.slow
def test_compiled_int8_steps_give_the_same_tokens(chat_and_prompt, small_checkpoint):
    """For one row and for two rows."""
    if why := missing_compiler(torch.device("cpu")):
        pytest.skip(why)
    chat, tokens = chat_and_prompt
    quantize_int8(chat.model.decoder)
    plain = replace(chat, model=Chat.load(small_checkpoint).model)
    quantize_int8(plain.model.decoder)
    compile_decoding(chat.model)
    for rows in (1, 2):
        ids = torch.as_tensor(tokens.ids)[None].repeat(rows, 1).long()
        found = [[s.tokens for s in steps(c.model, ids, None, None, SHORT)] for c in (chat, plain)]
        assert len(found[0]) > 2 and all(map(torch.equal, *found))
