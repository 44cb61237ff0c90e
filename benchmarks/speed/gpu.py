"""On one GPU: how close training and decoding come to the hardware's peak.

python -m benchmarks.speed.gpu 222m 460m qwen3      writes a block each into docs/benchmarks.md
python -m benchmarks.speed.gpu 222m --no-write      prints only
python -m benchmarks.speed.gpu 222m --kernels 20    lists the kernels a training step spends time on

Per preset: the best batch (doubled until memory runs out or speed stops growing), its share of the
measured matrix FLOP/s, tokens/s, images/s, peak memory, the time for 1.7 million samples of an
image and 128 tokens; decoding of 1 and 64 rows against memory bandwidth. picoVLM trains as train.py
does, with compiled blocks where possible. transformers runs beside it after their losses were
found equal. Without a GPU the CPU is used, for the tests.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.speed.peers import (
    check_equal,
    hf_generate,
    load_hf_model,
    pad_samples,
    prompt,
    random_conversations,
    train_step,
    weight_bytes_per_token,
    without_pretrained,
)
from benchmarks.speed.timing import (
    PAGE,
    alternate,
    clock,
    command_line,
    count_flops,
    describe_run,
    measure_bandwidth,
    measure_peak_flops,
    synchronise,
    write_block,
)
from cli import command
from config_tools import InputError
from configs import PRESETS, RunConfig, VLMConfig
from data.batches.packing import collate
from engine.training.distributed import autocast, choose_dtype, setup, should_compile
from engine.training.optim import build_optimizer
from models.inference.compile import compile_blocks, compile_decoding
from models.inference.generate import steps
from models.inference.sampling import Sampling
from models.pretrained.save import unsupported_reason
from models.vision_language_model import VisionLanguageModel

N_SAMPLES, N_TOKENS = 1_700_000, 128  # nanoVLM's first run: about 6 hours on one H100
ROW_TOKENS, N_NEW_TOKENS = 2048, 65


def row_lengths(cfg: VLMConfig) -> list[int]:
    """Lengths of the conversations of one packed row."""
    length = 1 + cfg.tokens_per_tile + N_TOKENS
    return [length] * max(1, ROW_TOKENS // length)


def packed_step(run: RunConfig, model: nn.Module, device: torch.device, n_rows: int):
    """A whole training step on packed rows, its number of samples and of tokens."""
    row = random_conversations(run.model, row_lengths(run.model))
    batch = collate([row] * n_rows, run.model).to(device)
    dtype = choose_dtype(device, "auto")
    optimizer = build_optimizer(model.parts, run.train, dtype)
    region = autocast(device, dtype)
    step = partial(train_step, lambda: model(**batch.tensors())[1], optimizer, region)
    return step, batch.n_samples, batch.n_tokens


def padded_step(run: RunConfig, model: nn.Module, device: torch.device, n_rows: int):
    """The same samples for transformers; all have the same length, so there is no padding."""
    samples = random_conversations(run.model, row_lengths(run.model)) * n_rows
    batch = {k: v.to(device) for k, v in pad_samples(samples, run.model)[1].items()}
    optimizer = torch.optim.AdamW(model.parameters(), run.train.lr_language, fused=True)
    region = autocast(device, choose_dtype(device, "auto"))
    step = partial(train_step, lambda: model(**batch, use_cache=False).loss, optimizer, region)
    return step, len(samples), sum(map(len, samples))


def best_batch(
    make: Callable,
    run: RunConfig,
    model: nn.Module,
    device: torch.device,
    min_rows: int,
    max_rows: int,
) -> dict[str, float]:
    """Double the rows until memory runs out or samples/s grow by under 3 %; {} if none fits."""
    best: dict = {}
    for n_rows in (min_rows << i for i in range(int(math.log2(max_rows / min_rows)) + 1)):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            step, n_samples, n_tokens = make(run, model, device, n_rows)
            seconds = alternate({"": step}, 2)[""].median
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        found = {"rows": n_rows, "samples/s": n_samples / seconds, "tokens/s": n_tokens / seconds,
                 "seconds": seconds, "bytes": peak_bytes(device)}  # fmt: skip
        if best and found["samples/s"] < 1.03 * best["samples/s"]:
            break
        best = found
    return best


def peak_bytes(device: torch.device) -> int:
    """Peak bytes of tensors on the GPU since the last reset; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


@contextmanager
def without_cuda_graph(model: nn.Module) -> Iterator[None]:
    """Decode without a CUDA graph: generation falls back to plain calls if a module has hooks."""
    handle = model.decoder.norm.register_forward_hook(lambda *_: None)
    try:
        yield
    finally:
        handle.remove()


