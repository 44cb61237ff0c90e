"""A captured step gives the results of the eager one; on a CPU a second call replaces replay."""

from __future__ import annotations

import types

import pytest
import torch

from models.inference import cuda_graph, generate
from models.inference.generate import steps
from models.inference.sampling import Sampling

PROMPTS = [(0, 3), (1, 8), (2, 5), (0, 14)]


@pytest.fixture
def calls(monkeypatch):
    """Emulate capture on a CPU: replay reads and fills the same tensors. Counts replays."""
    found = []

    def capture(run, _device):
        for _ in range(2):
            run()
        filled = run()

        def replay():
            found.append(1)
            filled.copy_(run())

        return replay, filled

    monkeypatch.setattr(cuda_graph, "capture", capture)
    monkeypatch.setattr(
        generate,
        "decode_function",
        lambda model, *first: cuda_graph.cuda_graph(model.decode, *first),
    )
    return found


@pytest.fixture
def model(small_model):
    model = small_model(lm_tie_weights=False, lm_n_kv_heads=2)
    with torch.no_grad():
        model.decoder.head.weight[model.cfg.vlm_eos_token_id] = 0
    return model


@pytest.mark.parametrize("sampling", [Sampling(12), Sampling(12, temperature=1.5, seed=3)])
def test_captured_steps_equal_eager_ones(
    model, small_config, make_sample, pad_rows, sampling, request
):
    samples = [make_sample(small_config(), n, words, i) for i, (n, words) in enumerate(PROMPTS)]
    ids, images, mask = pad_rows(model.cfg, samples, "left")
    eager = list(steps(model, ids, images, mask, sampling))
    replays = request.getfixturevalue("calls")
    captured = list(steps(model, ids, images, mask, sampling))
    assert len(captured) == len(eager) == 12 and len(replays) == 11
    for a, b in zip(captured, eager):  # replays must not overwrite earlier logits
        assert a.tokens.tolist() == b.tokens.tolist()
        torch.testing.assert_close(a.logits, b.logits, rtol=1e-5, atol=1e-5)
    assert len({tuple(step.tokens.tolist()) for step in captured}) > 6


def test_cpu_captures_nothing(model, make_sample, small_config, monkeypatch):
    monkeypatch.setattr(cuda_graph, "capture", lambda *_: 1 / 0)
    ids, images = make_sample(small_config(), 1, 5, 0)
    assert model.generate(ids[None], images, sampling=Sampling(4)).shape == (1, 4)


def test_hooks_prevent_capture(model, monkeypatch):
    """A CUDA graph runs no Python, so a model with hooks decodes without one."""
    on_gpu = types.SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(generate, "cuda_graph", lambda *_: "captured")
    assert generate.decode_function(model, None, on_gpu, on_gpu) == "captured"
    handle = model.decoder.norm.register_forward_hook(lambda *_: None)
    assert callable(generate.decode_function(model, None, on_gpu, on_gpu))
    handle.remove()
