"""Measures one source tree, one repetition per request; revisions.py starts two and alternates.

python revision_worker.py TREE          reads a JSON request per line, writes a JSON reply per line

The same file runs on old and new trees, so it uses only names that both have. Inputs and weights
are random with fixed seeds. Plain AdamW stands in for the tree's optimizer.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial
from itertools import cycle, islice
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

LENGTHS = (128, 160, 96, 128)  # tokens of the conversations, repeated
IGNORE_INDEX = -100
PROJECT = ("configs", "config_tools", "models", "data", "engine")
SAMPLING = ("models.inference.sampling", "models.generation")  # current name, former name


def clock() -> float:
    """Seconds of CPU time with one thread, which is steadier under load; else of wall time."""
    is_single = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return time.thread_time() if is_single else time.perf_counter()


def memory(field: str) -> int:
    """Resident bytes of this process now (VmRSS) or their maximum so far (VmHWM).

    `ru_maxrss` is second choice, as it may include the parent's memory on Linux.
    """
    with suppress(OSError):
        found = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
        if found:
            return 1024 * int(found[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def build(preset: str, changes: str, dtype: torch.dtype):
    """A preset's model with random weights; `changes`: fields of its config as JSON."""
    from configs import PRESETS
    from models.vision_language_model import VisionLanguageModel

    torch.manual_seed(0)
    fields = {"vit_model_type": "", "lm_model_type": ""} | json.loads(changes)
    return VisionLanguageModel(replace(PRESETS[preset].model, **fields)).to(dtype)


build_for_inference = lru_cache(maxsize=1)(build)  # kept for the next row


def conversations(cfg, lengths: list[int]) -> tuple[list[Tensor], Tensor]:
    """Token ids [T] with one image after the first token, and the images [N, 3, H, W]."""
    g = torch.Generator().manual_seed(0)
    special = {cfg.vlm_pad_token_id, cfg.vlm_bos_token_id, cfg.vlm_eos_token_id,
               cfg.vlm_image_token_id}  # fmt: skip
    words = torch.tensor(sorted(set(range(cfg.lm_vocab_size)) - special))
    rows = [words[torch.randint(len(words), (n,), generator=g)] for n in lengths]
    for ids in rows:
        ids[1 : 1 + cfg.tokens_per_tile] = cfg.vlm_image_token_id
    size = cfg.vit_img_size
    return rows, torch.randn(len(rows), cfg.vit_n_channels, size, size, generator=g)