@torch.inference_mode()
def decode(
    model: VisionLanguageModel, device: torch.device, n_rows: int, compiling: bool
) -> dict[str, float]:
    """Seconds of a greedy decoding step after an image and a few words, per implementation.

    Raises `InputError` if their logits differ.
    """
    ids, images = (x.to(device) for x in prompt(model.cfg, n_rows))
    images = images.to(model.MP.proj.weight.dtype)

    def decode_logits() -> Tensor:
        """Logits of the first decoding step."""
        return next(islice(steps(model, ids, images, None, Sampling(2)), 1, None)).logits.float()

    def seconds_per_step() -> float:
        decoding = steps(model, ids, images, None, Sampling(max_new_tokens=N_NEW_TOKENS))
        list(islice(decoding, 2))  # with a CUDA graph, the second token captures it
        start = clock()
        n = sum(1 for step in decoding if step.tokens.tolist())  # waits for each
        return (clock() - start) / n

    def measured(kind: str) -> float:
        error = float((decode_logits() - expected).norm() / expected.norm())
        if not error < 0.02:  # bf16 rounds to 1 in 256
            raise InputError(
                f"decoding {n_rows} rows, {kind}: logits differ by {error:.1%}; expected < 2 %."
            )
        return alternate({"": seconds_per_step}, 2)[""].median

    with without_cuda_graph(model):
        expected = decode_logits()
        found = {"plain": measured("plain")}
    found["CUDA graph"] = measured("CUDA graph")
    if compiling:
        compile_decoding(model)
        found["compiled"] = measured("compiled")
        model.compiled_decode = None
    return found


@torch.inference_mode()
def hf_decode_seconds(model: nn.Module, cfg: VLMConfig, device: torch.device, n_rows: int) -> float:
    """Seconds of a greedy decoding step of transformers after the same prompt."""
    ids, images = (x.to(device) for x in prompt(cfg, n_rows))
    images = images.to(model.dtype)

    def seconds_per_step() -> float:
        _, ticks = hf_generate(model, ids, images, N_NEW_TOKENS)
        return (ticks[-1] - ticks[1]) / (len(ticks) - 2)

    return alternate({"": seconds_per_step}, 2)[""].median


def kernels(step: Callable[[], object], device: torch.device, n: int) -> list[str]:
    """A table of the `n` slowest kernels of a step, and the share of its time in any kernel."""
    kind = {"cuda": ProfilerActivity.CUDA, "cpu": ProfilerActivity.CPU}[device.type]
    step()
    synchronise()
    with profile(activities=[kind]) as profiled:
        start = time.perf_counter()
        step()
        synchronise()
        seconds = time.perf_counter() - start
    time_of = attrgetter(f"self_{'device' if device.type == 'cuda' else 'cpu'}_time_total")
    found = sorted(profiled.key_averages(), key=time_of, reverse=True)
    busy = sum(map(time_of, found)) / 1e6 / seconds
    return [
        "",
        f"| kernels (the device is busy {busy:.0%} of a step) | calls | ms |",
        "|---|---|---|",
        *(f"| {e.key[:80].replace('|', '/')} | {e.count} | {time_of(e) / 1e3:.2f} |"
          for e in found[:n]),
    ]  # fmt: skip


def train_row(
    side: str, make: Callable, run: RunConfig, model: nn.Module, device: torch.device, args,
    at_peak: float,
) -> tuple[str, list[str]]:  # fmt: skip
    """One side at its best batch, and for picoVLM the table of kernels if asked.

    `at_peak`: rows/s at the measured matrix FLOP/s.
    """
    if side == "picoVLM" and should_compile(device, "auto"):
        compile_blocks(model)
    best = best_batch(make, run, model, device, args.min_rows, args.max_rows)
    if not best:
        return f"| {side} | {args.min_rows} rows do not fit | | | | | |", []
    share = best["rows"] / best["seconds"] / at_peak
    hours = N_SAMPLES / best["samples/s"] / 3600
    row = (
        f"| {side} | {best['rows']} | {share:.1%} | {best['tokens/s']:,.0f} | "
        f"{best['samples/s']:,.1f} | {best['bytes'] / 2**30:.1f} GiB | {hours:,.2f} h |"
    )
    if side != "picoVLM" or not args.kernels:
        return row, []
    return row, kernels(make(run, model, device, best["rows"])[0], device, args.kernels)


