"""Cached, batched, padded generation equals a naive loop; sampling equals transformers'."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from models.inference import continuous_batching
from models.inference.continuous_batching import generate_continuous
from models.inference.generate import Prompt, pad_at_end, steps
from models.inference.kv_cache import KVCache
from models.inference.likelihood import score_continuations
from models.inference.sampling import Sampling, sample


@pytest.fixture
def model(small_model):
    """Untied, because a tied random model repeats its last token; never ends a turn."""
    model = small_model(lm_tie_weights=False)
    with torch.no_grad():
        model.decoder.head.weight[model.cfg.vlm_eos_token_id] = 0
    return model


@pytest.fixture
def prompts(small_config, make_sample):
    """Unequal lengths and 0, 1, 2 images."""
    cfg = small_config()
    return [make_sample(cfg, n, words, seed) for seed, (n, words) in enumerate(PROMPTS)]


PROMPTS = [(0, 3), (1, 8), (2, 5), (0, 14)]


@torch.no_grad()
def naive(model, sample, n: int) -> list[int]:
    """Reference: a whole forward pass for every token, without cache, batch or mask."""
    ids, images = sample
    x, tokens = model.embed(ids[None], images), []
    for _ in range(n):
        tokens.append(int(model.decoder.logits(model.decoder(x)[0, -1]).argmax()))
        new = model.decoder.token_embedding(torch.tensor([tokens[-1:]]))
        x = torch.cat((x, new), dim=1)
    return tokens


def test_cached_generation_equals_the_naive_loop(model, prompts):
    for ids, images in prompts:
        expected = naive(model, (ids, images), 12)
        assert len(set(expected)) >= 4, "the answer must vary to test the cache"
        got = model.generate(ids[None], images, sampling=Sampling(max_new_tokens=12))
        assert got.tolist() == [expected]


@pytest.mark.parametrize("side", ["left", "right"])
def test_batched_rows_equal_single_rows(side, model, prompts, pad_rows):
    ids, images, mask = pad_rows(model.cfg, prompts, side)
    got = model.generate(ids, images, mask, Sampling(max_new_tokens=12))
    assert got.tolist() == [naive(model, prompt, 12) for prompt in prompts]


@pytest.mark.parametrize("kind", [torch.bool, torch.float32], ids=str)
def test_masks_of_other_dtypes(kind, model, prompts, pad_rows):
    ids, images, mask = pad_rows(model.cfg, prompts, "left")
    got = model.generate(ids, images, mask.to(kind), Sampling(max_new_tokens=3))
    assert torch.equal(got, model.generate(ids, images, mask, Sampling(max_new_tokens=3)))


def test_first_token_equals_argmax_of_forward(model, prompts, pad_rows):
    """Generation and forward must agree on the last token of a padded prompt."""
    ids, images, mask = pad_rows(model.cfg, prompts, "right")
    with torch.no_grad():
        logits, _ = model(ids, images, mask)
    last = logits[torch.arange(4), mask.sum(1) - 1]
    got = model.generate(ids, images, mask, Sampling(max_new_tokens=1))
    assert got[:, 0].tolist() == last.argmax(-1).tolist()


def test_rows_are_padded_after_their_end_of_turn(model, prompts, pad_rows):
    plain = [naive(model, prompt, 12) for prompt in prompts]
    # The end of turn is a token that one row generates early and another later or never.
    eos = plain[0][2]
    model.cfg = replace(model.cfg, vlm_eos_token_id=eos)
    pad = model.cfg.vlm_pad_token_id
    stops = [row.index(eos) + 1 if eos in row else 12 for row in plain]
    assert stops[0] <= 3 and max(stops) > stops[0]
    ids, images, mask = pad_rows(model.cfg, prompts, "left")
    got = model.generate(ids, images, mask, Sampling(max_new_tokens=12)).tolist()
    longest = max(stops)
    expected = [row[:n] + [pad] * (longest - n) for row, n in zip(plain, stops, strict=True)]
    assert got == expected
    first_ids, first_images = prompts[0]
    short = model.generate(first_ids[None], first_images, sampling=Sampling(max_new_tokens=12))
    assert short.tolist() == [plain[0][: stops[0]]], "a batch ends with the last row"


def test_generate_equals_all_steps(model, prompts, pad_rows):
    ids, images, mask = pad_rows(model.cfg, prompts, "right")
    sampling = Sampling(max_new_tokens=6, temperature=1.0, seed=3)
    tokens = [step.tokens for step in steps(model, ids, images, mask, sampling)]
    assert torch.equal(torch.stack(tokens, 1), model.generate(ids, images, mask, sampling))
    model.train()
    begun = steps(model, ids, images, mask, sampling)
    next(begun)
    assert not torch.is_inference_mode_enabled(), (
        "an unfinished generator must not leave inference mode on"
    )


def test_answers_end_at_the_context_length(model, small_config, make_sample):
    cfg = small_config()
    ids, images = make_sample(cfg, 0, 120, 0)
    got = model.generate(ids[None], images, sampling=Sampling(max_new_tokens=50))
    assert got.tolist() == [naive(model, (ids, images), 8)]
    ids, images = make_sample(cfg, 0, 128, 0)
    with pytest.raises(ValueError, match="has 128 tokens and leaves no space for an answer"):
        model.generate(ids[None], images)


def test_pad_at_end_accepts_either_side():
    ids = torch.tensor([[7, 7, 1, 2], [3, 4, 5, 7]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    rows, lengths = pad_at_end(ids, mask, 9)
    assert rows.tolist() == [[1, 2, 9], [3, 4, 5]] and lengths.tolist() == [2, 3]


# --- Sampling -----------------------------------------------------------------------------------


def logits_and_ids(B: int = 64, V: int = 40):
    g = torch.Generator().manual_seed(0)
    return 3 * torch.randn(B, V, generator=g), torch.randint(V, (B, 12), generator=g)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.6, top_k=5),
        Sampling(temperature=1.0, top_k=1000),
        Sampling(temperature=1.0, top_p=0.7),
        Sampling(temperature=2.5, top_p=0.7),
        Sampling(temperature=1.0, repetition_penalty=1.8),
        Sampling(temperature=1.0, repetition_penalty=0.5),
        Sampling(temperature=1.7, top_k=9, top_p=0.8, repetition_penalty=1.3),
    ],
    ids=str,
)
def test_sampling_equals_transformers(sampling):
    """The distributions are equal, so the same seed draws the same tokens."""
    logits, ids = logits_and_ids()
    steps = [TemperatureLogitsWarper(sampling.temperature)]
    seen = None
    if sampling.repetition_penalty != 1:
        steps.insert(0, RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
        seen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, ids, True)
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(sampling.top_p))
    scores = logits.clone()
    for step in steps:
        scores = step(ids, scores)
    for seed in range(8):  # 512 draws
        reference = torch.multinomial(
            scores.softmax(-1), 1, generator=torch.Generator().manual_seed(seed)
        )
        tokens = sample(logits, seen, sampling, torch.Generator().manual_seed(seed))
        assert torch.equal(tokens, reference[:, 0])


def test_greedy_ignores_the_filters_but_not_the_penalty():
    logits, ids = logits_and_ids()
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, ids, True)
    g = torch.Generator()
    assert torch.equal(sample(logits, None, Sampling(top_k=2, top_p=0.1), g), logits.argmax(-1))
    expected = RepetitionPenaltyLogitsProcessor(3.0)(ids, logits.clone()).argmax(-1)
    assert not torch.equal(expected, logits.argmax(-1))
    assert torch.equal(sample(logits, seen, Sampling(repetition_penalty=3.0), g), expected)


def test_top_p_applies_after_temperature():
    """Temperature 2 turns 0.5, 0.3, 0.2 into 0.42, 0.32, 0.26: top-p 0.45 keeps one or two."""
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(500, 3)
    draw = lambda t: sample(  # noqa: E731
        logits, None, Sampling(temperature=t, top_p=0.45), torch.Generator().manual_seed(0)
    )
    assert set(draw(1.0).tolist()) == {0}
    assert set(draw(2.0).tolist()) == {0, 1}


def test_top_k_keeps_k():
    logits = torch.arange(6.0).flip(0).expand(800, 6)
    got = sample(logits, None, Sampling(temperature=3.0, top_k=3), torch.Generator().manual_seed(0))
    assert set(got.tolist()) == {0, 1, 2}


def penalised(model, sample, n: int, penalty: float) -> list[int]:
    """The naive loop with transformers' repetition penalty over prompt and answer."""
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    ids, images = sample
    x, ids = model.embed(ids[None], images), ids[None]
    start = ids.shape[1]
    for _ in range(n):
        scores = processor(ids, model.decoder.logits(model.decoder(x)[:, -1]))
        ids = torch.cat((ids, scores.argmax(-1, keepdim=True)), dim=1)
        x = torch.cat((x, model.decoder.token_embedding(ids[:, -1:])), dim=1)
    return ids[0, start:].tolist()


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_penalty_covers_prompt_and_answer(side, model, prompts, pad_rows):
    ids, images, mask = pad_rows(model.cfg, prompts, side)
    got = model.generate(ids, images, mask, Sampling(max_new_tokens=12, repetition_penalty=1.5))
    assert got.tolist() == [penalised(model, prompt, 12, 1.5) for prompt in prompts]
    assert got.tolist() != [naive(model, prompt, 12) for prompt in prompts]


