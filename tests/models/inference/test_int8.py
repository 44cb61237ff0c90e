"""8-bit matrices: rounded by their rows, and what is computed with them is what they hold."""

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
    """Rows of very different sizes, one of them zero."""
    g = torch.Generator().manual_seed(0)
    rows = 10 ** torch.linspace(-3, 2, n)[:, None]
    return torch.randn(n, k, generator=g) * rows * (torch.arange(n) != 2)[:, None]


def test_a_matrix_is_rounded_by_its_rows():
    wanted = weights(7, 20)
    found = Int8Linear(wanted).weight
    half = wanted.abs().amax(1, keepdim=True) / 127 / 2  # of a step
    assert ((found - wanted).abs() <= half * 1.0001).all()
    assert (found - wanted).norm() > 1e-4 * wanted.norm(), "nothing was rounded"
    assert not found[2].any()


def test_every_byte_is_read_with_its_sign():
    """All 255 steps in each of the four bytes of a word."""
    steps = torch.arange(-127, 128.0)
    wide = torch.stack([torch.roll(steps, i) for i in range(4)]).T.contiguous()  # [255, 4]
    wide = torch.cat((wide, torch.full((255, 4), 127.0)), 1)  # of every row the scale is 1
    layer = Int8Linear(wide)
    assert torch.equal(layer.weight, wide)
    assert torch.equal(layer(torch.eye(8)), wide.T)
    assert torch.equal(layer._by_lanes(torch.eye(8)) * layer.scale, wide.T)


@pytest.mark.parametrize("shape", [(20,), (1, 20), (3, 1, 20), (9, 20), (2, 0, 20)], ids=str)
@pytest.mark.parametrize("at_once", [1 << 19, 50])
def test_a_product_is_that_of_the_rounded_matrix(shape, at_once, monkeypatch):
    """By either way, of any number of rows, whole or in pieces."""
    monkeypatch.setattr(int8, "MAX_WEIGHT_BYTES", at_once)
    layer, x = Int8Linear(weights(7, 20)), torch.randn(shape)
    wanted = F.linear(x, layer.weight) / layer.scale  # in steps, of which there are 255
    lanes = layer._by_lanes(x.reshape(-1, 20)).view(wanted.shape)
    for found in (layer(x) / layer.scale, lanes):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-3)


def test_a_product_in_fp16_stays_finite():
    """It is scaled after the sum, which of weights up to 127 passes fp16's 65,504."""
    layer = Int8Linear(torch.ones(4, 576))
    assert layer(torch.ones(9, 576).half()).tolist() == [[576.0] * 4] * 9


def test_words_are_never_rounded():
    """They look like floats to a module that changes its dtype."""
    layer = Int8Linear(weights(7, 20))
    before = layer.weight
    x = torch.randn(3, 20).bfloat16()
    layer.bfloat16()
    assert torch.equal(layer.weight, before)
    found = layer(x)
    assert found.dtype == torch.bfloat16
    wanted = F.linear(x.float(), before)  # rounded twice: before the scale and behind it
    torch.testing.assert_close(found.float(), wanted, rtol=2**-7, atol=0)


def test_what_cannot_be_packed_stays():
    odd, biased, even = nn.Linear(6, 4, bias=False), nn.Linear(8, 4), nn.Linear(8, 4, bias=False)
    model = nn.Sequential(odd, biased, nn.Sequential(even))
    quantize_int8(model)
    assert model[0] is odd and model[1] is biased and type(model[2][0]) is Int8Linear


SHORT = Sampling(max_new_tokens=6)


@pytest.fixture
def asked(small_checkpoint):
    chat = Chat.load(small_checkpoint)
    return chat, chat.encode_prompt("What is this?")


def test_a_decoder_answers_with_its_rounded_matrices(asked, small_checkpoint):
    """All of the decoder's matrices, none of the encoder's; a tied embedding stays as it was."""
    chat, tokens = asked
    eight, by_hand = Chat.load(small_checkpoint), Chat.load(small_checkpoint)
    quantize_int8(eight.model.decoder)
    layers = dict(eight.model.named_modules())
    for name, module in chat.model.named_modules():
        if isinstance(module, nn.Linear):
            is_rounded = name.startswith("decoder")
            assert (type(layers[name]) is Int8Linear) == is_rounded, name
            if is_rounded and name != "decoder.head":
                by_hand.model.get_submodule(name).weight.data.copy_(layers[name].weight)
    by_hand.model.decoder.head.weight = nn.Parameter(layers["decoder.head"].weight)
    assert torch.equal(
        layers["decoder.token_embedding"].weight, chat.model.decoder.token_embedding.weight
    )
    whole, small, plain = (
        next(iter(c.stream_chunks(tokens))).logits for c in (chat, eight, by_hand)
    )
    torch.testing.assert_close(small, plain, rtol=1e-4, atol=1e-4)
    assert (small - whole).norm() > 1e-3 * whole.norm()
    assert eight.generate_answers([tokens], SHORT) == by_hand.generate_answers([tokens], SHORT)


def test_rounded_matrices_are_not_saved(asked, tmp_path):
    model = asked[0].model
    quantize_int8(model.decoder)
    for part in (model, model.decoder):
        with pytest.raises(InputError, match="an int8 model cannot be saved; save it before"):
            part.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_loss_with_rounded_matrices(asked):
    """Evaluation meets the head as a matrix."""
    decoder = asked[0].model.decoder
    quantize_int8(decoder)
    hidden, targets = torch.randn(1, 5, decoder.cfg.lm_hidden_dim), torch.arange(5)[None]
    with torch.no_grad():
        wanted = F.cross_entropy(decoder.logits(hidden)[0], targets[0])
        torch.testing.assert_close(decoder.loss(hidden, targets), wanted)


@pytest.mark.slow
def test_a_compiled_step_says_the_same(asked, small_checkpoint):
    """For one row, and for two, with which words are read twice."""
    if why := missing_compiler(torch.device("cpu")):
        pytest.skip(why)
    chat, tokens = asked
    quantize_int8(chat.model.decoder)
    plain = replace(chat, model=Chat.load(small_checkpoint).model)
    quantize_int8(plain.model.decoder)
    compile_decoding(chat.model)
    for rows in (1, 2):
        ids = torch.as_tensor(tokens.ids)[None].repeat(rows, 1).long()
        found = [[s.tokens for s in steps(c.model, ids, None, None, SHORT)] for c in (chat, plain)]
        assert len(found[0]) > 2 and all(map(torch.equal, *found))
