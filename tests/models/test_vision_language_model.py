"""Image tokens replace placeholders; padding, packing and accumulation do not change results."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers as hf

from configs import PRESETS
from models.vision_language_model import VisionLanguageModel


def shifted(cfg, ids: torch.Tensor) -> torch.Tensor:
    """Next-token targets [T], where image placeholders are not supervised."""
    targets = torch.cat((ids[1:], torch.tensor([-100])))
    return targets.masked_fill(targets == cfg.vlm_image_token_id, -100)


def logits_of_sample(model: VisionLanguageModel, sample) -> torch.Tensor:
    """Reference: logits [T, V] of one sample, without padding or mask."""
    ids, images = sample
    return model(ids[None], images)[0][0]


def pack(samples: list):
    """One row: ids, images, positions, segments."""
    ids = torch.cat([ids for ids, _ in samples])[None]
    positions = torch.cat([torch.arange(len(ids)) for ids, _ in samples])[None]
    segments = torch.cat([torch.full((len(ids),), i + 1) for i, (ids, _) in enumerate(samples)])
    return ids, torch.cat([x for _, x in samples]), positions, segments[None]


def gradients(model) -> dict[str, torch.Tensor]:
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return grads


@pytest.fixture
def batch(small_config, make_sample):
    """Rows with 0, 1 and 3 images, of unequal lengths."""
    cfg = small_config()
    return [make_sample(cfg, n, words, seed=n) for n, words in ((0, 9), (1, 4), (3, 6))]


@torch.no_grad()
def test_image_tokens_replace_placeholders(small_model, batch, pad_rows):
    """Compare with a loop over the ids, row by row in reading order."""
    model = small_model()
    ids, images, _ = pad_rows(model.cfg, batch, "right")
    x, tokens = model.embed(ids, images), model.embed_images(images).flatten(0, 1)
    assert tokens.shape == (4 * 4, 48)
    used = 0
    for row in range(3):
        for t in range(ids.shape[1]):
            if ids[row, t] == model.cfg.vlm_image_token_id:
                assert torch.equal(x[row, t], tokens[used])
                used += 1
            else:
                assert torch.equal(x[row, t], model.decoder.token_embedding.weight[ids[row, t]])
    assert used == 16


@torch.no_grad()
def test_cls_and_registers_never_reach_the_decoder(small_model, batch):
    """Pixel shuffle expects patches only; an extra token in front would shift every square."""
    model = small_model(vit_cls_flag=True, vit_n_registers=2)
    images = batch[2][1]
    patches = model.vision_encoder.forward_features(images)[:, 3:]
    assert torch.equal(model.embed_images(images), model.MP(patches))


def test_forward_outputs(small_model, batch, pad_rows):
    model = small_model()
    ids, images, mask = pad_rows(model.cfg, batch, "right")
    targets = torch.stack([shifted(model.cfg, row) for row in ids]).masked_fill(mask == 0, -100)
    logits, loss = model(ids, images, mask)
    assert logits.shape == (*ids.shape, 101) and loss is None
    no_logits, loss = model(ids, images, mask, targets)
    assert no_logits is None and loss.ndim == 0
    again, same = model(ids, images, mask, targets, return_logits=True)
    assert torch.equal(again, logits) and torch.equal(same, loss)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    _, total = model(ids, images, mask, targets, reduction="sum")
    torch.testing.assert_close(total, expected * (targets != -100).sum(), rtol=1e-6, atol=0)


def test_mask_with_segments_or_positions_raises(small_model):
    model = small_model()
    ids = torch.full((1, 5), 9)
    for fields in (
        dict(segments=torch.ones(1, 5, dtype=torch.long)),
        dict(positions=torch.arange(5)[None]),
    ):
        with pytest.raises(ValueError, match="attention_mask implies segments and positions"):
            model(ids, attention_mask=torch.ones(1, 5), **fields)


def test_inner_padding_wrong_shapes_and_reductions_raise(small_model):
    model = small_model()
    ids = torch.full((2, 5), 9)
    mask = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 0, 1, 1]])
    with pytest.raises(ValueError, match="attention_mask, row 1: padding lies between tokens"):
        model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match=r"targets have shape \[2, 4\]; expected \[2, 5\]"):
        model(ids, targets=ids[:, :4])
    with pytest.raises(ValueError, match="reduction = 'none': must be 'mean' or 'sum'"):
        model(ids, targets=ids, reduction="none")


def test_loss_calls_hooks_of_the_head(small_model):
    """Hooks on the head and adapters around it affect the loss and its gradient."""
    model = small_model(lm_tie_weights=False)
    ids = torch.arange(4, 9)[None]
    _, plain = model(ids, targets=ids)
    handle = model.decoder.head.register_forward_hook(lambda _m, _x, out: out * 0)
    _, hooked = model(ids, targets=ids)
    handle.remove()
    torch.testing.assert_close(hooked, torch.tensor(model.cfg.lm_vocab_size).float().log())
    assert not torch.isclose(plain, hooked)


@pytest.mark.parametrize("kind", [torch.long, torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_does_not_change_logits(side, kind, small_model, batch, pad_rows):
    model = small_model()
    ids, images, mask = pad_rows(model.cfg, batch, side)
    logits, _ = model(ids, images, mask.to(kind))
    assert logits.isfinite().all()
    for row, sample in enumerate(batch):
        real = logits[row, mask[row].bool()]
        torch.testing.assert_close(real, logits_of_sample(model, sample), rtol=0, atol=1e-5)


@torch.no_grad()
def test_positions_do_not_count_padding(small_model, batch, pad_rows, monkeypatch):
    """RoPE is relative, so logits do not reveal wrong positions: check what the decoder gets."""
    model, given = small_model(), []
    decoder = model.decoder.forward

    def spy(x, positions, segments):
        given.append(positions)
        return decoder(x, positions, segments)

    monkeypatch.setattr(model.decoder, "forward", spy)
    for side in ("left", "right"):
        ids, images, mask = pad_rows(model.cfg, batch, side)
        model(ids, images, mask)
        for row, (real, _) in enumerate(batch):
            assert given[-1][row, mask[row].bool()].tolist() == list(range(len(real)))


@torch.no_grad()
def test_right_padding_needs_no_mask(small_model, batch, pad_rows):
    """Training without packing relies on this."""
    model = small_model()
    ids, images, mask = pad_rows(model.cfg, batch, "right")
    logits, _ = model(ids, images)
    for row, sample in enumerate(batch):
        real = logits[row, mask[row].bool()]
        torch.testing.assert_close(real, logits_of_sample(model, sample), rtol=0, atol=1e-5)


def test_placeholders_and_tiles_must_match(small_model, batch, pad_rows):
    model = small_model()
    ids, images, _ = pad_rows(model.cfg, batch, "right")
    broken = ids.clone()
    broken[1, 2] = 50  # row 1 loses one placeholder
    with pytest.raises(ValueError, match=r"row 1: 3 image placeholders; .*tokens_per_tile = 4"):
        model(broken, images)
    with pytest.raises(ValueError, match=r"\[0, 1, 3\] tiles.* 3 tiles were given"):
        model(ids, images[1:])
    with pytest.raises(ValueError, match=r"\[0, 1, 3\] tiles.* 5 tiles were given"):
        model(ids, torch.cat((images, images[:1])))
    with pytest.raises(ValueError, match=r"\[0, 1, 3\] tiles.* 0 tiles were given"):
        model(ids)
    with pytest.raises(ValueError, match=r"\[0\] tiles.* 4 tiles were given"):
        model(ids[:1], images)


@pytest.mark.parametrize("no_images", [None, torch.zeros(0, 3, 16, 16)], ids=["none", "empty"])
@pytest.mark.parametrize(
    "fields", [{}, dict(vit_cls_flag=True, vit_n_registers=2, lm_tie_weights=False)], ids=str
)
def test_batch_without_images_gives_every_parameter_a_gradient(no_images, fields, small_model):
    """In distributed training, processes wait forever for a parameter without a gradient."""
    model = small_model(**fields).train()
    ids = torch.randint(4, 101, (2, 7))
    _, loss = model(ids, no_images, targets=ids)
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        if name.startswith("decoder."):
            assert p.grad.any(), name
        else:
            assert not p.grad.any(), name
    torch.testing.assert_close(
        model(ids)[0], model.decoder.logits(model.decoder(model.decoder.token_embedding(ids)))
    )


@torch.no_grad()
def test_packed_logits_equal_unpacked(small_model, batch):
    model = small_model()
    ids, images, positions, segments = pack(batch)
    pad = torch.zeros(1, 5, dtype=torch.long)  # padding at the end is segment 0
    logits, _ = model(
        torch.cat((ids, pad), 1),
        images,
        positions=torch.cat((positions, pad), 1),
        segments=torch.cat((segments, pad), 1),
    )
    expected = torch.cat([logits_of_sample(model, sample) for sample in batch])
    torch.testing.assert_close(logits[0, :-5], expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_packed_samples_never_see_each_other(small_model, small_config, make_sample):
    """Changing a sample does not change its neighbours' logits; in nanoVLM it does."""
    model, cfg = small_model(), small_config()
    before, b, after = (make_sample(cfg, 1, 5, seed) for seed in (1, 2, 3))
    others = [make_sample(cfg, 1, 5, seed) for seed in (4, 5)]
    one = pack([before, b, after])
    two = pack([others[0], b, others[1]])
    n = len(b[0])
    first, second = (
        model(ids, images, positions=positions, segments=segments)[0]
        for ids, images, positions, segments in (one, two)
    )
    assert torch.equal(first[0, n : 2 * n], second[0, n : 2 * n])
    assert (first[0, :n] - second[0, :n]).abs().max() > 0.01