@torch.no_grad()
def test_penalty_ignores_padding(model, prompts, pad_rows):
    """The pad token has the highest logit here and must not be penalised for padding."""
    head, pad = model.decoder.head.weight, model.cfg.vlm_pad_token_id
    head[pad] = 1.2 * head[naive(model, prompts[0], 1)[0]]
    ids, images, mask = pad_rows(model.cfg, prompts, "right")
    sampling = Sampling(max_new_tokens=1, repetition_penalty=1.4)
    got = model.generate(ids, images, mask, sampling).tolist()
    assert got[0] == [pad]
    assert got == [penalised(model, prompt, 1, 1.4) for prompt in prompts]


def test_seeds_are_reproducible(model, prompts, pad_rows):
    ids, images, mask = pad_rows(model.cfg, prompts, "left")
    one, again, other = (
        model.generate(ids, images, mask, Sampling(max_new_tokens=8, temperature=1.0, seed=seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, again) and not torch.equal(one, other)


@pytest.mark.parametrize("seed", [None, 7])
def test_global_generator_is_unchanged(seed, model, prompts):
    """Sampling during training must not change the run."""
    ids, images = prompts[1]
    before = torch.get_rng_state()
    model.generate(ids[None], images, sampling=Sampling(4, temperature=1.0, seed=seed))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "name, value",
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("repetition_penalty", 0.0),
    ],
)
def test_invalid_options_raise(name, value):
    with pytest.raises(ValueError, match=f"{name} = {value}"):
        Sampling(**{name: value})


