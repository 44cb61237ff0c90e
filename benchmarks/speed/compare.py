"""Beside transformers' SmolVLM: the same shapes, the same weights, in turns in one process.

python -m benchmarks.speed.compare tiny            writes its table and picture into docs/
python -m benchmarks.speed.compare 222m            the same of nanoVLM's first shape, weights at random
python -m benchmarks.speed.compare tiny --only decode first                      prints, writes nothing

Loss, image tokens and greedy tokens are equal, or nothing is timed. Both train with fused AdamW.
Rows in bf16 are measured where it is faster than fp32 (engine.training.distributed.fast_dtype).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.speed.peers import (
    ALONE,
    WORDS,
    Case,
    agree,
    bytes_of_a_token,
    open_case,
    padded,
    prompt,
    random_weights,
    synthetic,
    their_model,
    their_words,
)
from benchmarks.speed.timing import (
    PAGE,
    Row,
    Times,
    alternate,
    clock,
    command_line,
    count,
    draw,
    in_child,
    matmul_peak,
    peak_memory,
    ratios,
    read_bandwidth,
    readable,
    table,
    watch_run,
    where,
    write_block,
)
from cli import command
from config_tools import InputError
from configs import PRESETS, RunConfig
from data import processor as processors
from data.batches.packing import collate, fill_rows
from data.sources.open import open_source
from data.types import IGNORE
from engine.training.distributed import autocast, fast_dtype, keep_freed_memory, lacks_compiler
from engine.training.loop import clip
from engine.training.optim import build_optimizer
from models.inference.compile import compile_decoding
from models.inference.int8 import quantize_int8
from models.inference.sampling import Sampling
from models.vision_language_model import VisionLanguageModel

UNEVEN = (64, 96, 112, 128, 128, 144, 160, 192)  # 8 conversations that fill a row of 1,024
CPU = torch.device("cpu")
SAID = 33  # tokens of an answer


# --- Rows ---------------------------------------------------------------------------------------


def timed_row(
    name: str, times: dict[str, Times], work: float = 0, peak: float = 0, items: int = 0
) -> Row:
    """`work` FLOPs or bytes of a call beside the `peak` per second; `items`: a rate is shown."""
    ours, theirs = times["ours"], times["theirs"]
    show = (lambda s: f"{items / s:,.1f} tok/s") if items else readable
    shares = [f"{work / t.median / peak:.0%}" for t in (ours, theirs)] if work else []
    n, bad = len(ours.seconds), ours.n_disturbed + theirs.n_disturbed
    return Row(name, show(ours.median), show(theirs.median), ratios(ours, theirs),
               ", ".join(shares) or "-", f"{bad} of {2 * n}")  # fmt: skip


def stepper(case: Case, model: nn.Module, loss_of: Callable[[], Tensor]) -> Callable[[], None]:
    """A whole training step of either."""
    t = case.run.train
    if isinstance(model, VisionLanguageModel):
        optimizer = build_optimizer(model.parts, replace(t, optimizer="adamw"), case.dtype)
    else:
        betas = (t.beta1, t.beta2)
        rate, decay = t.lr_language, t.weight_decay
        optimizer = torch.optim.AdamW(model.parameters(), rate, betas, 1e-8, decay, fused=True)
    params = [p for group in optimizer.param_groups for p in group["params"]]

    def step() -> None:
        with autocast(CPU, case.dtype):
            loss = loss_of()
        loss.backward()
        clip(params, t.grad_clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


def train_row(case: Case, name: str, ours_in: dict, theirs_in: dict, peak: float) -> Row:
    fresh = open_case(case.run, case.folder, torch.float32)  # the last row's weights have moved
    ours, theirs = fresh.ours.train(), fresh.theirs.train()
    n = int((ours_in["targets"] != IGNORE).sum())
    losses = {
        "ours": lambda: ours(**ours_in, reduction="sum")[1] / n,
        "theirs": lambda: theirs(**theirs_in, use_cache=False).loss,
    }
    with torch.no_grad(), autocast(CPU, case.dtype):
        agree(f"loss, {name}", losses["ours"](), losses["theirs"](), case.dtype)
    steps = {"ours": stepper(case, ours, losses["ours"]),
             "theirs": stepper(case, theirs, losses["theirs"])}  # fmt: skip
    work, _ = count(steps["ours"])
    return timed_row(name, alternate(steps, case.seconds, case.turns), work, peak)


def train_rows(case: Case, peak: float, _bandwidth: float) -> list[Row]:
    """Padded alike; and each as it is fed: ours packed, theirs padded to the longest."""
    cfg, kind = case.cfg, case.kind
    if case.cfg.lm_tokenizer == "world":
        processor = processors.build(cfg)
        source = open_source(replace(case.run.data, world_first=0), "train")
        samples = [processor.encode(source[i], 1024, 64) for i in range(48)]
        rows = fill_rows([len(s) for s in samples], 2, 1024)
        packed = [[samples[i] for i in row] for row in rows]
        alike, what = [s for row in packed for s in row][:16], "16 conversations of the world"
    else:
        packed = [synthetic(cfg, UNEVEN)]
        alike, what = synthetic(cfg, [128] * 4), "4 x 128 tokens"
    flat = [s for row in packed for s in row]
    fed = f"{len(packed)} x 1,024 packed, {len(flat)} images"
    return [
        train_row(case, f"train step, {what}, {kind}", *padded(alike, cfg), peak),
        train_row(case, f"train step, {fed}; theirs padded, {kind}", collate(packed, cfg).tensors(),
                  padded(flat, cfg)[1], peak),
    ]  # fmt: skip


@torch.inference_mode()
def encode_rows(case: Case, peak: float, _bandwidth: float) -> list[Row]:
    ours, theirs = case.ours.eval(), case.theirs.eval()
    images = padded(synthetic(case.cfg, UNEVEN), case.cfg)[0]["images"].to(case.dtype)
    calls = {
        "ours": lambda: ours.embed_images(images),
        "theirs": lambda: theirs.model.get_image_features(images[:, None]).pooler_output,
    }
    agree("image tokens", calls["ours"](), torch.stack(list(calls["theirs"]())), case.dtype)
    work, _ = count(calls["ours"])
    name = f"encode 8 images, {case.kind}"
    return [timed_row(name, alternate(_silent(calls), case.seconds, case.turns), work, peak)]


def _silent(calls: dict[str, Callable]) -> dict[str, Callable]:
    """The same calls without what they return."""
    return {name: lambda call=call: (call(), None)[1] for name, call in calls.items()}


def speak(case: Case, n_rows: int, n_new: int) -> dict[str, Callable[[], tuple[Tensor, float]]]:
    """Greedy tokens [B, n] of either, and the seconds from the first to the last."""
    ids, images = prompt(case.cfg, n_rows)
    images = images.to(case.dtype)

    def theirs():
        said, ticks = their_words(case.theirs, ids, images, n_new)
        return said, ticks[-1] - ticks[0]

    def ours():
        said, ticks = [], []
        for tokens in case.ours.stream(ids, images, None, Sampling(max_new_tokens=n_new)):
            said.append(tokens)
            ticks.append(clock())
        return torch.stack(said, 1), ticks[-1] - ticks[0]

    return {"ours": ours, "theirs": theirs}


def seconds_of(calls: dict[str, Callable]) -> dict[str, Callable[[], float]]:
    """The same calls of `speak` without what is said."""
    return {name: lambda call=call: call()[1] for name, call in calls.items()}


def agree_greedy(case: Case, calls: dict[str, Callable]) -> None:
    ours, theirs = calls["ours"]()[0], calls["theirs"]()[0]
    if ours.shape != theirs.shape or (case.kind == "fp32" and not torch.equal(ours, theirs)):
        raise InputError(f"greedy tokens differ: {ours.tolist()} and {theirs.tolist()}.")


def first_rows(case: Case, peak: float, _bandwidth: float) -> list[Row]:
    case.ours.eval(), case.theirs.eval()
    calls = speak(case, 1, 1)
    agree_greedy(case, calls)
    work, _ = count(calls["ours"])
    name = f"first token of a picture and {WORDS} words, {case.kind}"
    return [timed_row(name, alternate(_silent(calls), case.seconds, case.turns), work, peak)]


def decode_rows(case: Case, _peak: float, bandwidth: float) -> list[Row]:
    case.ours.eval(), case.theirs.eval()
    n_bytes, rows = bytes_of_a_token(case.ours.decoder), []
    for n_rows in (1, 8):
        calls = speak(case, n_rows, SAID)
        agree_greedy(case, calls)
        times = alternate(seconds_of(calls), case.seconds, case.turns)
        work = n_bytes * (SAID - 1)
        name = f"decode, {n_rows} row{'s' * (n_rows > 1)}, {case.kind}"
        rows.append(timed_row(name, times, work, bandwidth, n_rows * (SAID - 1)))
    return rows


def rounded(case: Case) -> VisionLanguageModel:
    """Ours with its decoder's matrices in 8 bits; what it says is its own."""
    model = VisionLanguageModel.from_pretrained(case.folder).to(case.dtype)
    quantize_int8(model.decoder)
    return model


