"""picoVLM beside transformers' SmolVLM: same shapes and weights, alternating in one process.

python -m benchmarks.speed.compare tiny            writes a table and a chart into docs/
python -m benchmarks.speed.compare 222m            nanoVLM's first shape, with random weights
python -m benchmarks.speed.compare tiny --only decode first        prints without writing

Nothing is timed unless losses, image tokens and greedy tokens are equal. Both sides train with
fused AdamW. bf16 is measured as well where it is faster than fp32 (distributed.choose_dtype).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.speed import peers, timing
from benchmarks.speed.peers import SIDES, Case
from benchmarks.speed.revision_worker import memory
from benchmarks.speed.timing import Row, Times, format_seconds
from cli import command
from config_tools import InputError
from configs import PRESETS, RunConfig
from data import processor as processors
from data.batches.packing import collate, fill_rows
from data.sources.open import open_dataset
from data.types import IGNORE_INDEX
from engine.training import distributed
from engine.training.optim import build_optimizer
from models.inference.compile import compile_decoding
from models.inference.generate import steps
from models.inference.int8 import quantize_int8
from models.inference.sampling import Sampling
from models.vision_language_model import VisionLanguageModel

LENGTHS = (64, 96, 112, 128, 128, 144, 160, 192)  # 8 conversations, 1,024 tokens
CPU = torch.device("cpu")
N_NEW_TOKENS = 33


def make_row(
    name: str, times: dict[str, Times], work: float, peak: float, n_tokens: int = 0
) -> Row:
    """`work`: FLOPs or bytes of a call, shown as a share of `peak` per second.

    With `n_tokens` the row shows tokens/s instead of seconds.
    """
    both = [times[side] for side in SIDES]
    show = (lambda s: f"{n_tokens / s:,.1f} tok/s") if n_tokens else format_seconds
    shares = ", ".join(f"{work / t.median / peak:.0%}" for t in both)
    disturbed = f"{sum(t.n_disturbed for t in both)} of {sum(len(t.seconds) for t in both)}"
    return Row(name, *(show(t.median) for t in both), timing.ratios(*both), shares, disturbed)


def training_call(case: Case, model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """A whole training step of either model."""
    t = case.run.train
    if isinstance(model, VisionLanguageModel):
        optimizer = build_optimizer(model.parts, replace(t, optimizer="adamw"), case.dtype)
    else:
        betas, rate, decay = (t.beta1, t.beta2), t.lr_language, t.weight_decay
        optimizer = torch.optim.AdamW(model.parameters(), rate, betas, 1e-8, decay, fused=True)
    region = distributed.autocast(CPU, case.dtype)
    return lambda: peers.train_step(loss, optimizer, region, t.grad_clip)


def train_row(case: Case, name: str, inputs: dict, hf_inputs: dict) -> Row:
    fresh = peers.open_case(case.run, case.folder, torch.float32)  # training changed the weights
    model, hf_model = fresh.model.train(), fresh.hf_model.train()
    n = int((inputs["targets"] != IGNORE_INDEX).sum())
    loss = lambda: model(**inputs, reduction="sum")[1] / n  # noqa: E731
    hf_loss = peers.loss_of(hf_model, hf_inputs)
    with torch.no_grad(), distributed.autocast(CPU, case.dtype):
        peers.check_equal(f"loss, {name}", loss(), hf_loss(), case.dtype)
    calls = {"picoVLM": training_call(case, model, loss),
             "transformers": training_call(case, hf_model, hf_loss)}  # fmt: skip
    work, _ = timing.count_flops(calls["picoVLM"])
    return make_row(name, timing.alternate(calls, case.seconds, case.turns), work, case.peak)


def train_rows(case: Case) -> list[Row]:
    """Both padded, then each as its users run it: picoVLM packed, transformers padded."""
    cfg, kind = case.cfg, case.kind
    if cfg.lm_tokenizer == "world":
        processor = processors.build(cfg)
        source = open_dataset(replace(case.run.data, world_captions_first=0), "train")
        samples = [processor.encode(source[i], 1024, 64) for i in range(48)]
        rows = fill_rows(list(map(len, samples)), 2, 1024)
        packed = [[samples[i] for i in row] for row in rows]
        flat = [s for row in packed for s in row]
        same, what = flat[:16], "16 conversations of the world"
    else:
        packed = [flat := peers.random_conversations(cfg, LENGTHS)]
        same, what = peers.random_conversations(cfg, [128] * 4), "4 x 128 tokens"
    name = (f"train step, {len(packed)} x 1,024 packed, {len(flat)} images; "
            f"transformers padded, {kind}")  # fmt: skip
    padded = peers.pad_samples(flat, cfg)[1]
    return [
        train_row(case, f"train step, {what}, {kind}", *peers.pad_samples(same, cfg)),
        train_row(case, name, collate(packed, cfg).tensors(), padded),
    ]


@torch.inference_mode()
def encode_rows(case: Case) -> list[Row]:
    samples = peers.random_conversations(case.cfg, LENGTHS)
    images = peers.pad_samples(samples, case.cfg)[0]["images"].to(case.dtype)
    encode = case.hf_model.model.get_image_features
    calls = {
        "picoVLM": lambda: case.model.embed_images(images),
        "transformers": lambda: encode(images[:, None]).pooler_output,
    }
    found, expected = calls["picoVLM"](), torch.stack(list(calls["transformers"]()))
    peers.check_equal("image tokens", found, expected, case.dtype)
    work, _ = timing.count_flops(calls["picoVLM"])
    times = timing.alternate(calls, case.seconds, case.turns)
    return [make_row(f"encode 8 images, {case.kind}", times, work, case.peak)]


Generation = Callable[[], tuple[Tensor, float]]


def generation_calls(case: Case, n_rows: int, n_new: int) -> dict[str, Generation]:
    """Per side a call that returns greedy tokens [B, n] and seconds from the first to the last."""
    ids, images = peers.prompt(case.cfg, n_rows)
    images = images.to(case.dtype)

    def transformers() -> tuple[Tensor, float]:
        tokens, ticks = peers.hf_generate(case.hf_model, ids, images, n_new)
        return tokens, ticks[-1] - ticks[0]

    def picovlm() -> tuple[Tensor, float]:
        tokens, ticks = [], []
        for step in steps(case.model, ids, images, None, Sampling(max_new_tokens=n_new)):
            tokens.append(step.tokens)
            ticks.append(timing.clock())
        return torch.stack(tokens, 1), ticks[-1] - ticks[0]

    return {"picoVLM": picovlm, "transformers": transformers}


def check_greedy_tokens(case: Case, calls: dict[str, Generation]) -> None:
    """Raise `InputError` if shapes differ, or in fp32 tokens; bf16 rounds ties differently."""
    found, expected = (calls[side]()[0] for side in SIDES)
    is_same = found.shape == expected.shape
    if not is_same or (case.kind == "fp32" and not torch.equal(found, expected)):
        raise InputError(
            f"greedy tokens differ: {found.tolist()} of picoVLM, {expected.tolist()} of "
            "transformers; nothing was timed."
        )


def first_rows(case: Case) -> list[Row]:
    calls = generation_calls(case, 1, 1)
    check_greedy_tokens(case, calls)
    work, _ = timing.count_flops(calls["picoVLM"])
    name = f"first token of an image and {peers.N_WORDS} words, {case.kind}"
    return [make_row(name, timing.alternate(calls, case.seconds, case.turns), work, case.peak)]


def time_decoding(case: Case, calls: dict[str, Generation]) -> dict[str, Times]:
    """Seconds from the first token to the last."""
    seconds = {name: lambda call=call: call()[1] for name, call in calls.items()}
    return timing.alternate(seconds, case.seconds, case.turns)


def decoding_row(case: Case, name: str, times: dict[str, Times], n_rows: int = 1) -> Row:
    n_steps = N_NEW_TOKENS - 1
    work = peers.weight_bytes_per_token(case.model.decoder) * n_steps
    return make_row(name, times, work, case.bandwidth, n_rows * n_steps)


def decode_row(case: Case, name: str, n_rows: int) -> Row:
    """Decoding tokens/s of both, once their greedy tokens are equal."""
    calls = generation_calls(case, n_rows, N_NEW_TOKENS)
    check_greedy_tokens(case, calls)
    return decoding_row(case, name, time_decoding(case, calls), n_rows)


def decode_rows(case: Case) -> list[Row]:
    return [decode_row(case, f"decode, {n} row{'s' * (n > 1)}, {case.kind}", n) for n in (1, 8)]


def quantized(case: Case) -> Case:
    """With an int8 decoder of picoVLM; its greedy tokens may differ."""
    model = VisionLanguageModel.from_pretrained(case.folder).to(case.dtype)
    quantize_int8(model.decoder)
    return replace(case, model=model)


def int8_row(case: Case, name: str) -> Row:
    """transformers runs in `case.dtype` and reads more bytes, so its share of peak is omitted."""
    times = time_decoding(case, generation_calls(case, 1, N_NEW_TOKENS))
    row = decoding_row(case, name, times)
    return replace(row, share=row.share.split(",")[0])


def int8_rows(case: Case) -> list[Row]:
    return [int8_row(quantized(case), f"decode, 1 row, picoVLM int8, transformers {case.kind}")]


def compiled_rows(case: Case) -> list[Row]:
    """Decoding with a compiled step, and after how many tokens compiling has paid off."""
    name = f"decode, 1 row, {case.kind}, picoVLM compiled"
    if why := distributed.missing_compiler(CPU):
        return [Row(name, f"not measured: {why}")]
    model = VisionLanguageModel.from_pretrained(case.folder).to(case.dtype)
    compiled, warm_up = replace(case, model=model), compile_decoding(model)
    calls = generation_calls(compiled, 1, N_NEW_TOKENS)
    calls["plain"] = generation_calls(case, 1, N_NEW_TOKENS)["picoVLM"]
    check_greedy_tokens(case, calls)
    times = time_decoding(case, calls)
    saved = (times["plain"].median - times["picoVLM"].median) / (N_NEW_TOKENS - 1)
    after = f"pays off after {warm_up / saved:,.0f} tokens" if saved > 0 else "never pays off"
    small = quantized(case)
    compile_decoding(small.model)
    return [
        decoding_row(case, name, times),
        Row("compiling that step", f"{format_seconds(warm_up)} wall time; {after}"),
        decode_row(compiled, f"decode, 8 rows, {case.kind}, picoVLM compiled", 8),
        int8_row(small, f"decode, 1 row, picoVLM int8 compiled, transformers {case.kind}"),
    ]


def memory_rows(case: Case) -> list[Row]:
    """Peak resident memory of a process that takes two training steps."""
    preset = next(name for name, run in PRESETS.items() if run.train.out == case.run.train.out)
    argv = ["benchmarks.speed.compare", preset, "--folder", str(case.folder), "--peak-memory"]
    found = [float(timing.run_in_process([*argv, side])) / 2**20 for side in SIDES]
    ratio = found[1] / found[0]
    name = f"peak memory, 4 x 128 tokens, {case.kind}"
    return [Row(name, *(f"{x:,.0f} MiB" for x in found), (ratio, ratio, ratio))]


def peak_memory_of_training(run: RunConfig, folder: Path, side: str) -> int:
    """Peak resident bytes of this process, which has done nothing else before."""
    samples = peers.random_conversations(run.model, [128] * 4)
    inputs = dict(zip(SIDES, peers.pad_samples(samples, run.model)))[side]
    model = peers.load_model(side, folder, torch.float32).train()
    case = Case(run, folder, model, model, distributed.choose_dtype(CPU, "auto"))
    step = training_call(case, model, peers.loss_of(model, inputs))
    step(), step()
    return memory("VmHWM")


def start_rows(case: Case) -> list[Row]:
    """Seconds from `python train.py` to the end of its first step, with random weights."""
    argv = []
    if case.cfg.lm_tokenizer != "world":
        argv = ["222m", *peers.OFFLINE_FLAGS, "--data.batch-size=1", "--data.max-length=256",
                "--data.workers=0"]  # fmt: skip
    fastest = min((timing.run_training(argv) for _ in range(2)), key=lambda run: run.begins)
    begins, ends, cpu = map(format_seconds, (fastest.begins, fastest.ends, fastest.cpu))
    name = "from `python train.py` to the first step, to its end"
    return [Row(name, f"{begins}, {ends}; {cpu} of CPU time")]


MEASURES: dict[str, Callable[[Case], list[Row]]] = {
    "encode": encode_rows,
    "first": first_rows,
    "decode": decode_rows,
    "int8": int8_rows,
    "compiled": compiled_rows,
    "train": train_rows,
    "memory": memory_rows,
    "start": start_rows,
}


def measure(run: RunConfig, which: Sequence[str], seconds: float, turns: int = 3) -> list[Row]:
    """The rows `which`, in fp32 and, where it is faster, in bf16."""
    run, bandwidth = peers.without_pretrained(run), timing.measure_bandwidth(CPU)
    rows = [Row("memory bandwidth", f"{bandwidth / 1e9:.1f} GB/s")]
    fast = distributed.choose_dtype(CPU, "auto")
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        VisionLanguageModel(run.model).save_pretrained(folder)
        for dtype in dict.fromkeys((torch.float32, fast)):
            case = peers.open_case(run, Path(folder), dtype, seconds=seconds, turns=turns,
                                   peak=timing.measure_peak_flops(CPU, dtype),
                                   bandwidth=bandwidth)  # fmt: skip
            rows.append(Row(f"matrix product, {case.kind}", f"{case.peak / 1e9:,.0f} GFLOP/s"))
            for name in which:
                if name in ("memory", "start") and dtype != fast:  # once
                    continue
                for row in MEASURES[name](case):
                    print(*row.cells, sep=" | ", flush=True)
                    rows.append(row)
    if fast == torch.float32:
        rows.append(Row("bf16", "not measured: not faster on this CPU"))
    return rows


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.compare")
    parser.add_argument("preset", choices=["tiny", "222m"])
    parser.add_argument("--only", nargs="+", choices=list(MEASURES), help="print these rows only")
    parser.add_argument("--seconds", type=float, default=20, help="time of a row")
    parser.add_argument("--turns", type=int, default=3, help="minimum turns of a row")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--peak-memory", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    distributed.set_malloc_thresholds()
    run = peers.without_pretrained(PRESETS[args.preset])
    if args.peak_memory:
        print(peak_memory_of_training(run, args.folder, args.peak_memory))
        return
    line = timing.describe_run("benchmarks.speed.compare", argv)
    rows = measure(run, args.only or list(MEASURES), args.seconds, args.turns)
    print(text := f"{line}\n\n{timing.table(rows)}")
    if not args.only:
        timing.write_block(f"speed {args.preset}", text)
        timing.draw(rows, timing.IMAGES / f"speed-{args.preset}.png")


if __name__ == "__main__":
    command(main)