# --- Continuous batching -------------------------------------------------------------------------


@pytest.fixture
def many(small_config, make_sample):
    cfg = small_config()
    shapes = [(i % 3, 3 + 7 * i % 16) for i in range(14)]
    return [Prompt(*make_sample(cfg, n, words, seed)) for seed, (n, words) in enumerate(shapes)]


def generate_alone(model, prompt: Prompt, sampling: Sampling) -> list[int]:
    return model.generate(prompt.ids[None], prompt.images, sampling=sampling)[0].tolist()


@pytest.mark.parametrize("n_rows", [1, 2, 5, 64])
def test_continuous_batching_equals_single_prompts(n_rows, model, many):
    plain = [generate_alone(model, p, Sampling(12)) for p in many]
    model.cfg = replace(model.cfg, vlm_eos_token_id=plain[0][3])  # some answers end early
    expected = [generate_alone(model, p, Sampling(12)) for p in many]
    assert len({len(answer) for answer in expected}) > 2
    read = []
    source = (read.append(i) or p for i, p in enumerate(many))
    got = list(generate_continuous(model, source, Sampling(12), n_rows))
    assert sorted(done.index for done in got) == list(range(len(many))) == read
    assert {done.index: done.tokens for done in got} == dict(enumerate(expected))


def test_a_free_row_takes_the_next_prompt(model, many):
    """Beside one answer of 12 tokens, many answers of one token finish in the other row."""
    first = generate_alone(model, many[0], Sampling(12))
    ends = {generate_alone(model, p, Sampling(1))[0] for p in many[1:]}
    stop = lambda tokens: len(tokens) == 1 and tokens[0] in ends - {first[0]}  # noqa: E731
    calls = []
    decode = model.decode
    model.decode = lambda tokens, *rest: calls.append(len(tokens)) or decode(tokens, *rest)
    order = [done.index for done in generate_continuous(model, many, Sampling(12), 2, stop)]
    assert order.index(0) >= 9, "short answers that start later finish first"
    assert len(calls) < 12 + len(many)


