"""Shared by all speed benchmarks: alternating timings, FLOP counts, hardware peaks, tables.

Compared calls alternate (A B A B) in one process. With one thread (OMP_NUM_THREADS=1) times are CPU
time, which other processes affect only through shared caches and memory; otherwise wall time.
A repetition counts as disturbed if its thread waited for a core (Linux's schedstat) for more than
5 % of its time; each table shows how many were.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.speed.revision_worker import clock
from config_tools import InputError

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "speed_tables.md"
IMAGES = ROOT / "docs" / "images"
MATRIX_SIZE, N_BYTES = 1024, 1 << 28  # of the product and the read that measure the peaks


def seconds_waiting() -> float:
    """Seconds this thread has waited for a core so far; 0 if the system does not count them."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    return 0.0


@dataclass
class Times:
    """Repetitions of one call: seconds, and the share of each spent waiting for a core."""

    seconds: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def n_disturbed(self) -> int:
        return sum(wait > 0.05 for wait in self.waits)


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def alternate(
    calls: dict[str, Callable[[], object]], seconds: float, min_turns: int = 3, max_turns: int = 40
) -> dict[str, Times]:
    """Call each once as warm-up, then all in turns until `seconds` are over.

    If a call returns a float, that is its time: it measured a part of itself with `clock`.
    """
    for call in calls.values():
        call()
    found = {name: Times() for name in calls}
    end = time.perf_counter() + seconds
    for turn in range(max_turns):
        if turn >= min_turns and time.perf_counter() > end:
            break
        for name, call in calls.items():
            synchronise()
            waits, wall, start = seconds_waiting(), time.perf_counter(), clock()
            part = call()
            synchronise()
            own, wall = clock() - start, time.perf_counter() - wall
            found[name].seconds.append(part if isinstance(part, float) else own)
            found[name].waits.append((seconds_waiting() - waits) / wall)
    return found


def ratios(times: Times, baseline: Times) -> tuple[float, float, float]:
    """(median, minimum, maximum) over turns of baseline / times: above 1 the first is faster."""
    each = [b / a for a, b in zip(times.seconds, baseline.seconds, strict=True)]
    return median(each), min(each), max(each)


def measure_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product: the fastest of its repetitions."""
    n = MATRIX_SIZE * (8 if device.type == "cuda" else 1)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    times = alternate({"": lambda: a @ b}, seconds=1)[""]
    return 2 * n**3 / min(times.seconds)


def measure_bandwidth(device: torch.device) -> float:
    """Bytes/s of a sum over a tensor larger than any cache: the fastest of its repetitions."""
    x = torch.ones(N_BYTES // 4 * (8 if device.type == "cuda" else 1), device=device)
    times = alternate({"": x.sum}, seconds=1)[""]
    return 4 * x.numel() / min(times.seconds)


def _forward(q, k, *_args, **_options) -> int:
    return 4 * math.prod(q) * k[-2]  # q @ k.T and weights @ v


def _backward(_grad, q, k, *_args, **_options) -> int:
    return _forward(q, k) * 5 // 2  # 5 products for the forward's 2, as one is recomputed


def _varlen(q, _k, _v, bounds, *_args, **_options) -> int:
    return 4 * q[0].numel() * int(bounds.diff().square().sum())


def _varlen_backward(_grad, q, _k, _v, _out, _lse, bounds, *_args, **_options) -> int:
    return _varlen(q, _k, _v, bounds) * 5 // 2


_varlen._get_raw = _varlen_backward._get_raw = True  # FlopCounterMode: tensors, not shapes
KERNELS = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")


def attention_formulas() -> dict:
    """FLOP formulas of all attention kernels for `FlopCounterMode`.

    torch 2.11 has none for the CPU kernel and variable lengths, and refuses grouped queries.
    """
    from torch.nn.attention import varlen  # noqa: F401, registers the last two operators

    names = [f"_scaled_dot_product_{kernel}" for kernel in KERNELS]
    aten, bounded = torch.ops.aten, torch.ops.torch_attn
    found = {getattr(aten, name): _forward for name in names}
    found |= {getattr(aten, f"{name}_backward"): _backward for name in names}
    return found | {bounded._varlen_attn: _varlen, bounded._varlen_attn_backward: _varlen_backward}


def count_flops(call: Callable[[], object]) -> tuple[int, int]:
    """FLOPs of all matrix products, and of attention alone; causal attention counts in full."""
    formulas = attention_formulas()
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        call()
    by_kind = counter.get_flop_counts().get("Global", {})
    return counter.get_total_flops(), sum(n for op, n in by_kind.items() if op in formulas)


def describe_run(module: str, argv: Sequence[str]) -> str:
    """One line with date, commit, versions, machine and command."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    cpu = platform.processor() or platform.machine()
    with suppress(OSError):
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        cpu = names[0] if names else cpu
    model = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    threads = os.environ.get("OMP_NUM_THREADS")
    prefix = f"OMP_NUM_THREADS={threads} " if threads else ""
    return (
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC, commit {commit}, "
        f"torch {torch.__version__}, Python {platform.python_version()}, "
        f"{model} ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} of "
        f"{os.cpu_count()} cores used, load {os.getloadavg()[0]:.1f}: "
        f"`{prefix}{' '.join(['python -m', module, *argv])}`"
    )


