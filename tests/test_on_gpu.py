"""GPU code compared with fp32 on the CPU; skipped without a GPU."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from engine.training.distributed import autocast, missing_compiler
from models.inference.compile import compile_blocks, compile_decoding
from models.inference.generate import steps
from models.inference.int8 import quantize_int8
from models.inference.sampling import Sampling
from models.ops.packed import find_bounds, packed_attention

GPU = torch.device("cuda")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ROOT = Path(__file__).parent.parent


def relative_error(found: torch.Tensor, expected: torch.Tensor, minimum: float = 0.0) -> float:
    """Norm of the difference divided by that of `expected`, or by `minimum` if it is larger."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).norm() / expected.norm().clamp(min=minimum))


@pytest.mark.parametrize("n_kv", [1, 3, 6])
@pytest.mark.parametrize("width", [16, 64, 128])
def test_packed_attention_kernel(n_kv, width):
    segments = torch.tensor([[1] * 50 + [2] * 30 + [0] * 20, [2] * 1 + [1] * 99])
    mask = segments[:, None, :, None] == segments[:, None, None, :]  # [B, 1, T, T]
    mask &= torch.ones(100, 100, dtype=torch.bool).tril()
    g = torch.Generator().manual_seed(0)
    exact = [torch.randn(2, h, 100, width, generator=g).bfloat16().float() for h in (6, n_kv, n_kv)]
    inputs = [x.to(GPU, torch.bfloat16).requires_grad_() for x in exact]
    exact = [x.requires_grad_() for x in exact]
    out = packed_attention(*inputs, find_bounds(segments, GPU))
    expected = F.scaled_dot_product_attention(*exact, attn_mask=mask, enable_gqa=True)
    cotangent = torch.randn(expected.shape, generator=g)
    out.backward(cotangent.to(out))
    expected.backward(cotangent)
    assert relative_error(out, expected) < 0.01
    for x, other in zip(inputs, exact, strict=True):
        assert relative_error(x.grad, other.grad) < 0.01


SIZES = dict(vit_hidden_dim=64, vit_n_heads=2, vit_inter_dim=128, lm_hidden_dim=96, lm_n_heads=6,
             lm_n_kv_heads=3, lm_inter_dim=160)  # fmt: skip


@pytest.mark.parametrize("is_compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 2e-4), (torch.bfloat16, 0.05)], ids=str)
def test_training_step(small_model, some_rows, dtype, limit, is_compiled):
    """Loss and gradients; fp32 loops over groups of segments, bf16 uses the kernel."""
    torch._dynamo.reset()
    on_cpu, on_gpu = (small_model(**SIZES).train() for _ in range(2))
    on_gpu.to(GPU)
    if is_compiled:
        compile_blocks(on_gpu)
    for seed in range(3):
        batch = some_rows(on_cpu.cfg, seed, True)
        on_cpu.zero_grad(), on_gpu.zero_grad()
        expected = on_cpu(**batch, reduction="sum")[1]
        with autocast(GPU, dtype):
            images = batch["images"].to(GPU)
            positions = batch["positions"].to(GPU)
            loss = on_gpu(**batch | dict(images=images, positions=positions), reduction="sum")[1]
        expected.backward()
        loss.backward()
        assert relative_error(loss, expected) < limit
        # Key biases do not change the softmax: their gradients are rounding noise.
        minimum = 0.01 * float(torch.nn.utils.get_total_norm([p.grad for p in on_cpu.parameters()]))
        for (name, x), y in zip(on_cpu.named_parameters(), on_gpu.parameters(), strict=True):
            assert relative_error(y.grad, x.grad, minimum) < limit, name


@pytest.mark.parametrize("mode", ["recorded", "compiled", "int8"])
@pytest.mark.parametrize("sampling", [Sampling(20), Sampling(20, repetition_penalty=1.3)], ids=str)
def test_answers_match_the_cpu(small_model, make_sample, pad_rows, mode, sampling):
    if mode == "compiled" and (reason := missing_compiler(GPU)):
        pytest.skip(reason)
    torch._dynamo.reset()
    on_cpu, on_gpu = (small_model(**SIZES, lm_tie_weights=False) for _ in range(2))
    if mode == "int8":
        quantize_int8(on_cpu.decoder), quantize_int8(on_gpu.decoder)
    on_gpu.to(GPU)
    if mode == "compiled":
        compile_decoding(on_gpu)
    for prompts in ([(1, 8)], [(0, 3), (1, 8), (2, 5)]):
        samples = [make_sample(on_cpu.cfg, n, words, i) for i, (n, words) in enumerate(prompts)]
        ids, images, mask = pad_rows(on_cpu.cfg, samples, "left")
        expected = list(steps(on_cpu, ids, images, mask, sampling))
        found = list(steps(on_gpu, ids.to(GPU), images.to(GPU), mask.to(GPU), sampling))
        for a, b in zip(found, expected, strict=True):
            assert relative_error(a.logits, b.logits) < 1e-3
            assert a.tokens.tolist() == b.tokens.tolist()


def losses(run: Path) -> dict[int, float]:
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_a_resumed_run(tmp_path):
    """Run train.py for 30 steps, then resume at step 15; losses are nearly the same."""
    run = tmp_path / "run"

    def train(*more: str) -> str:
        fixed = "tiny --train.steps=30 --train.log-every=1 --train.eval-every=0 --data.workers=2"
        command = [sys.executable, "train.py", *fixed.split(), "--train.save-every=15", *more]
        command += [f"--train.out={run}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    out = train()
    assert torch.cuda.get_device_name() in out and "bf16" in out
    whole = losses(run)
    shutil.rmtree(run / "step-000030")
    train("--train.resume=auto")
    parts = losses(run)
    assert set(whole) == set(parts) == set(range(1, 31))
    assert all(abs(whole[i] - parts[i]) < 0.02 * whole[i] for i in whole), (whole, parts)
    assert whole[30] < 0.8 * whole[1]