def int8_row(case: Case, name: str, ours: VisionLanguageModel, bandwidth: float) -> Row:
    """Beside theirs as they are, which read more."""
    calls = speak(replace(case, ours=ours), 1, SAID)
    times = alternate(seconds_of(calls), case.seconds, case.turns)
    work = bytes_of_a_token(ours.decoder) * (SAID - 1)
    row = timed_row(name, times, work, bandwidth, SAID - 1)
    return replace(row, share=row.share.split(",")[0])


def int8_rows(case: Case, _peak: float, bandwidth: float) -> list[Row]:
    case.theirs.eval()
    return [int8_row(case, f"decode, 1 row, int8 beside {case.kind}", rounded(case), bandwidth)]


def compiled_rows(case: Case, _peak: float, bandwidth: float) -> list[Row]:
    """A decoding step of ours that is compiled, and after how many tokens that has paid back."""
    name = f"decode, 1 row, {case.kind}, our step compiled"
    if why := lacks_compiler(torch.device("cpu")):
        return [Row(name, f"not measured: {why}")]
    case.ours.eval(), case.theirs.eval()
    made = VisionLanguageModel.from_pretrained(case.folder).to(case.dtype)
    warm_up = compile_decoding(made)
    calls = speak(replace(case, ours=made), 1, SAID) | {"plain": speak(case, 1, SAID)["ours"]}
    agree_greedy(case, calls)
    times = alternate(seconds_of(calls), case.seconds, case.turns)
    saved = (times["plain"].median - times["ours"].median) / (SAID - 1)
    after = f"pays back after {warm_up / saved:,.0f} tokens" if saved > 0 else "never pays back"
    work = bytes_of_a_token(case.ours.decoder) * (SAID - 1)
    calls = speak(replace(case, ours=made), 8, SAID)
    agree_greedy(case, calls)
    eight = alternate(seconds_of(calls), case.seconds, case.turns)
    small = rounded(case)
    compile_decoding(small)
    return [timed_row(name, times, work, bandwidth, SAID - 1),
            Row("compiling that step", f"{readable(warm_up)} by the wall; {after}"),
            timed_row(f"the same of 8 rows, {case.kind}", eight, work, bandwidth, 8 * (SAID - 1)),
            int8_row(case, f"the same in int8 beside {case.kind}", small, bandwidth)]  # fmt: skip


