"""On one GPU: how near training and decoding come to what the card can do.

python -m benchmarks.speed.gpu 222m 460m qwen3           writes a block a preset into docs/benchmarks.md
python -m benchmarks.speed.gpu 222m --off-the-record     prints alone
python -m benchmarks.speed.gpu 222m --kernels 20         shows what a step of training spends its time on

Rows of one preset: the best batch (doubled until memory or speed ends), its share of the matrix
rate measured in the same call, tokens and images per second, peak memory; decoding at 1 and 64 rows
beside the memory's read rate; the time that 1.7 million samples of a picture and 128 tokens take.
Ours trains as train.py does, blocks compiled where they can be. transformers stands beside, its
loss compared first. Without a GPU it runs on the CPU, for its test.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.speed.peers import (
    agree,
    bytes_of_a_token,
    padded,
    prompt,
    random_weights,
    synthetic,
    their_model,
    their_words,
)
from benchmarks.speed.timing import (
    PAGE,
    alternate,
    clock,
    command_line,
    count,
    matmul_peak,
    read_bandwidth,
    synchronise,
    where,
    write_block,
)
from cli import command
from config_tools import InputError
from configs import PRESETS, RunConfig, VLMConfig
from data.batches.packing import collate
from engine.training.distributed import autocast, compiles, fast_dtype, setup
from engine.training.optim import build_optimizer
from models.inference.compile import compile_blocks, compile_decoding
from models.inference.generate import steps
from models.inference.sampling import Sampling
from models.pretrained.save import unsupported_reason
from models.vision_language_model import VisionLanguageModel

SAMPLES, TOKENS = 1_700_000, 128  # nanoVLM's first run: about 6 hours on one H100
ROW, SAID = 2048, 65  # tokens of a packed row, of an answer


def sizes(cfg: VLMConfig) -> list[int]:
    """Lengths of the conversations of one packed row."""
    length = 1 + cfg.tokens_per_tile + TOKENS
    return [length] * max(1, ROW // length)


def packed_step(run: RunConfig, model: nn.Module, device: torch.device, n_rows: int):
    """(a whole training step, its samples, its tokens), of rows of packed conversations."""
    row = synthetic(run.model, sizes(run.model))
    batch = collate([row] * n_rows, run.model).to(device)
    dtype = fast_dtype(device, "auto")
    optimizer = build_optimizer(model.parts, run.train, dtype)
    region = autocast(device, dtype)

    def step() -> None:
        with region:
            loss = model(**batch.tensors())[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, batch.n_samples, batch.n_tokens


def padded_step(run: RunConfig, model: nn.Module, device: torch.device, n_rows: int):
    """The same samples for transformers: of one length, so nothing of it is padding."""
    samples = synthetic(run.model, sizes(run.model)) * n_rows
    batch = {k: v.to(device) for k, v in padded(samples, run.model)[1].items()}
    optimizer = torch.optim.AdamW(model.parameters(), run.train.lr_language, fused=True)
    region = autocast(device, fast_dtype(device, "auto"))

    def step() -> None:
        with region:
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, len(samples), sum(map(len, samples))


def best_batch(
    make: Callable, run: RunConfig, model: nn.Module, device: torch.device, least: int, most: int
) -> dict[str, float]:
    """Double the rows until memory ends or speed gains less than 3 %: the best, {} if none fits."""
    best: dict = {}
    for n_rows in (least << i for i in range(int(math.log2(most / least)) + 1)):
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
    """Most bytes of a GPU that tensors have filled since this was last set back; 0 of a CPU."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


@contextmanager
def one_by_one(model: nn.Module) -> Iterator[None]:
    """Decoding without a CUDA graph, as whenever somebody listens to a module."""
    handle = model.decoder.norm.register_forward_hook(lambda *_: None)
    try:
        yield
    finally:
        handle.remove()


