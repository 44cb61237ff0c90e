"""On one GPU: how close training and decoding come to the hardware's peak.

python -m benchmarks.speed.gpu 222m 460m qwen3      writes a block each into docs/speed_tables.md
python -m benchmarks.speed.gpu 222m --no-write      prints only
python -m benchmarks.speed.gpu 222m --kernels 20    lists the kernels a training step spends time on

Per preset: the best batch (doubled until memory runs out or speed stops growing), its share of the
measured matrix FLOP/s, speed, memory, and the time for 1.7 million samples of an image and 128
tokens; decoding of 1 and 64 rows against memory bandwidth. picoVLM trains as train.py does, with
compiled blocks where possible. transformers is measured too, once both losses are equal.
Without a GPU it runs on the CPU, for tests.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.speed import peers, timing
from benchmarks.speed.peers import SIDES
from benchmarks.speed.timing import alternate, clock, markdown
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


@dataclass(frozen=True)
class Case:
    """A preset's checkpoint with random weights, and the device to measure it on."""

    run: RunConfig
    folder: Path
    device: torch.device
    dtype: torch.dtype
    max_rows: int = 256
    n_kernels: int = 0
    compiled: bool = False

    @property
    def sides(self) -> tuple[str, ...]:
        return SIDES[:1] if unsupported_reason(self.run.model) else SIDES

    def load(self, side: str, dtype: torch.dtype = torch.float32) -> nn.Module:
        return peers.load_model(side, self.folder, dtype).to(self.device)