def write_block(name: str, text: str) -> None:
    """Replace what PAGE has between `<!-- name -->` and `<!-- /name -->`; raises `InputError`."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    whole = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
    if start not in whole or end not in whole:
        raise InputError(f"{PAGE}: expected {start} and {end} to write between; add both.")
    before, rest = whole.split(start, 1)
    PAGE.write_text(f"{before}{start}\n{text}\n{end}{rest.split(end, 1)[1]}", encoding="utf-8")


def run_in_process(argv: list[str]) -> str:
    """Run `python -m *argv` in a new process; returns the last line it prints."""
    line = [sys.executable, "-m", *argv]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"python -m {' '.join(argv)}: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout.strip().splitlines()[-1]


@dataclass(frozen=True)
class TrainingRun:
    """Times of a run of train.py, in seconds since its start, and its log."""

    begins: float  # start of the first step
    ends: float  # end of the last step
    cpu: float  # CPU time of all cores
    log: list[dict]  # lines of steps and evaluations


def run_training(argv: Sequence[str], steps: int = 1) -> TrainingRun:
    """Run `python train.py *argv` and stop it after `steps` steps; raises `InputError`."""
    before = os.times()
    with tempfile.TemporaryDirectory() as folder:
        log, stderr, begins = Path(folder) / "log.jsonl", Path(folder) / "stderr", 0.0
        start = time.perf_counter()
        line = [sys.executable, "train.py", *argv, f"--train.out={folder}", "--train.log-every=1"]
        with open(stderr, "wb") as file:
            run = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=file)
        try:
            while not log.is_file() or log.read_bytes().count(b"\n") < steps:
                if run.poll() is not None:
                    raise InputError(f"train.py: {stderr.read_text().splitlines()[-1:]}")
                if not begins and b"step/s" in stderr.read_bytes():  # progress bar, before step 1
                    begins = time.perf_counter() - start
                time.sleep(0.01)
            ends = time.perf_counter() - start
            lines = [json.loads(line) for line in log.read_text().splitlines()]
        finally:
            with suppress(ProcessLookupError):
                run.kill()
            run.communicate()
    after = os.times()
    cpu = sum(after[2:4]) - sum(before[2:4])  # of children, in user and system mode
    return TrainingRun(begins, ends, cpu, lines)


def format_seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    name: str
    picovlm: str
    transformers: str = "-"
    ratio: tuple[float, float, float] | None = None  # median, minimum, maximum; > 1: faster
    share: str = "-"  # of the machine's peak: picoVLM, transformers
    disturbed: str = "-"

    @property
    def cells(self) -> tuple[str, ...]:
        ratio = "-" if self.ratio is None else "{:.2f} ({:.2f} - {:.2f})".format(*self.ratio)
        return self.name, self.picovlm, self.transformers, ratio, self.share, self.disturbed


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def table(rows: Sequence[Row]) -> str:
    head = ("", "picoVLM", "transformers", "ratio (minimum - maximum)",
            "share of peak: picoVLM, transformers", "disturbed")  # fmt: skip
    return markdown(head, (row.cells for row in rows))


def draw(rows: Sequence[Row], path: Path) -> None:
    """Save a bar chart of all ratios; without matplotlib, print that there is none."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no chart: it needs matplotlib")
        return
    shown = [row for row in rows if row.ratio is not None][::-1]
    figure = Figure(figsize=(8, 0.8 + 0.4 * len(shown)), layout="constrained")
    axis = figure.subplots()
    middle, low, high = np.array([row.ratio for row in shown]).T
    axis.barh([row.name for row in shown], middle, xerr=(middle - low, high - middle),
              color="tab:green", ecolor="gray")  # fmt: skip
    axis.axvline(1, color="black", lw=0.8)
    figure.supxlabel("speed-up (or memory saving) over transformers' SmolVLM", fontsize=10)
    figure.savefig(path, dpi=110)
