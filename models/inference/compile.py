"""torch.compile for training blocks and for decoding.

Not here: whether to compile in training (engine/training/distributed.py).

Letters: R rows, K inputs, N outputs.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from models.inference.cuda_graph import cuda_graph
from models.inference.kv_cache import KVCache, StaticCache
from models.vision_language_model import VisionLanguageModel

MAX_ROWS_FOR_LOOP = 8  # up to this batch size a loop over the matrix is faster than a GEMM
# From this batch size and width on, oneDNN's pre-packed bf16 GEMM is faster than the loop.
MIN_ROWS_FOR_PACKED_GEMM = 5
MIN_WIDTH_FOR_PACKED_GEMM = 384


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks of all parts of a model."""
    parts = [getattr(part, "blocks", None) for part in model.modules()]
    return [block for blocks in parts if isinstance(blocks, nn.ModuleList) for block in blocks]


def compile_blocks(model: nn.Module, backend: str | Callable = "inductor") -> None:
    """Compile every block for training, in place (`nn.Module.compile`).

    Compiling blocks instead of the whole model lets equal blocks share one compilation, and lets
    DDP reduce gradients block by block during backward.
    """
    from torch._dynamo import config

    config.optimize_ddp = False  # it splits blocks, and does not support autograd.Function
    config.recompile_limit = 64  # each drop-path rate recompiles; the default is 8
    for block in blocks_of(model):
        block.compile(backend=backend)


def eager_blocks(model: nn.Module) -> contextlib.AbstractContextManager:
    """Run compiled blocks eagerly: in evaluation every new length would recompile them."""
    if any(block._compiled_call_impl is not None for block in blocks_of(model)):
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


def materialize(x: Tensor) -> Tensor:
    """Compute x once; else the compiler fuses it into every iteration of a loop that reads it.

    A fused norm, or a fused cast of bf16 next to int8 words, makes such a loop ten times slower.
    """
    from torch._inductor.inductor_prims import force_stride_order

    return force_stride_order(x, x.stride())


def _few_row_product(a: Tensor, b: Tensor) -> Tensor:
    """[R, K] @ [K, N] in one loop that reads b once, which takes half of MKL's time."""
    if len(a) > MAX_ROWS_FOR_LOOP:
        return NotImplemented  # keep the GEMM
    x, weight = materialize(a.float()), b.t().float()  # bf16 is cast once for all rows
    return torch.stack([(weight * row).sum(-1) for row in x.unbind()]).to(a.dtype)  # [R, N]


def _inductor_with_row_loops(graph: torch.fx.GraphModule, inputs: list) -> Any:
    """The inductor backend, with `_few_row_product` for matrix products of few rows."""
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table

    table = select_decomp_table() | {torch.ops.aten.mm.default: _few_row_product}
    # An int8 product is four sums. Unless they are realized, inductor fuses them again into every
    # reader, and compiling takes minutes.
    patches = {"realize_reads_threshold": 1}
    return compile_fx(graph, inputs, config_patches=patches, decompositions=table)


def _uses_packed_gemm(model: VisionLanguageModel, n_rows: int) -> bool:
    """Whether oneDNN's pre-packed GEMM is faster for a step of `n_rows` (bf16 only)."""
    is_bf16 = {x.dtype for x in model.decoder.state_dict().values()} == {torch.bfloat16}
    is_wide = model.cfg.lm_hidden_dim >= MIN_WIDTH_FOR_PACKED_GEMM
    is_large = n_rows >= MIN_ROWS_FOR_PACKED_GEMM and is_wide
    return is_bf16 and is_large and torch.cpu._is_avx512_bf16_supported()


def compile_decoding(model: VisionLanguageModel, backend: str | Callable | None = None) -> float:
    """Compile the decoding step, in place; returns the seconds it took.

    Compiles for one row now, and recompiles when another number of rows first occurs. On a GPU the
    compiled step is captured as a CUDA graph. Continuous batching is not compiled: with many rows,
    matrix products take most of the time. Do not change the weights afterwards, because a compiled
    step may hold a packed copy of them.
    """
    from torch._inductor import config

    on_cpu = model.device.type == "cpu"
    inductor = backend or (_inductor_with_row_loops if on_cpu else "inductor")
    step = torch.compile(model.decode, fullgraph=True, backend=inductor)
    packed = torch.compile(model.decode, fullgraph=True, backend=backend or "inductor")
    packed = config.patch(freezing=True)(packed)  # weights become constants, packed when compiled

    def compiled_decode(
        cache: KVCache, tokens: Tensor, positions: Tensor
    ) -> Callable[[Tensor, Tensor], Tensor]:
        for x in (*cache.k, *cache.v):
            torch._dynamo.mark_dynamic(x, 2)  # slots: one compilation for all cache lengths
        for x in (cache.cos, cache.sin):
            torch._dynamo.mark_dynamic(x, 1)
        if not on_cpu:
            return cuda_graph(step, cache, tokens, positions)
        static = StaticCache(cache)
        decode = packed if _uses_packed_gemm(model, len(tokens)) else step
        return lambda tokens, positions: decode(tokens, positions, static)

    model.compiled_decode, start = compiled_decode, time.perf_counter()
    with torch.inference_mode():
        cache = KVCache(model.cfg, 1, 64, model.device, model.decoder.norm.weight.dtype)
        # Two tensors, as in later calls: one tensor passed twice would compile another graph.
        token, position = torch.zeros(2, 1, dtype=torch.long, device=model.device)
        compiled_decode(cache, token, position)(token, position)
    return time.perf_counter() - start
