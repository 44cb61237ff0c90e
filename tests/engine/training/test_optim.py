"""Each parameter is in one group; optimizers match references; the schedule depends on the step."""

from __future__ import annotations

import copy
import io
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from config_tools import InputError, read_json
from configs import TrainConfig
from engine.training.optim import Muon, build_optimizer, lr_factor, newton_schulz
from models.vision_language_model import VisionLanguageModel

RATES = dict(lr_vision=0.001, lr_projector=0.002, lr_language=0.003, lr_muon=0.05, weight_decay=0.1)


def groups_by_name(model, cfg: TrainConfig) -> dict[str, dict]:
    """Parameter name -> its group; a parameter in two groups, or twice in one, fails."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for group in build_optimizer(model.parts, cfg).param_groups:
        for p in group["params"]:
            assert names[id(p)] not in found
            found[names[id(p)]] = group
    return found


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("tied", [True, False])
def test_groups(small_model, kind, tied):
    model = small_model(
        lm_tie_weights=tied, lm_qk_norm=True, lm_qkv_bias=True, vit_cls_flag=True, vit_n_registers=2
    )
    found = groups_by_name(model, TrainConfig(optimizer=kind, **RATES))
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert ("decoder.head.weight" in found) == (not tied)
    rates = {"vision_encoder": 0.001, "MP": 0.002, "decoder": 0.003}
    n_muon = 0
    for name, p in model.named_parameters():
        group = found[name]
        if kind == "muon" and ".blocks." in name and p.ndim == 2:
            n_muon += 1
            assert (group["lr"], group["momentum"]) == (0.05, 0.95), name
        else:
            assert group["lr"] == rates[name.split(".")[0]] and "betas" in group, name
        spared = p.ndim < 2 or "embedding" in name
        assert group["weight_decay"] == (0.0 if spared else 0.1), name
    cfg = model.cfg
    assert n_muon == (kind == "muon") * (6 * cfg.vit_n_blocks + 7 * cfg.lm_n_blocks)


def test_registers_and_cls_do_not_decay(small_model):
    model = small_model(vit_cls_flag=True, vit_n_registers=2)
    found = groups_by_name(model, TrainConfig(**RATES))
    names = [n for n in found if "cls" in n or "register" in n]
    assert names and [found[n]["weight_decay"] for n in names] == [0.0] * len(names)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_frozen_parts_have_no_optimizer_group(small_model, kind):
    model = small_model()
    found = groups_by_name(model, TrainConfig(optimizer=kind, freeze=("vision", "language")))
    assert set(found) == {n for n, _ in model.named_parameters() if n.startswith("MP.")}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(found)
    groups_by_name(model, TrainConfig(optimizer=kind))  # a later run trains them again
    assert all(p.requires_grad for p in model.parameters())
    everything = TrainConfig(optimizer=kind, freeze=("projector",))
    with pytest.raises(InputError, match="nothing to train"):
        build_optimizer({"projector": model.MP}, everything)


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (24, 24), (1, 8)])
def test_newton_schulz_brings_singular_values_near_one(shape):
    torch.manual_seed(0)
    x = torch.randn(3, *shape)
    y = newton_schulz(x, torch.float32)
    values = torch.linalg.svdvals(y)
    # The quintic maps values above about 0.005 of the norm to 0.7 ... 1.2; square matrices have
    # smaller ones.
    low = 0.6 if shape[0] != shape[1] else 0.0
    assert y.shape == x.shape and values.max() <= 1.3 and values.min() >= low
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    # Singular vectors are unchanged: u.T y v is diagonal.
    core = u.mT @ y @ vh.mT
    torch.testing.assert_close(core, torch.diag_embed(core.diagonal(dim1=1, dim2=2)),
                               atol=1e-4, rtol=0)  # fmt: skip
    assert newton_schulz(torch.zeros(1, *shape), torch.float32).eq(0).all()


def naive_muon(p, grads, lr, mu, decay):
    """Muon on one matrix in float64, as in https://kellerjordan.github.io/posts/muon/."""
    p, buffer = p.double(), torch.zeros_like(p, dtype=torch.float64)
    for g in grads:
        buffer = mu * buffer + (1 - mu) * g.double()
        x = mu * buffer + (1 - mu) * g.double()
        x = x / x.norm()
        if x.shape[0] > x.shape[1]:
            x = x.T
        for _ in range(5):
            A = x @ x.T
            x = 3.4445 * x - 4.7750 * A @ x + 2.0315 * A @ A @ x
        if p.shape[0] > p.shape[1]:
            x = x.T
        p = (1 - lr * decay) * p - lr * max(1, p.shape[0] / p.shape[1]) ** 0.5 * x
    return p


