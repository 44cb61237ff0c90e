"""Weight-only int8 for a decoder, in inference: a token reads a quarter of fp32's bytes.

Weights are rounded to 255 levels with one scale per row; activations keep their dtype. Uncompiled,
this saves memory but little time. Not here: compiling the decoding step (compile.py).

Letters: N outputs, K inputs, R rows of x.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.inference.compile import MAX_ROWS_FOR_LOOP, materialize

LANES = (0xFF, 0xFF00, 0xFF0000, -0x1000000)  # masks of a word's four bytes; the highest is signed
UNSIGNED = 0x808080  # flipping these bits adds 128 to the three lower bytes
MAX_WEIGHT_BYTES = 1 << 19  # weights cast at a time; as fp32 they are 2 MiB, which fit in cache


class Int8Linear(nn.Module):
    """`x @ weight.T` of a linear layer without bias, whose K is a multiple of 4.

    Word i of a row holds columns i, i + K/4, i + K/2 and i + 3K/4, so that one byte position of
    consecutive words multiplies consecutive columns of x. The compiled loop masks, converts and
    multiplies words as fast as memory delivers them. The words are stored as float32 bits, because
    torch 2.13 loads int8 and int32 through a buffer: twenty and five times slower.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        wide = weight.detach().float()
        scale = (wide.abs().amax(1) / 127).clamp(min=1e-30)  # [N]
        steps = (wide / scale[:, None]).round().to(torch.int8)  # [N, K]
        lanes = steps.unflatten(1, (4, -1)).transpose(1, 2)  # [N, K/4, 4]
        self.register_buffer("words", lanes.contiguous().flatten(1).view(torch.float32))
        self.register_buffer("scale", scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:
        """Move words and scales to another device; a change of dtype is ignored."""
        for name, x in self.named_buffers():
            setattr(self, name, fn(x.view(torch.int32)).view(torch.float32))
        return self

    @property
    def weight(self) -> Tensor:
        """The dequantized matrix, [N, K]."""
        steps = self.words.view(torch.int8).unflatten(1, (-1, 4)).transpose(1, 2)  # [N, 4, K/4]
        return steps.flatten(1) * self.scale[:, None]

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # [R, K]
        if torch.compiler.is_compiling() and len(rows) <= MAX_ROWS_FOR_LOOP:
            out = self._by_lanes(materialize(rows.float()))
        else:
            # Unscaled fp16 sums overflow, and bf16 is slow on a CPU for few rows: use fp32.
            is_few = rows.device.type == "cpu" and len(rows) <= MAX_ROWS_FOR_LOOP
            rows = rows.float() if rows.dtype == torch.float16 or is_few else rows
            lanes = rows.unflatten(1, (4, -1)).transpose(1, 2).flatten(1)  # [R, K], word order
            parts = self.words.view(torch.int8).split(max(1, MAX_WEIGHT_BYTES // lanes.shape[1]))
            out = torch.cat([F.linear(lanes, part.to(rows.dtype)) for part in parts], 1).float()
        return (out * self.scale).to(x.dtype).view(*x.shape[:-1], len(self.scale))

    def _by_lanes(self, rows: Tensor) -> Tensor:
        """[R, K] -> [R, N], before the scale."""
        words = self.words.view(torch.int32) ^ UNSIGNED  # [N, K/4]
        parts = rows.unflatten(1, (4, -1))  # [R, 4, K/4]
        out = -128 * parts[:, :3].sum((1, 2))[:, None]  # [R, 1]
        for i, lane in enumerate(LANES):
            out = out + ((words & lane).float() * parts[:, i, None]).sum(-1) * 2.0 ** (-8 * i)
        return out


def quantize_int8(decoder: nn.Module) -> None:
    """Quantize linear layers without bias to int8, in place, if in_features is a multiple of 4."""
    for module in list(decoder.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and child.bias is None and child.in_features % 4 == 0:
                setattr(module, name, Int8Linear(child.weight))