def training_inputs(cfg, n_samples: int, packed: bool) -> dict[str, Tensor | None]:
    """Arguments of `forward`: one padded conversation per row, or eight packed in a row.

    The last third of a conversation's words is supervised.
    """
    samples, images = conversations(cfg, list(islice(cycle(LENGTHS), n_samples)))
    per_row = min(8, n_samples) if packed else 1

    def rows(parts: list[Tensor], padding: int = 0) -> Tensor:
        """A part [T] per conversation -> [R, T]."""
        rows = [torch.cat(parts[i : i + per_row]) for i in range(0, n_samples, per_row)]
        return pad_sequence(rows, batch_first=True, padding_value=padding)

    targets = [torch.cat([ids[1:], ids.new_tensor([IGNORE_INDEX])]) for ids in samples]
    for x in targets:
        n_words = len(x) - 1 - cfg.tokens_per_tile
        x[: len(x) - 1 - n_words // 3] = IGNORE_INDEX
    segments = [torch.full_like(ids, 1 + i % per_row) for i, ids in enumerate(samples)]
    return {"input_ids": rows(samples, cfg.vlm_pad_token_id), "images": images,
            "targets": rows(targets, IGNORE_INDEX), "segments": rows(segments) if packed else None,
            "positions": rows([torch.arange(len(ids)) for ids in samples])}  # fmt: skip


# --- Measurements: each returns a call that gives (seconds, values to compare between trees) -----

Repetition = Callable[[], tuple[float, list[float]]]


def training(request: dict, packed: bool) -> Repetition:
    """Seconds of a whole training step in fp32 weights, and its loss."""
    model = build(request["preset"], request["changes"], torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    inputs = training_inputs(model.cfg, request["samples"], packed)
    n_targets = int((inputs["targets"] != IGNORE_INDEX).sum())
    region = torch.autocast("cpu", torch.bfloat16, enabled=request["precision"] == "bf16")

    def step() -> tuple[float, list[float]]:
        start = clock()
        with region:
            loss = model(**inputs, reduction="sum")[1] / n_targets
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return clock() - start, [loss.item()]

    return step


def answering(request: dict, n_rows: int, n_words: int, n_steps: int) -> Repetition:
    """Seconds of a decoding step after a prompt, or of the first token if n_steps is 0; tokens."""
    dtype = torch.bfloat16 if request["precision"] == "bf16" else torch.float32
    model = build_for_inference(request["preset"], request["changes"], dtype).eval()
    rows, images = conversations(model.cfg, [1 + model.cfg.tokens_per_tile + n_words] * n_rows)
    ids, eos, starts = torch.stack(rows), model.cfg.vlm_eos_token_id, []
    sampling = sampling_class()(max_new_tokens=1 + n_steps)

    def without_eos(call: Callable, *args, **options) -> Tensor:
        """All rows decode to the end: a random model may stop at any token."""
        starts.append(clock())
        logits = call(model, *args, **options)
        logits[:, eos] = -torch.inf
        return logits

    def repetition() -> tuple[float, list[float]]:
        model.prefill = partial(without_eos, type(model).prefill)
        model.decode = partial(without_eos, type(model).decode)
        starts.clear()
        start = clock()
        tokens = model.generate(ids, images, sampling=sampling)
        end = clock()
        del model.prefill, model.decode
        if len(starts) != 1 + n_steps:
            n = len(starts) - 1
            raise RuntimeError(f"generate called decode {n} times, expected {n_steps}")
        seconds = (end - starts[1]) / n_steps if n_steps else end - start
        return seconds, tokens.flatten().tolist()

    return repetition


ROWS: dict[str, Callable[[dict], Repetition]] = {
    "first": partial(answering, n_rows=1, n_words=64, n_steps=0),
    "decode1": partial(answering, n_rows=1, n_words=32, n_steps=32),
    "decode8": partial(answering, n_rows=8, n_words=32, n_steps=32),
    "train": partial(training, packed=False),
    "packed": partial(training, packed=True),
}


def sampling_class() -> type:
    for name in SAMPLING:
        with suppress(ModuleNotFoundError):
            return importlib.import_module(name).Sampling
    raise ModuleNotFoundError(f"no Sampling in any of {', '.join(SAMPLING)}")


def import_from(tree: Path) -> None:
    """Import the model from this tree; raises ImportError if a module comes from another tree."""
    sys.path[0] = str(tree)
    sys.path[1:] = [p for p in sys.path[1:] if not Path(p, "configs.py").is_file()]
    importlib.import_module("models.vision_language_model")
    sampling_class()
    for name, module in sys.modules.items():
        file = getattr(module, "__file__", None)
        is_project = name.partition(".")[0] in PROJECT
        if is_project and file and not Path(file).is_relative_to(tree):
            raise ImportError(f"{name} is {file}, outside {tree}")


def main() -> None:
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # stdout carries replies only; other output goes to stderr
    import_from(Path(sys.argv[1]).resolve())
    at_start, repetition = memory("VmRSS"), None
    for request in map(json.loads, sys.stdin):
        if request:
            repetition = None  # frees the last row's model before the next is built
            repetition = ROWS[request["row"]](request)
        seconds, values = repetition()
        peak = memory("VmHWM") - at_start
        print(json.dumps({"seconds": seconds, "values": values, "peak": peak}), file=replies)


if __name__ == "__main__":
    main()