def test_muon_matches_the_naive_implementation():
    torch.manual_seed(0)
    shapes = [(6, 10), (10, 6), (8, 8), (6, 10), (6, 10)]
    params = [torch.nn.Parameter(torch.randn(s)) for s in shapes]
    idle = torch.nn.Parameter(torch.randn(6, 10))  # same shape as others, but no gradient
    starts, grads = [p.detach().clone() for p in params], [[torch.randn(s) for s in shapes]
                                                           for _ in range(4)]  # fmt: skip
    before = idle.detach().clone()
    optimizer = Muon([*params, idle], lr=0.1, momentum=0.9, weight_decay=0.3)
    for step in grads:
        for p, g in zip(params, step):
            p.grad = g.clone()
        optimizer.step()
    for i, p in enumerate(params):
        expected = naive_muon(starts[i], [step[i] for step in grads], 0.1, 0.9, 0.3)
        torch.testing.assert_close(p.detach().double(), expected, atol=2e-5, rtol=1e-4)
    assert torch.equal(idle, before)


def set_gradients(model, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = 0.1 * torch.randn(p.shape, generator=generator)


def test_adamw_matches_torch(small_model):
    model = small_model()
    twin = copy.deepcopy(model)
    cfg = TrainConfig(optimizer="adamw", **RATES)
    fused = build_optimizer(model.parts, cfg)
    by_id = {id(p): q for p, q in zip(model.parameters(), twin.parameters(), strict=True)}
    reference = [
        torch.optim.AdamW(
            [by_id[id(p)] for p in g["params"]],
            lr=g["lr"],
            betas=(0.9, 0.98),
            weight_decay=g["weight_decay"],
        )
        for g in fused.param_groups
    ]
    for seed in range(3):
        set_gradients(model, seed), set_gradients(twin, seed)
        fused.step()
        for optimizer in reference:
            optimizer.step()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=lambda text, name=name: f"{name}: {text}")
    fused.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_optimizer_state_is_allocated_before_the_first_step(small_model, kind):
    """Allocated later, it would fragment memory; and no step reallocates it."""
    model = small_model()
    optimizer = build_optimizer(model.parts, TrainConfig(optimizer=kind))

    def addresses() -> set[int]:
        return {x.data_ptr() for member in optimizer.members
                for state in member.state.values() for x in state.values()}  # fmt: skip

    params = [p for group in optimizer.param_groups for p in group["params"]]
    n = [len(member.state) for member in optimizer.members]
    before = addresses()
    assert sum(n) == len(params) and not any(
        x.any() for m in optimizer.members for state in m.state.values() for x in state.values()
    )
    set_gradients(model, 0)
    optimizer.step()
    assert addresses() == before and len(before) > len(params)


def test_state_dict_round_trip(small_model):
    model = small_model()
    twin = copy.deepcopy(model)
    a = build_optimizer(model.parts, TrainConfig(**RATES))
    set_gradients(model, 0)
    a.set_lr(0.5)
    a.step()
    b = build_optimizer(twin.parts, TrainConfig(**RATES))
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    twin.load_state_dict(model.state_dict())
    for optimizer, m in ((a, model), (b, twin)):
        set_gradients(m, 1)
        optimizer.set_lr(0.25)
        optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    assert [g["lr"] for g in b.param_groups] == [0.25 * g["peak_lr"] for g in a.param_groups]


