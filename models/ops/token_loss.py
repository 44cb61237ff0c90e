"""Cross-entropy of the language model's head without storing all logits (Liger, Hsu et al. 2024).

Letters: N supervised tokens, D width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.ops.memory import autocast_dtype

# Maximum logits in memory: 128 MiB in fp32 on a CPU. A GPU gets larger chunks: for small ones,
# accumulating the head's gradient takes longer than the matrix products.
MAX_LOGITS = {"cpu": 1 << 25, "cuda": 1 << 27}


def token_loss_reference(hidden: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
    """The sum of -log p(target) over N tokens, in fp32."""
    return F.cross_entropy(head(hidden).float(), targets, reduction="sum")


def token_loss(hidden: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
    """Summed cross-entropy of hidden states [N, D] against targets [N] -> scalar.

    For a plain `nn.Linear` without bias or hooks, loss and gradients are computed in chunks of at
    most MAX_LOGITS logits; this loss supports one `backward()`. Any other head, for example with a
    LoRA adapter or a hook, is called as a module.
    """
    if type(head) is not nn.Linear or head.bias is not None or _has_hooks(head):
        return token_loss_reference(hidden, head, targets)
    return _ChunkedTokenLoss.apply(hidden, head.weight, targets, torch.is_grad_enabled())


def _has_hooks(module: nn.Module) -> bool:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in hooks)


class _ChunkedTokenLoss(torch.autograd.Function):
    """The gradients are computed in forward, while a chunk's logits exist."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, has_grad):
        needs_hidden, needs_weight = (has_grad and needed for needed in ctx.needs_input_grad[:2])
        max_logits = MAX_LOGITS.get(hidden.device.type, MAX_LOGITS["cpu"])
        chunk_size = max(1, max_logits // len(weight))
        dtype = autocast_dtype(hidden)
        w = weight.to(dtype)  # [V, D]
        total, grad_hidden, grad_weight = 0, [], None
        for x, t in zip(hidden.to(dtype).split(chunk_size), targets[:, None].split(chunk_size)):
            log_p = F.log_softmax(F.linear(x, w).float(), -1)  # [n, V]
            total = total - log_p.gather(1, t).sum()
            if not needs_hidden and not needs_weight:
                continue
            grad = log_p.exp_()  # softmax - one_hot is the gradient of the logits
            grad = grad.scatter_add_(1, t, grad.new_full(t.shape, -1.0)).to(dtype)  # [n, V]
            if needs_hidden:
                grad_hidden.append(grad @ w)
            if needs_weight:
                part = (grad.t() @ x).to(weight.dtype)  # [V, D]
                grad_weight = part if grad_weight is None else grad_weight.add_(part)
        ctx.grads = torch.cat(grad_hidden).to(hidden.dtype) if needs_hidden else None, grad_weight
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if ctx.grads is None:
            raise RuntimeError(
                "this loss supports one backward(); call forward again "
                "(retain_graph is not supported)"
            )
        grads, ctx.grads = ctx.grads, None
        return *(None if x is None else x.mul_(grad) for x in grads), None, None
