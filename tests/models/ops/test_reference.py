"""Every fast operation equals its plain reference: value and gradients, in bf16 and compiled."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models.ops.activations import swiglu, swiglu_reference
from models.ops.attention import attention, attention_reference
from models.ops.cast_once import cast_once, cast_once_reference
from models.ops.packed import (
    group_segments,
    packed_attention,
    packed_attention_reference,
)
from models.ops.rms_norm import rms_norm, rms_norm_reference
from models.ops.token_loss import token_loss, token_loss_reference

SEGMENTS = torch.tensor([[1, 1, 1, 2, 2, 3, 3, 3, 3], [1, 1, 1, 1, 1, 1, 1, 2, 2]])


def tensors(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g, requires_grad=True) for shape in shapes]


def qkv(n_tokens: int = 9) -> list[torch.Tensor]:
    return tensors((2, 4, n_tokens, 8), (2, 2, 9, 8), (2, 2, 9, 8))


def linear_head(weight: torch.Tensor) -> nn.Linear:
    """A linear head with this weight, which may be a non-leaf tensor."""
    head = nn.Linear(*weight.shape[::-1], bias=False)
    del head.weight
    head.weight = weight
    return head


TARGETS = torch.arange(7) * 3 % 11
MASK = torch.rand(2, 1, 9, 9, generator=torch.Generator().manual_seed(1)) > 0.3
MASK[..., 0] = True
# name: (operation, reference, inputs)
OPS = {
    "rms_norm": (
        lambda x, w: rms_norm(x, w, 1e-3),
        lambda x, w: rms_norm_reference(x, w, 1e-3),
        lambda: tensors((5, 3, 16), (16,)),
    ),
    "swiglu": (swiglu, swiglu_reference, lambda: tensors((5, 3, 16), (5, 3, 16))),
    "attention": (attention, attention_reference, qkv),
    "causal": (
        lambda *x: attention(*x, causal=True),
        lambda *x: attention_reference(*x, causal=True),
        qkv,
    ),
    "masked": (lambda *x: attention(*x, MASK), lambda *x: attention_reference(*x, MASK), qkv),
    "single query": (
        lambda *x: attention(*x, causal=True),
        lambda *x: attention_reference(*x, causal=True),
        lambda: qkv(1),
    ),
    "packed": (
        lambda *x: packed_attention(*x, group_segments(SEGMENTS, x[0].device)),
        lambda *x: packed_attention_reference(*x, SEGMENTS),
        qkv,
    ),
    "token_loss": (
        lambda x, w: token_loss(x, linear_head(w), TARGETS),
        lambda x, w: token_loss_reference(x, linear_head(w), TARGETS),
        lambda: tensors((7, 6), (11, 6)),
    ),
}


def value_and_gradients(operation, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    out = operation(*inputs)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    grads = torch.autograd.grad(out, inputs, cotangent.to(out.dtype))
    assert [g.dtype for g in grads] == [x.dtype for x in inputs]
    return [out.detach().float(), *(g.float() for g in grads)]


@pytest.mark.parametrize("name", OPS)
def test_value_and_gradients(name):
    operation, reference, inputs = OPS[name]
    found, expected = (value_and_gradients(f, inputs()) for f in (operation, reference))
    for actual, value in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        x = inputs()
        torch.testing.assert_close(operation(*x), reference(*x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OPS)
def test_under_autocast_and_in_bf16(name):
    """Close to the fp32 reference, within the rounding of bf16."""
    operation, reference, inputs = OPS[name]
    expected = value_and_gradients(reference, inputs())
    with torch.autocast("cpu", torch.bfloat16):
        found = [value_and_gradients(operation, inputs())]
    if name != "token_loss":  # training keeps its weights in fp32
        x = [t.detach().bfloat16().requires_grad_() for t in inputs()]
        found.append(value_and_gradients(operation, x))
    for values in found:
        for actual, value in zip(values, expected, strict=True):
            assert (actual - value).norm() <= 0.02 * value.norm() + 1e-6


@pytest.mark.parametrize("name", OPS)
def test_compiled(name):
    torch._dynamo.reset()
    operation, _, inputs = OPS[name]
    if name == "token_loss":
        pytest.skip("training compiles blocks only, not the loss")
    eager, compiled = (
        value_and_gradients(f, inputs())
        for f in (operation, torch.compile(operation, backend="aot_eager"))
    )
    for actual, value in zip(compiled, eager, strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["rms_norm", "swiglu", "token_loss"])
def test_second_derivatives_raise(name):
    """Otherwise autograd would silently treat hand-written gradients as constants."""
    operation, _, inputs = OPS[name]
    x = inputs()
    (grad, *_) = torch.autograd.grad(operation(*x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        torch.autograd.grad(grad.sum(), x)


def test_heads_with_hooks_and_subclasses_are_called():
    """Forward hooks and LoRA on the head then also apply in training."""
    x, w = tensors((7, 6), (11, 6))
    calls = []
    hooked = linear_head(w)
    hooked.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(
        token_loss(x, hooked, TARGETS), token_loss(x, linear_head(w), TARGETS), rtol=1e-5, atol=1e-5
    )
    assert calls == [1]

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    doubled = Doubled(6, 11, bias=False)
    doubled.weight = nn.Parameter(w.detach())
    expected = token_loss_reference(2 * x, linear_head(w), TARGETS)
    torch.testing.assert_close(token_loss(x, doubled, TARGETS), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_cast_once_is_bit_identical(autocast):
    """Value and gradients of three layers are equal, with fewer copies stored for backward."""
    layers = nn.ModuleList(nn.Linear(16, 8, bias=False) for _ in range(3))
    g = torch.Generator().manual_seed(3)
    found = []
    for cast in (cast_once, cast_once_reference):
        x = torch.randn(5, 16, generator=g.manual_seed(3)).requires_grad_()
        kept: dict[int, torch.Tensor] = {}

        def keep(t, kept=kept):
            kept[t.data_ptr()] = t
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = x * 1  # an activation: autocast caches casts of leaves only
                out = sum(layer(z).square() for layer, z in zip(layers, cast(y, 3)))
        grads = torch.autograd.grad(out.float().sum(), (x, *layers.parameters()))
        n_copies = sum(t.shape == (5, 16) for t in kept.values())
        found.append((n_copies, out, *grads))
    (n_once, *once), (n_plain, *plain) = found
    assert (n_once, n_plain) == ((1, 3) if autocast else (1, 1))
    assert all(map(torch.equal, once, plain))