@torch.inference_mode()
def decode(
    model: VisionLanguageModel, device: torch.device, n_rows: int, compiling: bool
) -> dict[str, float]:
    """Seconds of a step of greedy decoding after a picture and a few words, by its way.

    Raises `InputError` where the ways do not agree.
    """
    ids, images = (x.to(device) for x in prompt(model.cfg, n_rows))
    images = images.to(model.MP.proj.weight.dtype)

    def second() -> Tensor:
        """Logits of the first decoding step."""
        return next(islice(steps(model, ids, images, None, Sampling(2)), 1, None)).logits.float()

    def say() -> float:
        said = model.stream(ids, images, None, Sampling(max_new_tokens=SAID))
        list(islice(said, 2))  # the second is recorded, where a step is
        start = clock()
        n = sum(1 for tokens in said if tokens.tolist())
        return (clock() - start) / n

    def measured(way: str) -> float:
        apart = float((second() - wanted).norm() / wanted.norm())
        if not apart < 0.02:  # bf16 rounds to 1 in 256
            raise InputError(f"decoding {n_rows} rows {way}: logits are {apart:.1%} apart.")
        return alternate({"": say}, 2)[""].median

    with one_by_one(model):
        wanted = second()
        found = {"one by one": measured("one by one")}
    found["recorded"] = measured("recorded")
    if compiling:
        compile_decoding(model)
        found["compiled"] = measured("compiled")
        model.compiled_decoder = None
    return found


@torch.inference_mode()
def their_decode(model: nn.Module, cfg: VLMConfig, device: torch.device, n_rows: int) -> float:
    """Seconds of a step of transformers' greedy decoding after the same prompt."""
    ids, images = (x.to(device) for x in prompt(cfg, n_rows))
    images = images.to(model.dtype)

    def say() -> float:
        _, ticks = their_words(model, ids, images, SAID)
        return (ticks[-1] - ticks[1]) / (len(ticks) - 2)

    return alternate({"": say}, 2)[""].median


def kernels(step: Callable[[], object], device: torch.device, n: int) -> list[str]:
    """A table of the `n` kernels that took longest in a step; how much of its time all took."""
    kind = {"cuda": ProfilerActivity.CUDA, "cpu": ProfilerActivity.CPU}[device.type]
    step()
    synchronise()
    with profile(activities=[kind]) as seen:
        start = time.perf_counter()
        step()
        synchronise()
        seconds = time.perf_counter() - start
    time_of = attrgetter(f"self_{'device' if device.type == 'cuda' else 'cpu'}_time_total")
    found = sorted(seen.key_averages(), key=time_of, reverse=True)
    busy = sum(map(time_of, found)) / 1e6 / seconds
    return [
        "",
        f"| the device works {busy:.0%} of a step: its kernels | calls | ms |",
        "|---|---|---|",
        *(f"| {e.key[:80].replace('|', '/')} | {e.count} | {time_of(e) / 1e3:.2f} |"
          for e in found[:n]),
    ]  # fmt: skip


def train_row(
    side: str, make: Callable, run: RunConfig, model: nn.Module, device: torch.device, asked,
    at_peak: float,
) -> tuple[str, list[str]]:  # fmt: skip
    """Training of one side at its best batch; a table of kernels, where that is asked of ours.

    `at_peak`: rows a second at the rate of matrices.
    """
    if side == "picoVLM" and compiles(device, "auto"):
        compile_blocks(model)
    best = best_batch(make, run, model, device, asked.least, asked.most)
    if not best:
        return f"| {side} | {asked.least} do not fit | | | | | |", []
    share = best["rows"] / best["seconds"] / at_peak
    hours = SAMPLES / best["samples/s"] / 3600
    row = (
        f"| {side} | {best['rows']} | {share:.1%} | {best['tokens/s']:,.0f} | "
        f"{best['samples/s']:,.1f} | {best['bytes'] / 2**30:.1f} GiB | {hours:,.2f} h |"
    )
    if side != "picoVLM" or not asked.kernels:
        return row, []
    return row, kernels(make(run, model, device, best["rows"])[0], device, asked.kernels)


def same_loss(run: RunConfig, ours: VisionLanguageModel, theirs: nn.Module, device) -> None:
    """Raises `InputError` where both sides do not compute the same of a row."""
    samples = synthetic(run.model, sizes(run.model))
    mine, others = ({k: v if v is None else v.to(device) for k, v in side.items()}
                    for side in padded(samples, run.model))  # fmt: skip
    dtype = fast_dtype(device, "auto")
    with torch.no_grad(), autocast(device, dtype):
        agree("loss", ours(**mine)[1], theirs(**others, use_cache=False).loss, dtype)


