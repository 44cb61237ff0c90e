"""What torch.compile makes of a model: few kernels of each block while it trains, and of a token.

Not here: whether that pays (engine/training/distributed.py), and the blocks, which do not know of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.inference.cuda_graph import cuda_graph
from models.inference.kv_cache import KVCache, StaticCache
from models.ops import packed

MAX_ROWS_FOR_LOOP = 8  # rows that meet a matrix in a loop; with more, products are faster
MIN_ROWS_FOR_PACKED_GEMM = (
    5  # rows from which oneDNN's products in bf16 are, of matrices that it packs beforehand
)
MIN_WIDTH_FOR_PACKED_GEMM = (
    384  # channels, too: the rows of a narrow model are over before oneDNN has begun
)


def compile_blocks(model: nn.Module, backend: str = "inductor") -> None:
    """Compile the blocks of all parts, in place: no name changes.

    A block rather than the model, as they are alike: one is compiled for all, and other processes
    get gradients as soon as a block has them. Behind the hooks that a block has or gets: FSDP
    gathers its weights first. In evaluation it runs as it is, as lengths change with every token.
    """
    from torch._dynamo import config

    config.optimize_ddp = False  # it would cut a block at DDP's buckets, and refuses our gradients
    config.recompile_limit = 64  # of 8, drop-path alone takes one for every block
    # How many segments of which length there are differs in every batch.
    packed.segment_attention = torch.compiler.disable(packed.segment_attention)
    for part in list(model.modules()):
        for block in getattr(part, "blocks", ()):
            block.forward = _while_training(block, torch.compile(block.forward, backend=backend))


def _while_training(block: nn.Module, compiled: Callable[..., Tensor]) -> Callable[..., Tensor]:
    plain = block.forward
    return lambda *args, **named: (compiled if block.training else plain)(*args, **named)


def materialize(x: Tensor) -> Tensor:
    """x, which a compiler would else make again in every round of a loop that reads it.

    What makes it may be a norm; and a loop over bf16 beside words of int8 is 10 times as slow.
    """
    from torch._inductor.inductor_prims import force_stride_order

    return force_stride_order(x, x.stride())


def _product(a: Tensor, b: Tensor) -> Tensor:
    """[R, K] @ [K, N] as R sums in one loop over b, which is read once: half of MKL's time."""
    if len(a) > MAX_ROWS_FOR_LOOP:
        return NotImplemented  # as it was
    wide, weight = materialize(a.float()), b.t().float()  # bf16 is made wide once for all rows
    return torch.stack([(weight * row).sum(-1) for row in wide.unbind()]).to(a.dtype)  # [R, N]


def _inductor_with_row_loops(graph: torch.fx.GraphModule, inputs: list) -> Callable:
    """inductor, with `_product` in place of products of few rows."""
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table

    table = select_decomp_table() | {torch.ops.aten.mm.default: _product}
    # Matrices in 8 bits are four sums each: made again for whatever reads them, compiling takes
    # minutes.
    once = {"realize_reads_threshold": 1}
    return compile_fx(graph, inputs, config_patches=once, decompositions=table)


def _takes_packed(model: nn.Module, n_rows: int) -> bool:
    """Whether a step of `n_rows` is faster with a packed copy of all matrices: in bf16 alone.

    Matrices in 8 bits would be made wide for it.
    """
    in_bf16 = {x.dtype for x in model.decoder.state_dict().values()} == {torch.bfloat16}
    is_large = (
        n_rows >= MIN_ROWS_FOR_PACKED_GEMM and model.cfg.lm_hidden_dim >= MIN_WIDTH_FOR_PACKED_GEMM
    )
    return in_bf16 and is_large and torch.cpu._is_avx512_bf16_supported()


def compile_decoding(model: nn.Module, backend: str | Callable | None = None) -> float:
    """From here on each token of an answer is one function of `model`; returns seconds.

    They pass in here, for one row; the first answer to another number of rows compiles again. A GPU
    records what was compiled. Rows that are refilled (generation.serve) stay as they are: with many
    the products outweigh calling them, which is what this saves. Weights must not change any more,
    as a step may have a copy of them.
    """
    from torch._inductor import config

    on_cpu = model.device.type == "cpu"
    loops = backend or (_inductor_with_row_loops if on_cpu else "inductor")
    step = torch.compile(model.decode, fullgraph=True, backend=loops)
    packed = torch.compile(model.decode, fullgraph=True, backend=backend or "inductor")
    packed = config.patch(freezing=True)(packed)  # matrices are constants of what a call traces

    def decoder(cache: KVCache, tokens: Tensor, positions: Tensor) -> Callable[..., Tensor]:
        for x in (*cache.k, *cache.v):
            torch._dynamo.mark_dynamic(x, 2)  # slots: one function for caches of every length
        for x in cache.turns:
            torch._dynamo.mark_dynamic(x, 1)
        if not on_cpu:
            return cuda_graph(step, cache, tokens, positions)
        static, own = StaticCache(cache), packed if _takes_packed(model, len(tokens)) else step
        return lambda tokens, positions: own(tokens, positions, static)

    model.compiled_decoder, start = decoder, time.perf_counter()
    with torch.inference_mode():
        cache = KVCache(model.cfg, 1, 64, model.device, model.decoder.norm.weight.dtype)
        # Two tensors, as later: of one that is both a function of its own would be made.
        token, position = torch.zeros(2, 1, dtype=torch.long, device=model.device)
        decoder(cache, token, position)(token, position)
    return time.perf_counter() - start