def memory_rows(case: Case, _peak: float, _bandwidth: float) -> list[Row]:
    """Peak resident memory of a process that takes two steps."""
    preset = next(name for name, run in PRESETS.items() if run.train.out == case.run.train.out)
    argv = ["benchmarks.speed", preset, "--folder", str(case.folder), "--peak-memory"]
    found = [float(in_child([*argv, who])) / 2**20 for who in ("ours", "theirs")]
    ratio = found[1] / found[0]
    name = f"peak memory, 4 x 128 tokens, {case.kind}"
    return [Row(name, *(f"{x:,.0f} MiB" for x in found), (ratio, ratio, ratio))]


def memory_of_steps(run: RunConfig, folder: Path, who: str) -> int:
    """Most bytes held; in a process of its own."""
    model = VisionLanguageModel.from_pretrained(folder) if who == "ours" else None
    model = model or their_model(folder, torch.float32)
    dtype = fast_dtype(CPU, "auto")
    case = Case(run, folder, model, model, dtype, 0)
    ours_in, theirs_in = padded(synthetic(run.model, [128] * 4), run.model)
    loss_of = {"ours": lambda: model(**ours_in)[1],
               "theirs": lambda: model(**theirs_in, use_cache=False).loss}[who]  # fmt: skip
    step = stepper(case, model.train(), loss_of)
    step(), step()
    return peak_memory()