def test_accumulation_and_packing_do_not_change_gradients(
    small_model, small_config, make_sample, pad_rows
):
    """Every supervised token counts once in a batch of 8, in 4 batches of 2 and in packed rows."""
    model, cfg = small_model().train(), small_config()
    counts = [(0, 3), (1, 20), (3, 2), (0, 30), (1, 1), (2, 9), (0, 2), (1, 6)]
    samples = [make_sample(cfg, n, words, seed) for seed, (n, words) in enumerate(counts)]
    total = sum(int((shifted(cfg, ids) != -100).sum()) for ids, _ in samples)

    def backward(some: list):
        ids, images, mask = pad_rows(cfg, some, "right")
        targets = torch.full_like(ids, -100)
        for row, (real, _) in enumerate(some):
            targets[row, : len(real)] = shifted(cfg, real)
        assert ((targets != -100) <= mask.bool()).all()
        (model(ids, images, targets=targets, reduction="sum")[1] / total).backward()

    backward(samples)
    once = gradients(model)
    for i in range(0, 8, 2):
        backward(samples[i : i + 2])
    accumulated = gradients(model)
    for part in (samples[:3], samples[3:]):
        ids, images, positions, segments = pack(part)
        targets = torch.cat([shifted(cfg, ids) for ids, _ in part])[None]
        _, loss = model(
            ids, images, targets=targets, positions=positions, segments=segments, reduction="sum"
        )
        (loss / total).backward()
    packed = gradients(model)
    for name, grad in once.items():
        torch.testing.assert_close(accumulated[name], grad, rtol=1e-4, atol=1e-6, msg=name)
        torch.testing.assert_close(packed[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_training_uses_the_image(small_model, small_config, make_sample):
    """Two images, one question, two answers: only the image decides."""
    model, cfg = small_model().train(), small_config()
    ids, _ = make_sample(cfg, 1, 2, seed=0)
    ids = ids.expand(2, -1)
    images = torch.stack([torch.full((3, 16, 16), value) for value in (-1.0, 1.0)])
    targets = torch.full_like(ids, -100)
    targets[:, -1] = torch.tensor([40, 41])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(12):
        _, loss = model(ids, images, targets=targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3, "a model that ignores the image reaches ln 2 = 0.69"
    assert model(ids, images)[0][:, -1].argmax(-1).tolist() == [40, 41]


# --- Full sizes -----------------------------------------------------------------------------------

SIGLIP_B = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                num_attention_heads=12, patch_size=16)  # fmt: skip
SMOLLM2 = dict(vocab_size=49152, max_position_embeddings=8192, rms_norm_eps=1e-5,
               tie_word_embeddings=True,
               rope_parameters={"rope_type": "default", "rope_theta": 100000.0})  # fmt: skip
FULL_SIZES = {
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
@pytest.mark.parametrize("preset", FULL_SIZES)
@torch.no_grad()
def test_presets_at_full_size(preset, tmp_path, capsys):
    """Save transformers' backbones with random weights, load both into a VLM, compare outputs."""
    vision, text = FULL_SIZES[preset]
    encoder, language_model = hf.SiglipVisionModel(vision).eval(), hf.LlamaForCausalLM(text).eval()
    encoder.save_pretrained(tmp_path / "encoder")
    language_model.save_pretrained(tmp_path / "language_model")
    cfg = replace(
        PRESETS[preset].model,
        vit_model_type=str(tmp_path / "encoder"),
        lm_model_type=str(tmp_path / "language_model"),
    )
    model = VisionLanguageModel.from_backbones(cfg)
    assert model.cfg == cfg, "the preset has the sizes of its backbones"
    assert "resampled" not in capsys.readouterr().err
    size = vision.image_size
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(5))
    model.eval()
    features, expected = model.vision_encoder.forward_features(x), encoder(x).last_hidden_state
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)
    ids = torch.randint(0, 49152, (1, 100))
    logits = model.decoder.logits(model.decoder(model.decoder.token_embedding(ids)))
    torch.testing.assert_close(logits[..., :49152], language_model(ids).logits, rtol=0, atol=1e-5)
    mean = language_model.get_input_embeddings().weight.mean(0)
    torch.testing.assert_close(model.decoder.token_embedding.weight[49190], mean)