def test_long_prompts_get_fewer_rows(model, many, monkeypatch):
    expected = [generate_alone(model, p, Sampling(6)) for p in many]
    monkeypatch.setattr(continuous_batching, "MAX_SLOTS", 100)
    monkeypatch.setattr(continuous_batching, "SLOT_MULTIPLE", 1)
    widths = []
    decode = model.decode
    model.decode = lambda tokens, *rest: widths.append(len(tokens)) or decode(tokens, *rest)
    got = {done.index: done.tokens for done in generate_continuous(model, many, Sampling(6), 8)}
    assert got == dict(enumerate(expected))
    longest = max(len(p.ids) for p in many) + 6
    assert max(widths) > 1 and widths[-3] <= 100 // longest * 2


def test_sampling_does_not_depend_on_the_rows(model, many):
    sampling = Sampling(8, temperature=1.0, seed=5, repetition_penalty=1.3)
    answers = [
        {done.index: done.tokens for done in generate_continuous(model, many, sampling, n)}
        for n in (1, 3, 64)
    ]
    assert answers[0] == answers[1] == answers[2]
    one = replace(sampling, seed=5 + 4)
    assert answers[0][4] == generate_alone(model, many[4], one)
    assert list(generate_continuous(model, [], sampling)) == []


@torch.no_grad()
def test_steps_continue_a_cache(model, prompts):
    ids, images = prompts[2]
    whole = [int(s.tokens) for s in steps(model, ids[None], images, None, Sampling(9))]
    cache = KVCache(model.cfg, 1, 64, ids.device, torch.float32)
    for cut in (5, len(ids) - 1, 11):
        held = images[: int((ids[:cut] == model.cfg.vlm_image_token_id).sum()) // 4]
        list(steps(model, ids[None, :cut], held, None, Sampling(3), cache))
        rest = steps(model, ids[None], images[len(held) :], None, Sampling(9), cache, cut)
        assert [int(s.tokens) for s in rest] == whole, "slots after the cut are overwritten"


@torch.no_grad()
def test_likelihoods_equal_forward(model, prompts):
    continuations = [[5, 9, 11, 3 + 4], [8], [5, 9, 2]]
    for ids, images in prompts:
        got = score_continuations(model, Prompt(ids, images), continuations)
        for row, tokens in zip(got, continuations, strict=True):
            logits, _ = model(torch.cat((ids, torch.tensor(tokens)))[None], images)
            expected = logits[0, len(ids) - 1 : -1].log_softmax(-1)[range(len(tokens)), tokens]
            torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_prompts_without_images_skip_the_encoder(model, prompts):
    calls = []
    model.vision_encoder.register_forward_hook(lambda *_: calls.append(1))
    patches = model.vision_encoder.patches
    model.vision_encoder.patches = lambda x: calls.append(len(x)) or patches(x)
    ids, _ = prompts[0]
    model.generate(ids[None], sampling=Sampling(4))
    assert calls == []
    with torch.enable_grad():
        model(ids[None])
    assert calls == [1], "with gradients a blank tile is encoded"