def check_equal_loss(
    run: RunConfig, model: VisionLanguageModel, hf_model: nn.Module, device: torch.device
) -> None:
    """Raise `InputError` if the losses of a row differ."""
    samples = random_conversations(run.model, row_lengths(run.model))
    inputs, hf_inputs = ({k: v if v is None else v.to(device) for k, v in side.items()}
                    for side in pad_samples(samples, run.model))  # fmt: skip
    dtype = choose_dtype(device, "auto")
    with torch.no_grad(), autocast(device, dtype):
        loss, expected = model(**inputs)[1], hf_model(**hf_inputs, use_cache=False).loss
        check_equal("loss", loss, expected, dtype)


def training_rows(run: RunConfig, folder: str, device: torch.device, args, peak) -> list[str]:
    """One side after the other, so that each has the device for itself."""
    sides = {"picoVLM": packed_step, "transformers": padded_step}

    def load(side: str) -> nn.Module:
        if side == "picoVLM":
            return VisionLanguageModel.from_pretrained(folder).to(device).train()
        return load_hf_model(Path(folder), torch.float32).to(device).train()

    if unsupported_reason(run.model):
        del sides["transformers"]
    else:
        check_equal_loss(run, load("picoVLM"), load("transformers"), device)
    # FLOPs of picoVLM for both: transformers also runs the head on unsupervised tokens.
    at_peak = peak / count_flops(packed_step(run, load("picoVLM"), device, 1)[0])[0]
    rows = [
        train_row(side, make, run, load(side), device, args, at_peak)
        for side, make in sides.items()
    ]
    return [row for row, _ in rows] + [line for _, table in rows for line in table]


def decoding_rows(run: RunConfig, folder: str, device: torch.device, args, bandwidth) -> list[str]:
    dtype, rows = choose_dtype(device, "auto"), []
    model = VisionLanguageModel.from_pretrained(folder).to(device, dtype)
    n_bytes = weight_bytes_per_token(model.decoder)
    hf_model = (
        None if unsupported_reason(run.model) else load_hf_model(Path(folder), dtype).to(device)
    )
    for n_rows in (1, min(64, args.max_rows)):
        found = decode(model, device, n_rows, args.compiled)
        if hf_model is not None:
            found["transformers"] = hf_decode_seconds(hf_model, run.model, device, n_rows)
        speeds = [f"{n_rows / found[kind]:,.0f} tok/s" if kind in found else "-"
                  for kind in ("CUDA graph", "compiled", "plain", "transformers")]  # fmt: skip
        best = min(seconds for kind, seconds in found.items() if kind != "transformers")
        share = f"{n_bytes / best / bandwidth:.0%}"
        rows.append(f"| {' | '.join([str(n_rows), *speeds, share])} |")
    return rows


def measure(name: str, run: RunConfig, device: torch.device, args: argparse.Namespace) -> str:
    """The training and the decoding table of one preset."""
    torch.manual_seed(0)
    peak = measure_peak_flops(device, choose_dtype(device, "auto"))
    bandwidth = measure_bandwidth(device)
    with tempfile.TemporaryDirectory() as folder:
        VisionLanguageModel(run.model).save_pretrained(folder)
        return "\n".join([
            f"{name}: matrices {peak / 1e12:.2f} TFLOP/s, memory {bandwidth / 1e9:,.0f} GB/s",
            "",
            f"| training | rows of {ROW_TOKENS:,} | share of matrix FLOP/s | tokens/s | images/s | "
            f"memory | {N_SAMPLES:,} samples |",
            "|---|---|---|---|---|---|---|",
            *training_rows(run, folder, device, args, peak),
            "",
            "| decoding, rows | CUDA graph | compiled | plain | transformers | "
            "share of bandwidth |",
            "|---|---|---|---|---|---|",
            *decoding_rows(run, folder, device, args, bandwidth),
        ])  # fmt: skip


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.gpu")
    parser.add_argument("presets", nargs="+", choices=list(PRESETS))
    parser.add_argument("--min-rows", type=int, default=1, help="minimum rows of a batch")
    parser.add_argument("--max-rows", type=int, default=256, help="maximum rows of a batch")
    parser.add_argument("--kernels", type=int, default=0, help="list this many kernels of training")
    parser.add_argument("--compiled", action="store_true", help="also compile decoding: minutes")
    parser.add_argument("--no-write", action="store_true", help="print only")
    args = parser.parse_args(argv)
    device, line = setup().device, describe_run(command_line("benchmarks.speed.gpu", list(argv)))
    print(line, flush=True)
    for name in args.presets:
        found = measure(name, without_pretrained(PRESETS[name]), device, args)
        print(f"\n{found}", flush=True)
        if not args.no_write:
            write_block(PAGE, f"gpu {name}", f"{line}\n\n{found}")


if __name__ == "__main__":
    command(main)