def test_learning_rate_shapes():
    def factors(schedule, warmup=4, steps=12):
        cfg = TrainConfig(schedule=schedule, warmup=warmup, steps=steps)
        return [lr_factor(cfg, s) for s in range(steps)]

    for schedule in ("linear", "cosine", "constant"):
        assert factors(schedule)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
        assert all(0 < f <= 1 for f in factors(schedule, warmup=0, steps=7))
        assert factors(schedule, warmup=0, steps=1) == [1.0]
        assert factors(schedule, warmup=20, steps=3) == pytest.approx([0.05, 0.1, 0.15])
    assert factors("constant")[4:] == [1.0] * 8
    assert factors("linear")[4:] == pytest.approx([1 - i / 8 for i in range(8)])
    assert factors("cosine")[4:] == pytest.approx(
        [(1 + math.cos(math.pi * i / 8)) / 2 for i in range(8)]
    )
    past = TrainConfig(warmup=4, steps=12)
    assert lr_factor(past, 12) == lr_factor(past, 99) == 0


def test_a_tied_head_gets_the_embedding_group(minute_config):
    model = VisionLanguageModel(minute_config(lm_tie_weights=True))
    build_optimizer(model.parts, TrainConfig(optimizer="adamw"))
    assert model.decoder.head.weight is model.decoder.token_embedding.weight
    found = groups_by_name(model, TrainConfig(optimizer="adamw", weight_decay=0.1))
    assert found["decoder.token_embedding.weight"]["weight_decay"] == 0.0


def test_layer_decay_lowers_rates_towards_the_input(small_model):
    model = small_model(vit_n_blocks=3)
    cfg = TrainConfig(optimizer="muon", layer_decay=0.5, **RATES)
    found = groups_by_name(model, cfg)
    shares = {"layer_norm": 1, "blocks.2": 1 / 2, "blocks.0": 1 / 8, "patch_embedding": 1 / 16}
    for part, share in shares.items():
        names = [n for n in found if n.startswith(f"vision_encoder.{part}.")]
        assert names
        for name in names:
            peak = 0.05 if "momentum" in found[name] else 0.001
            assert found[name]["lr"] == pytest.approx(peak * share), name
    assert found["MP.proj.weight"]["lr"] == 0.002  # the projector has no blocks
    assert found["decoder.token_embedding.weight"]["lr"] == pytest.approx(0.003 / 2**4)


def ema_run(steps: int, ema: float) -> tuple[list, list, object]:
    """Return (weights after each step, layer, optimizer) of a few steps with random gradients."""
    torch.manual_seed(0)
    part = torch.nn.Linear(3, 2)
    optimizer = build_optimizer({"vision": part}, TrainConfig(optimizer="adamw", ema=ema, **RATES))
    seen = [part.weight.detach().clone()]
    for step in range(steps):
        set_gradients(part, step)
        optimizer.step()
        seen.append(part.weight.detach().clone())
    return seen, part, optimizer


def test_averaged_weights_are_the_naive_average():
    seen, part, optimizer = ema_run(30, ema=0.7)
    average = seen[0]
    for n, weight in enumerate(seen[1:], 1):
        decay = min(0.7, n / (n + 9))
        average = decay * average + (1 - decay) * weight
    with optimizer.averaged():
        torch.testing.assert_close(part.weight.detach(), average)
    assert torch.equal(part.weight.detach(), seen[-1])
    assert not torch.allclose(average, seen[-1])


def test_a_run_with_averages_resumes_exactly():
    """A checkpoint holds averages as the model and trained weights in the optimizer state."""
    seen, *_ = ema_run(9, ema=0.7)
    _, part, optimizer = ema_run(5, ema=0.7)
    with optimizer.averaged():
        state = copy.deepcopy(optimizer.state_dict())
        saved = copy.deepcopy(part.state_dict())
    _, part, optimizer = ema_run(0, ema=0.7)
    part.load_state_dict(saved)
    optimizer.load_state_dict(state)
    assert torch.equal(part.weight, seen[5])
    for step in range(5, 9):
        set_gradients(part, step)
        optimizer.step()
    assert torch.equal(part.weight, seen[9])
    whole = ema_run(9, ema=0.7)
    with optimizer.averaged(), whole[2].averaged():
        torch.testing.assert_close(part.weight, whole[1].weight, rtol=0, atol=0)