def packed_row(cfg: VLMConfig) -> list:
    """Conversations of the same length that fill a row."""
    length = 1 + cfg.tokens_per_tile + N_TOKENS
    return peers.random_conversations(cfg, [length] * max(1, ROW_TOKENS // length))


def training_step(case: Case, side: str, model: nn.Module, n_rows: int):
    """A whole training step, its number of samples and of tokens.

    picoVLM packs rows; transformers pads the same samples, whose lengths are equal: no padding.
    """
    row, train = packed_row(case.run.model), case.run.train
    if side == "picoVLM":
        inputs = collate([row] * n_rows, case.run.model).to(case.device).tensors()
        optimizer = build_optimizer(model.parts, train, case.dtype)
    else:
        inputs = peers.pad_samples(row * n_rows, case.run.model)[1]
        inputs = {k: v.to(case.device) for k, v in inputs.items()}
        optimizer = torch.optim.AdamW(model.parameters(), train.lr_language, fused=True)
    loss, region = peers.loss_of(model, inputs), autocast(case.device, case.dtype)
    step = partial(peers.train_step, loss, optimizer, region)
    return step, n_rows * len(row), n_rows * sum(map(len, row))


def best_batch(case: Case, side: str, model: nn.Module) -> dict[str, float]:
    """Double the rows until memory runs out or samples/s grow by under 3 %; {} if none fits."""
    best: dict = {}
    for n_rows in (1 << i for i in range(case.max_rows.bit_length())):
        if case.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            step, n_samples, n_tokens = training_step(case, side, model, n_rows)
            seconds = alternate({"": step}, 2)[""].median
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        found = {"rows": n_rows, "samples/s": n_samples / seconds, "tokens/s": n_tokens / seconds,
                 "seconds": seconds, "bytes": torch.cuda.max_memory_allocated()}  # fmt: skip
        if best and found["samples/s"] < 1.03 * best["samples/s"]:
            break
        best = found
    return best


@torch.inference_mode()
def decode(case: Case, models: dict[str, nn.Module], n_rows: int) -> dict[str, float]:
    """Seconds of a greedy decoding step after an image and a few words, per implementation.

    Raises `InputError` if the logits of picoVLM's implementations differ.
    """
    ids, images = (x.to(case.device) for x in peers.prompt(case.run.model, n_rows))
    model, images = models["picoVLM"], images.to(case.dtype)

    def decode_logits() -> Tensor:
        """Logits of the first decoding step."""
        return next(islice(steps(model, ids, images, None, Sampling(2)), 1, None)).logits.float()

    def seconds_per_step() -> float:
        decoding = steps(model, ids, images, None, Sampling(max_new_tokens=N_NEW_TOKENS))
        list(islice(decoding, 2))  # with a CUDA graph, the second token captures it
        start = clock()
        n = sum(1 for step in decoding if step.tokens.tolist())  # waits for each
        return (clock() - start) / n

    def hf_seconds_per_step() -> float:
        _, ticks = peers.hf_generate(models["transformers"], ids, images, N_NEW_TOKENS)
        return (ticks[-1] - ticks[1]) / (len(ticks) - 2)

    def measured(kind: str) -> float:
        error = float((decode_logits() - expected).norm() / expected.norm())
        if not error < 0.02:  # bf16 rounds to 1 in 256
            raise InputError(
                f"decoding {n_rows} rows, {kind}: logits differ by {error:.1%}; expected < 2 %."
            )
        return alternate({"": seconds_per_step}, 2)[""].median

    # Generation falls back from CUDA graphs to plain calls if a module has hooks.
    hook = model.decoder.norm.register_forward_hook(lambda *_: None)
    expected = decode_logits()
    found = {"plain": measured("plain")}
    hook.remove()
    found["CUDA graph"] = measured("CUDA graph")
    if case.compiled:
        compile_decoding(model)
        found["compiled"] = measured("compiled")
        model.compiled_decode = None
    if "transformers" in models:
        found["transformers"] = alternate({"": hf_seconds_per_step}, 2)[""].median
    return found


def kernels(step: Callable[[], object], device: torch.device, n: int) -> str:
    """A table of the `n` slowest kernels of a step, and the share of its time in any kernel."""
    kind = {"cuda": ProfilerActivity.CUDA, "cpu": ProfilerActivity.CPU}[device.type]
    step()
    timing.synchronise()
    with profile(activities=[kind]) as profiled:
        start = time.perf_counter()
        step()
        timing.synchronise()
        seconds = time.perf_counter() - start
    time_of = attrgetter(f"self_{'device' if device.type == 'cuda' else 'cpu'}_time_total")
    found = sorted(profiled.key_averages(), key=time_of, reverse=True)
    busy = sum(map(time_of, found)) / 1e6 / seconds
    rows = [(e.key[:80].replace("|", "/"), e.count, f"{time_of(e) / 1e3:.2f}") for e in found[:n]]
    return markdown([f"kernels (the device is busy {busy:.0%} of a step)", "calls", "ms"], rows)


def check_equal_loss(case: Case) -> None:
    """Raise `InputError` if the losses of a row differ."""
    inputs, hf_inputs = ({k: v if v is None else v.to(case.device) for k, v in side.items()}
        for side in peers.pad_samples(packed_row(case.run.model), case.run.model))  # fmt: skip
    with torch.no_grad(), autocast(case.device, case.dtype):
        loss = case.load("picoVLM").train()(**inputs)[1]
        expected = case.load("transformers").train()(**hf_inputs, use_cache=False).loss
    peers.check_equal("loss", loss, expected, case.dtype)


def training_tables(case: Case, peak: float) -> list[str]:
    """Each side at its best batch, one after the other, so that they do not share the device.

    If asked, a second table lists the kernels of picoVLM.
    """
    if "transformers" in case.sides:
        check_equal_loss(case)
    # FLOPs of picoVLM for both: transformers also runs the head on unsupervised tokens.
    step, *_ = training_step(case, "picoVLM", case.load("picoVLM").train(), 1)
    at_peak = peak / timing.count_flops(step)[0]  # rows/s at the measured matrix FLOP/s
    rows, tables = [], []
    for side in case.sides:
        model = case.load(side).train()
        if side == "picoVLM" and should_compile(case.device, "auto"):
            compile_blocks(model)
        best = best_batch(case, side, model)
        if not best:
            rows.append([side, "1 row does not fit", *[""] * 5])
            continue
        rows.append([side, best["rows"], f"{best['rows'] / best['seconds'] / at_peak:.1%}",
                     f"{best['tokens/s']:,.0f}", f"{best['samples/s']:,.1f}",
                     f"{best['bytes'] / 2**30:.1f} GiB",
                     f"{N_SAMPLES / best['samples/s'] / 3600:,.2f} h"])  # fmt: skip
        if side == "picoVLM" and case.n_kernels:
            step, *_ = training_step(case, side, model, best["rows"])
            tables.append(kernels(step, case.device, case.n_kernels))
    head = ["training", f"rows of {ROW_TOKENS:,}", "share of matrix FLOP/s", "tokens/s", "images/s",
            "memory", f"{N_SAMPLES:,} samples"]  # fmt: skip
    return [markdown(head, rows), *tables]


def decoding_table(case: Case, bandwidth: float) -> str:
    models, rows = {side: case.load(side, case.dtype) for side in case.sides}, []
    n_bytes = peers.weight_bytes_per_token(models["picoVLM"].decoder)
    kinds = ("CUDA graph", "compiled", "plain", "transformers")
    for n_rows in (1, min(64, case.max_rows)):
        found = decode(case, models, n_rows)
        best = min(found[kind] for kind in kinds[:3] if kind in found)
        share = f"{n_bytes / best / bandwidth:.0%}"
        speeds = [f"{n_rows / found[k]:,.0f} tok/s" if k in found else "-" for k in kinds]
        rows.append([n_rows, *speeds, share])
    return markdown(["decoding, rows", *kinds, "share of bandwidth"], rows)


def measure(name: str, run: RunConfig, device: torch.device, **options) -> str:
    """The training and the decoding table of one preset."""
    torch.manual_seed(0)
    dtype = choose_dtype(device, "auto")
    peak, bandwidth = timing.measure_peak_flops(device, dtype), timing.measure_bandwidth(device)
    head = f"{name}: matrices {peak / 1e12:.2f} TFLOP/s, memory {bandwidth / 1e9:,.0f} GB/s"
    with tempfile.TemporaryDirectory() as folder:
        VisionLanguageModel(run.model).save_pretrained(folder)
        case = Case(run, Path(folder), device, dtype, **options)
        return "\n\n".join([head, *training_tables(case, peak), decoding_table(case, bandwidth)])


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.gpu")
    parser.add_argument("presets", nargs="+", choices=list(PRESETS))
    parser.add_argument("--max-rows", type=int, default=256, help="maximum rows of a batch")
    parser.add_argument("--kernels", type=int, default=0, help="list this many kernels of training")
    parser.add_argument("--compiled", action="store_true", help="also compile decoding: minutes")
    parser.add_argument("--no-write", action="store_true", help="print only")
    args = parser.parse_args(argv)
    device, line = setup().device, timing.describe_run("benchmarks.speed.gpu", argv)
    print(line, flush=True)
    for name in args.presets:
        run = peers.without_pretrained(PRESETS[name])
        found = measure(name, run, device, max_rows=args.max_rows, n_kernels=args.kernels,
                        compiled=args.compiled)  # fmt: skip
        print(f"\n{found}", flush=True)
        if not args.no_write:
            timing.write_block(f"gpu {name}", f"{line}\n\n{found}")


if __name__ == "__main__":
    command(main)
