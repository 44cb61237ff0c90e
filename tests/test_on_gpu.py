"""What only a GPU does, beside a CPU doing it plainly in fp32; skipped where there is none."""

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


def apart(found: torch.Tensor, wanted: torch.Tensor, least: float = 0.0) -> float:
    """Their distance as a share of what is wanted, or of `least` where that is larger."""
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    return float((found - wanted).norm() / wanted.norm().clamp(min=least))


@pytest.mark.parametrize("n_kv", [1, 3, 6])
@pytest.mark.parametrize("width", [16, 64, 128])
def test_the_kernel_keeps_segments_apart(n_kv, width):
    segments = torch.tensor([[1] * 50 + [2] * 30 + [0] * 20, [2] * 1 + [1] * 99])
    mask = segments[:, None, :, None] == segments[:, None, None, :]  # [B, 1, T, T]
    mask &= torch.ones(100, 100, dtype=torch.bool).tril()
    g = torch.Generator().manual_seed(0)
    exact = [torch.randn(2, h, 100, width, generator=g).bfloat16().float() for h in (6, n_kv, n_kv)]
    ours = [x.to(GPU, torch.bfloat16).requires_grad_() for x in exact]
    exact = [x.requires_grad_() for x in exact]
    out = packed_attention(*ours, find_bounds(segments, GPU))
    wanted = F.scaled_dot_product_attention(*exact, attn_mask=mask, enable_gqa=True)
    cotangent = torch.randn(wanted.shape, generator=g)
    out.backward(cotangent.to(out))
    wanted.backward(cotangent)
    assert apart(out, wanted) < 0.01
    for mine, other in zip(ours, exact, strict=True):
        assert apart(mine.grad, other.grad) < 0.01


SIZES = dict(vit_hidden_dim=64, vit_n_heads=2, vit_inter_dim=128, lm_hidden_dim=96, lm_n_heads=6,
             lm_n_kv_heads=3, lm_inter_dim=160)  # fmt: skip


@pytest.mark.parametrize("is_compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("dtype, most", [(torch.float32, 2e-4), (torch.bfloat16, 0.05)], ids=str)
def test_a_step_of_training(small_model, some_rows, dtype, most, is_compiled):
    """Loss and every gradient: fp32 in groups of segments, bf16 by their bounds."""
    torch._dynamo.reset()
    plain, made = (small_model(**SIZES).train() for _ in range(2))
    made.to(GPU)
    if is_compiled:
        compile_blocks(made)
    for seed in range(3):
        batch = some_rows(plain.cfg, seed, True)
        plain.zero_grad(), made.zero_grad()
        wanted = plain(**batch, reduction="sum")[1]
        with autocast(GPU, dtype):
            images = batch["images"].to(GPU)
            positions = batch["positions"].to(GPU)
            loss = made(**batch | dict(images=images, positions=positions), reduction="sum")[1]
        wanted.backward()
        loss.backward()
        assert apart(loss, wanted) < most
        # A bias of keys moves no softmax: its gradient is rounding, and not to be compared.
        least = 0.01 * float(torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()]))
        for (name, x), y in zip(plain.named_parameters(), made.parameters(), strict=True):
            assert apart(y.grad, x.grad, least) < most, name


@pytest.mark.parametrize("way", ["recorded", "compiled", "int8"])
@pytest.mark.parametrize("sampling", [Sampling(20), Sampling(20, repetition_penalty=1.3)], ids=str)
def test_answers_are_those_of_a_cpu(small_model, make_sample, pad_rows, way, sampling):
    if way == "compiled" and (why := missing_compiler(GPU)):
        pytest.skip(why)
    torch._dynamo.reset()
    plain, made = (small_model(**SIZES, lm_tie_weights=False) for _ in range(2))
    if way == "int8":
        quantize_int8(plain.decoder), quantize_int8(made.decoder)
    made.to(GPU)
    if way == "compiled":
        compile_decoding(made)
    for prompts in ([(1, 8)], [(0, 3), (1, 8), (2, 5)]):
        samples = [make_sample(plain.cfg, n, words, i) for i, (n, words) in enumerate(prompts)]
        ids, images, mask = pad_rows(plain.cfg, samples, "left")
        wanted = list(steps(plain, ids, images, mask, sampling))
        found = list(steps(made, ids.to(GPU), images.to(GPU), mask.to(GPU), sampling))
        for a, b in zip(found, wanted, strict=True):
            assert apart(a.logits, b.logits) < 1e-3
            assert a.tokens.tolist() == b.tokens.tolist()


def losses(run: Path) -> dict[int, float]:
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_a_run_that_goes_on(tmp_path):
    """train.py as a user types it: 30 steps at once, and the last 15 again."""
    run = tmp_path / "run"

    def train(*more: str) -> str:
        fixed = "tiny --train.steps=30 --train.log-every=1 --train.eval-every=0 --data.workers=2"
        command = [sys.executable, "train.py", *fixed.split(), "--train.save-every=15", *more]
        command += [f"--train.out={run}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    said = train()
    assert torch.cuda.get_device_name() in said and "bf16" in said
    whole = losses(run)
    shutil.rmtree(run / "step-000030")
    train("--train.resume=auto")
    parts = losses(run)
    assert set(whole) == set(parts) == set(range(1, 31))
    assert all(abs(whole[i] - parts[i]) < 0.02 * whole[i] for i in whole), (whole, parts)
    assert whole[30] < 0.8 * whole[1]