def start_rows(case: Case, _peak: float, _bandwidth: float) -> list[Row]:
    """Seconds from `python train.py` to its first step done, the world's data, random weights."""
    argv = []
    if case.cfg.lm_tokenizer != "world":
        argv = ["222m", *ALONE, "--data.batch-size=1", "--data.max-length=256", "--data.workers=0"]
    seen = min((watch_run(argv) for _ in range(2)), key=lambda seen: seen.begins)
    name = "from `python train.py` to the first step, to its end"
    times = f"{readable(seen.begins)}, {readable(seen.ends)}; {readable(seen.cpu)} of CPU"
    return [Row(name, times)]


# --- The table ----------------------------------------------------------------------------------

MEASURES: dict[str, Callable[[Case, float, float], list[Row]]] = {
    "encode": encode_rows,
    "first": first_rows,
    "decode": decode_rows,
    "int8": int8_rows,
    "compiled": compiled_rows,
    "train": train_rows,
    "memory": memory_rows,
    "start": start_rows,
}
ONCE = ("memory", "start")  # whatever the precision


def measure(run: RunConfig, which: Sequence[str], seconds: float, turns: int = 3) -> list[Row]:
    """Every row asked for, in fp32 and, where it is faster, in bf16."""
    run, rows = random_weights(run), []
    bandwidth = read_bandwidth(CPU)
    rows.append(Row("memory read", f"{bandwidth / 1e9:.1f} GB/s"))
    fast = fast_dtype(CPU, "auto")
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        VisionLanguageModel(run.model).save_pretrained(folder)
        for dtype in dict.fromkeys((torch.float32, fast)):
            peak = matmul_peak(CPU, dtype)
            case = open_case(run, Path(folder), dtype, seconds, turns)
            rows.append(Row(f"matrix product, {case.kind}", f"{peak / 1e9:,.0f} GFLOP/s"))
            for name in which:
                if name in ONCE and dtype != fast:
                    continue
                for row in MEASURES[name](case, peak, bandwidth):
                    print(*row.cells, sep=" | ", flush=True)
                    rows.append(row)
    if fast == torch.float32:
        rows.append(Row("bf16", "not measured: no bf16 arithmetic here"))
    return rows


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.compare")
    parser.add_argument("preset", choices=["tiny", "222m"])
    parser.add_argument("--only", nargs="+", choices=list(MEASURES), help="print these rows alone")
    parser.add_argument("--seconds", type=float, default=20, help="time of a row")
    parser.add_argument("--turns", type=int, default=3, help="least turns, whatever they take")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--peak-memory", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    asked = parser.parse_args(argv)
    keep_freed_memory()
    run = random_weights(PRESETS[asked.preset])
    if asked.peak_memory:
        print(memory_of_steps(run, asked.folder, asked.peak_memory))
        return
    line = where(command_line("benchmarks.speed", argv))
    rows = measure(run, asked.only or list(MEASURES), asked.seconds, asked.turns)
    print(text := f"{line}\n\n{table(rows)}")
    if not asked.only:
        write_block(PAGE, f"speed {asked.preset}", text)
        draw(rows, PAGE.with_name(f"speed-{asked.preset}.png"))


if __name__ == "__main__":
    command(main)