def training_rows(run: RunConfig, folder: str, device: torch.device, asked, peak) -> list[str]:
    """One side after the other, each alone on the device."""
    sides = {"picoVLM": packed_step, "transformers": padded_step}

    def opened(side: str) -> nn.Module:
        if side == "picoVLM":
            return VisionLanguageModel.from_pretrained(folder).to(device).train()
        return their_model(Path(folder), torch.float32).to(device).train()

    if unsupported_reason(run.model):
        del sides["transformers"]
    else:
        same_loss(run, opened("picoVLM"), opened("transformers"), device)
    # The arithmetic of ours for both; theirs has the head at all tokens on top. Rows are alike.
    at_peak = peak / count(packed_step(run, opened("picoVLM"), device, 1)[0])[0]
    found = [
        train_row(side, make, run, opened(side), device, asked, at_peak)
        for side, make in sides.items()
    ]
    return [row for row, _ in found] + [line for _, table in found for line in table]


def decoding_rows(run: RunConfig, folder: str, device: torch.device, asked, rate) -> list[str]:
    dtype, rows = fast_dtype(device, "auto"), []
    model = VisionLanguageModel.from_pretrained(folder).to(device, dtype)
    n_bytes = bytes_of_a_token(model.decoder)
    theirs = None if unsupported_reason(run.model) else their_model(Path(folder), dtype).to(device)
    for n_rows in (1, min(64, asked.most)):
        found = decode(model, device, n_rows, asked.compiled)
        if theirs is not None:
            found["theirs"] = their_decode(theirs, run.model, device, n_rows)
        speeds = [f"{n_rows / found[way]:,.0f} tok/s" if way in found else "-"
                  for way in ("recorded", "compiled", "one by one", "theirs")]  # fmt: skip
        ours = min(seconds for way, seconds in found.items() if way != "theirs")
        share = f"{n_bytes / ours / rate:.0%}"
        rows.append(f"| {' | '.join([str(n_rows), *speeds, share])} |")
    return rows


def measure(name: str, run: RunConfig, device: torch.device, asked: argparse.Namespace) -> str:
    """Both tables of one preset."""
    torch.manual_seed(0)
    peak = matmul_peak(device, fast_dtype(device, "auto"))
    rate = read_bandwidth(device)
    with tempfile.TemporaryDirectory() as folder:
        VisionLanguageModel(run.model).save_pretrained(folder)
        return "\n".join([
            f"{name}: matrices {peak / 1e12:.2f} TFLOP/s, memory {rate / 1e9:,.0f} GB/s",
            "",
            f"| training | rows of {ROW:,} | of the matrix rate | tokens/s | images/s | memory | "
            f"{SAMPLES:,} samples |",
            "|---|---|---|---|---|---|---|",
            *training_rows(run, folder, device, asked, peak),
            "",
            "| decoding, rows | picoVLM | compiled | without a CUDA graph | transformers | "
            "our best of the memory's rate |",
            "|---|---|---|---|---|---|",
            *decoding_rows(run, folder, device, asked, rate),
        ])  # fmt: skip


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.gpu")
    parser.add_argument("presets", nargs="+", choices=list(PRESETS))
    parser.add_argument("--least", type=int, default=1, help="fewest rows of a batch")
    parser.add_argument("--most", type=int, default=256, help="most rows of a batch")
    parser.add_argument("--kernels", type=int, default=0, help="show so many of our training")
    parser.add_argument("--compiled", action="store_true", help="compile decoding, too: minutes")
    parser.add_argument("--off-the-record", action="store_true", help="print alone")
    asked = parser.parse_args(argv)
    device, line = setup().device, where(command_line("benchmarks.gpu", list(argv)))
    print(line, flush=True)
    for name in asked.presets:
        found = measure(name, random_weights(PRESETS[name]), device, asked)
        print(f"\n{found}", flush=True)
        if not asked.off_the_record:
            write_block(PAGE, f"gpu {name}", f"{line}\n\n{found}")


if __name__ == "__main__":
    command(main)
