"""What every table of speed needs: turns, medians, this machine's peaks, and the page.

What is compared runs in turns, A B A B, in one process but for whole runs. With one thread
(OMP_NUM_THREADS=1) a time is that of the CPU, which others' work lengthens only through memory;
else it is the wall clock's. A repetition in which the thread stood ready without a core (Linux says
it) for more than a twentieth of its time is disturbed, and each table says how many were.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

from config_tools import InputError

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "benchmarks.md"
DISTURBED = 0.05
PRODUCT, READ = 1024, 1 << 28  # edge of the product, bytes of the read that find the peaks


# --- Turns --------------------------------------------------------------------------------------


def clock() -> float:
    """Seconds of the thread where it works alone, else of the wall."""
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return time.thread_time() if alone else time.perf_counter()


def waited() -> float:
    """Seconds this thread has stood ready without a core so far; 0 where the system is silent."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    return 0.0


def peak_memory() -> int:
    """Most bytes this process has held; its parent's do not count, as in getrusage they may."""
    with suppress(OSError):
        kib = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        if kib:
            return 1024 * int(kib[0])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass
class Times:
    """Repetitions of one call: seconds, and the share of each that it waited for a core."""

    seconds: list[float]
    waits: list[float]

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def n_disturbed(self) -> int:
        return sum(wait > DISTURBED for wait in self.waits)


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def alternate(
    calls: dict[str, Callable[[], object]], seconds: float, least: int = 3, most: int = 40
) -> dict[str, Times]:
    """Call each once unmeasured, then all in turns until `seconds` are spent.

    A call that returns a number has timed a part of itself, by `clock`.
    """
    for call in calls.values():
        call()
    found = {name: Times([], []) for name in calls}
    end = time.perf_counter() + seconds
    for turn in range(most):
        if turn >= least and time.perf_counter() > end:
            break
        for name, call in calls.items():
            synchronise()
            stood, wall, start = waited(), time.perf_counter(), clock()
            part = call()
            synchronise()
            own, wall, stood = clock() - start, time.perf_counter() - wall, waited() - stood
            found[name].seconds.append(part if isinstance(part, float) else own)
            found[name].waits.append(stood / wall)
    return found


def ratios(ours: Times, theirs: Times) -> tuple[float, float, float]:
    """(median, least, most) of how many times as long they took, turn by turn."""
    each = [b / a for a, b in zip(ours.seconds, theirs.seconds, strict=True)]
    return median(each), min(each), max(each)


# --- What there is to reach ---------------------------------------------------------------------


def matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Most FLOP/s of a large product."""
    n = PRODUCT * (8 if device.type == "cuda" else 1)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    times = alternate({"": lambda: (a @ b, None)[1]}, seconds)[""]
    return 2 * n**3 / min(times.seconds)


def read_bandwidth(device: torch.device, seconds: float = 1.0) -> float:
    """Most bytes/s of adding up numbers that no cache holds."""
    x = torch.ones(READ // 4 * (8 if device.type == "cuda" else 1), device=device)
    times = alternate({"": lambda: (x.sum(), None)[1]}, seconds)[""]
    return 4 * x.numel() / min(times.seconds)


def _forward(q, k, *_args, **_options) -> int:
    return 4 * math.prod(q) * k[-2]  # two products of [S, C] a head of the queries


def _backward(_grad, q, k, *_args, **_options) -> int:
    return _forward(q, k) * 5 // 2  # 5 products for the forward's 2, one of them again


def _bounded(q, _k, _v, bounds, *_args, **_options) -> int:
    return 4 * q[0].numel() * int(bounds.diff().square().sum())


def _bounded_backward(_grad, q, _k, _v, _out, _lse, bounds, *_args, **_options) -> int:
    return _bounded(q, _k, _v, bounds) * 5 // 2


_bounded._get_raw = _bounded_backward._get_raw = True  # FlopCounterMode: tensors, not shapes
KERNELS = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")


def attention_formulas() -> dict:
    """Of every kernel of attention, as torch counts some wrongly, and some not at all.

    Grouped queries, which torch 2.11 refuses; a CPU's kernel; segments of any length.
    """
    from torch.nn.attention import varlen  # noqa: F401, as it makes the last two

    names = [f"_scaled_dot_product_{kernel}" for kernel in KERNELS]
    aten, bounded = torch.ops.aten, torch.ops.torch_attn
    return {
        **{getattr(aten, name): _forward for name in names},
        **{getattr(aten, f"{name}_backward"): _backward for name in names},
        bounded._varlen_attn: _bounded,
        bounded._varlen_attn_backward: _bounded_backward,
    }


def count(call: Callable[[], object]) -> tuple[int, int]:
    """(FLOPs of all products, of attention's alone); half of causal attention counts, too."""
    formulas = attention_formulas()
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        call()
    by_kind = counter.get_flop_counts().get("Global", {})
    return counter.get_total_flops(), sum(n for op, n in by_kind.items() if op in formulas)


# --- The page -----------------------------------------------------------------------------------


def where(command: str) -> str:
    """Date, commit, machine, command: what a figure means."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    model = platform.processor() or platform.machine()
    with suppress(OSError):
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        model = names[0] if names else model
    if torch.cuda.is_available():
        model = torch.cuda.get_device_name()
    flags = torch.backends.cpu.get_cpu_capability()
    day = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        f"{day}, commit {commit}, torch {torch.__version__}, Python "
        f"{platform.python_version()}, {model} ({flags}), {torch.get_num_threads()} of "
        f"{os.cpu_count()} cores used, load {os.getloadavg()[0]:.1f}: `{command}`"
    )


def command_line(module: str, argv: list[str]) -> str:
    threads = os.environ.get("OMP_NUM_THREADS")
    return " ".join([*([f"OMP_NUM_THREADS={threads}"] if threads else []), "python", "-m", module,
                     *argv])  # fmt: skip


def write_block(page: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- /name -->`; raises `InputError`."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    whole = page.read_text(encoding="utf-8") if page.is_file() else ""
    if start not in whole or end not in whole:
        raise InputError(f"{page}: has no place {start} ... {end} to write to.")
    before, rest = whole.split(start, 1)
    page.write_text(f"{before}{start}\n{text}\n{end}{rest.split(end, 1)[1]}", encoding="utf-8")


def in_child(argv: list[str]) -> str:
    """The last line that `python -m ...` says, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", *argv], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise InputError(f"python -m {' '.join(argv)}: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout.strip().splitlines()[-1]


@dataclass(frozen=True)
class Watched:
    """What was seen of a run of train.py, in seconds from its start."""

    begins: float  # the first step
    ends: float  # the last that was waited for
    cpu: float  # of all cores together
    log: list[dict]  # lines of steps, and of evaluations


def watch_run(argv: Sequence[str], steps: int = 1) -> Watched:
    """`python train.py *argv` until so many steps are done, and then no longer."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as folder:
        log, said, begins = Path(folder) / "log.jsonl", Path(folder) / "said", 0.0
        start = time.perf_counter()
        line = [sys.executable, "train.py", *argv, f"--train.out={folder}", "--train.log-every=1"]
        with open(said, "wb") as file:
            run = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=file)
        try:
            while not log.is_file() or log.read_bytes().count(b"\n") < steps:
                if run.poll() is not None:
                    raise InputError(f"train.py: {said.read_text().splitlines()[-1:]}")
                if not begins and b"step/s" in said.read_bytes():  # the bar, before the first batch
                    begins = time.perf_counter() - start
                time.sleep(0.01)
            ends = time.perf_counter() - start
            lines = [json.loads(line) for line in log.read_text().splitlines()]
        finally:
            with suppress(ProcessLookupError):
                run.kill()
            run.communicate()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Watched(begins, ends, cpu, lines)


def readable(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


# --- Its table and bars ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    ours: str
    theirs: str = "-"
    ratio: tuple[float, float, float] | None = None  # median, least, most; above 1 we are faster
    share: str = "-"  # of what the machine can do: ours, theirs
    disturbed: str = "-"

    @property
    def cells(self) -> tuple[str, ...]:
        ratio = "-" if self.ratio is None else "{:.2f} ({:.2f} - {:.2f})".format(*self.ratio)
        return self.name, self.ours, self.theirs, ratio, self.share, self.disturbed


def table(rows: Sequence[Row]) -> str:
    head = ("", "picoVLM", "transformers", "ratio (least - most)", "share of peak, ours, theirs",
            "disturbed")  # fmt: skip
    lines = [head, tuple("---" for _ in head), *(row.cells for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Bars of all ratios; matplotlib is optional, so without it there is no picture."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: it needs matplotlib")
        return
    matplotlib.use("agg")
    from matplotlib import pyplot

    shown = [row for row in rows if row.ratio is not None][::-1]
    figure, axis = pyplot.subplots(figsize=(8, 0.8 + 0.4 * len(shown)), layout="constrained")
    middle = [row.ratio[0] for row in shown]
    errors = [[r.ratio[0] - r.ratio[1] for r in shown], [r.ratio[2] - r.ratio[0] for r in shown]]
    axis.barh([row.name for row in shown], middle, xerr=errors, color="tab:green", ecolor="gray")
    axis.axvline(1, color="black", lw=0.8)
    axis.set_xlabel("times as fast (or as small) as transformers' SmolVLM")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