def test_without_ema_weights_and_state_are_unchanged(small_model):
    _, part, optimizer = ema_run(2, ema=0.0)
    before = part.weight.detach().clone()
    with optimizer.averaged():
        assert torch.equal(part.weight, before)
    assert len(optimizer.state_dict()) == 1


# --- 8-bit AdamW ---------------------------------------------------------------------------------


@pytest.fixture
def eight_bits():
    pytest.importorskip("torchao", reason="torchao is not installed: adamw8bit is not tested")
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("no C++ compiler for torchao: adamw8bit is not tested")
    return TrainConfig(optimizer="adamw8bit", **RATES)


def n_bytes(state: object) -> int:
    if torch.is_tensor(state):
        return state.untyped_storage().nbytes()
    values = state.values() if isinstance(state, dict) else state
    return sum(map(n_bytes, values)) if isinstance(state, (dict, list)) else 0


def test_adamw8bit_matches_adamw_with_less_memory(small_config, eight_bits):
    models, states = [], []
    for cfg in (TrainConfig(optimizer="adamw", **RATES), eight_bits):
        torch.manual_seed(0)
        model = VisionLanguageModel(small_config(lm_hidden_dim=128, lm_inter_dim=256))
        optimizer = build_optimizer(model.parts, cfg)
        for seed in range(3):
            set_gradients(model, seed)
            optimizer.set_lr(0.5)
            optimizer.step()
        models.append(dict(model.decoder.blocks.named_parameters()))
        states.append(optimizer.state_dict()[0]["state"])
    assert n_bytes(states[1]) < 0.4 * n_bytes(states[0])  # its small tensors keep 32 bits
    name = "0.mlp.up_proj.weight"
    eight_bit, full = models[1][name], models[0][name]
    torch.manual_seed(0)
    start = dict(VisionLanguageModel(small_config(lm_hidden_dim=128, lm_inter_dim=256)).decoder
                 .blocks.named_parameters())[name]  # fmt: skip
    moved = full - start
    assert 0 < (eight_bit - full).norm() < 0.2 * moved.norm()


def test_adamw8bit_state_is_saved_as_plain_tensors(small_config, eight_bits):
    """A restored state continues bit for bit, and the file opens without torchao."""
    torch.manual_seed(0)
    model = VisionLanguageModel(small_config(lm_hidden_dim=128))
    twin = copy.deepcopy(model)
    a, b = (build_optimizer(m.parts, eight_bits) for m in (model, twin))
    set_gradients(model, 0)
    a.step()
    file = io.BytesIO()
    torch.save(a.state_dict(), file)
    assert b"torchao" not in file.getvalue()
    twin.load_state_dict(model.state_dict())
    b.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    for seed in (1, 2):
        for optimizer, m in ((a, model), (b, twin)):
            set_gradients(m, seed)
            optimizer.set_lr(0.25)
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters()))
    assert [g["lr"] for g in b.param_groups] == [0.25 * g["peak_lr"] for g in a.param_groups]


def test_a_run_with_adamw8bit_resumes_exactly(run_file, eight_bits):
    path = run_file("run", dict(lm_hidden_dim=128), steps=4, save_every=2, optimizer="adamw8bit")
    train.main([str(path)])
    last = Path(read_json(path)["train"]["out"], "step-000004")
    whole = load_file(last / "model.safetensors")
    shutil.rmtree(last)
    train.main([str(path), "--train.resume", "auto"])
    again = load_file(last / "model.safetensors")
    assert [name for name in whole if not torch.equal(whole[name], again[name])] == []
    other = [str(path), "--train.resume", "auto", "--train.optimizer", "adamw"]
    with pytest.raises(InputError, match=r"train\.optimizer: was 'adamw8bit', now 'adamw'"):
        train.main(other)


def test_adamw8bit_needs_torchao(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    cfg = TrainConfig(optimizer="adamw8bit")
    with pytest.raises(InputError, match=r"adamw8bit.*torchao; run `pip install torchao`"):
        build_optimizer({"vision": torch.nn.Linear(2, 2)}, cfg)
