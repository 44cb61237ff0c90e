"""Gains of the prefix cache, continuous batching, given choices and int8 weights.

python -m benchmarks.quality.answering conversation runs/demo    or batch, choices, int8
python -m benchmarks.quality.answering int8 222m

Compared calls alternate in one process with one thread. Times are CPU time, as wall time includes
other processes on a shared machine.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import torch

from benchmarks.speed.peers import without_pretrained
from cli import command
from config_tools import InputError
from configs import PRESETS, DataConfig
from data.batches.packing import collate_prompts
from data.types import Turn
from engine.evaluation.evaluate import answer_questions, load_items, mean_score
from engine.evaluation.metrics import bootstrap_interval, paired_difference
from engine.inference.chat import Chat
from engine.inference.conversation import Conversation
from engine.training.distributed import bf16_is_faster, set_malloc_thresholds
from models.inference.generate import steps
from models.inference.int8 import quantize_int8
from models.inference.sampling import Sampling
from models.vision_language_model import VisionLanguageModel
from tasks.world import TASK

TURNS = ("What is at the center?", "How many things are there?", "Describe the picture.",
         "Is there a red cross?", "What number is there?")  # fmt: skip


def timed(call: Callable) -> tuple[float, object]:
    start = time.process_time()
    found = call()
    return time.process_time() - start, found


def conversation(chat: Chat, n: int = 20) -> None:
    """Milliseconds to the first token of a later turn, with and without the prefix cache.

    The fastest of n, as other processes only add time.
    """
    images = [item.sample.images[0] for item in load_items(DataConfig(), "test", 160)]
    n_tiles, encode = [], chat.model.vision_encoder.patches
    chat.model.vision_encoder.patches = lambda x: n_tiles.append(len(x)) or encode(x)
    conv, same, sampling = Conversation(chat), True, Sampling(max_new_tokens=24)
    for i, question in enumerate(TURNS):
        shown = images[:1] if i == 0 else []
        turns = [*conv.turns, Turn("user", "<image>" * len(shown) + question)]
        n_before = len(n_tiles)
        prompt = chat.processor.encode_prompt(turns, [*conv.images, *shown])
        alone = chat.generate_answers([prompt], sampling)[0]
        del n_tiles[n_before:]
        same &= alone == "".join(p.text for p in conv.ask(question, shown, sampling))
    print(f"5 turns: {sum(n_tiles)} tiles encoded; the same answers as without a cache: {same}")
    print("milliseconds to the first token")
    print(f"{'images':>8} {'first turn':>11} {'later turn':>11} {'no cache':>9}")
    found = {n_images: ([], [], []) for n_images in (1, 2, 4, 8)}
    for _ in range(n):
        for n_images, (first, later, without) in found.items():
            conv = Conversation(chat)
            shown = images[:n_images]
            first.append(timed(lambda: next(iter(conv.ask(TURNS[0], shown))))[0])  # noqa: B023
            later.append(timed(lambda: next(iter(conv.ask(TURNS[1]))))[0])  # noqa: B023
            turns = conv.turns[:-1]
            tokens = lambda: chat.processor.encode_prompt(turns, shown)  # noqa: B023, E731
            without.append(timed(lambda: next(iter(chat.stream_chunks(tokens()))))[0])  # noqa: B023
    for n_images, seconds in found.items():
        cells = (f"{1000 * min(x):.1f}" for x in seconds)
        print("{:>8} {:>11} {:>11} {:>9}".format(n_images, *cells))


def static_batches(chat: Chat, prompts, sampling: Sampling, n_rows: int) -> list[str]:
    """Static batching: a batch runs until its longest answer has ended."""
    eos, texts = chat.processor.cfg.vlm_eos_token_id, []
    for i in range(0, len(prompts), n_rows):
        ids, mask, pixels = collate_prompts(prompts[i : i + n_rows], chat.processor.cfg)
        for row in chat.model.generate(ids, pixels, mask, sampling).tolist():
            texts.append(chat.processor.decode(row[: row.index(eos)] if eos in row else row))
    return texts


def batch(chat: Chat, n: int = 500) -> None:
    """Questions of all skills in random order, so that short answers and captions mix."""
    questions = [i.sample for i in load_items(DataConfig(), "test", n)]
    random.Random(0).shuffle(questions)
    prompts = [chat.processor.encode_prompt(s.turns[:-1], s.images) for s in questions]
    sampling, n_rows = Sampling(max_new_tokens=96), 32
    slow, static = timed(lambda: static_batches(chat, prompts, sampling, n_rows))
    fast, continuous = timed(lambda: chat.generate_answers(prompts, sampling, n_rows))
    lengths = [len(chat.processor.encode_answer(text)) for text in static]
    for name, seconds in (("static", slow), ("continuous", fast)):
        print(f"{name:10} {len(prompts) / seconds:7.1f} questions/s")
    print(f"ratio {slow / fast:.2f} on {len(prompts)} questions, {n_rows} rows, "
          f"answers of {min(lengths)} to {max(lengths)} tokens; "
          f"{sum(a == b for a, b in zip(static, continuous))} answers equal")  # fmt: skip


def choices(chat: Chat, n: int = 3000) -> None:
    """Yes/no and colour questions: free greedy answers against the most likely choice."""
    skills = ("exist", "compare", "color")
    questions = [i for i in TASK.items(DataConfig(), "test", n) if i.skill in skills]
    free, chosen = answer_questions(chat, questions), []
    for item in questions:
        prompt = chat.processor.encode_prompt(item.sample.turns[:-1], item.sample.images)
        shares = chat.choice_probabilities(prompt, item.choices)
        chosen.append(float(item.choices[shares.index(max(shares))] == item.expected))
    for skill in skills:
        which = [k for k, i in enumerate(questions) if i.skill == skill]
        a, b = mean_score([free[k] for k in which]), sum(chosen[k] for k in which) / len(which)
        print(f"{skill:8} free {a:.1%}, by choice {b:.1%}, n {len(which)}")
    found = paired_difference(chosen, [f.score for f in free])
    interval = "({:+.2%} to {:+.2%})".format(*found["interval"])
    print(f"difference {found['difference']:+.2%} {interval}, p = {found['p']:.3f}")


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all weights, quantised ones as they are stored."""
    tensors = [*model.parameters(), *model.buffers()]  # shared ones once
    return sum(x.numel() * x.element_size() for x in tensors)


def speed(model: VisionLanguageModel, n_new: int) -> float:
    """Greedy tokens/s of one row after a prompt with an image."""
    cfg = model.cfg
    ids = torch.full((1, cfg.tokens_per_tile + 20), cfg.vlm_image_token_id)
    ids[0, cfg.tokens_per_tile :] = torch.arange(100, 120)
    pixels = torch.zeros(1, 3, cfg.vit_img_size, cfg.vit_img_size)
    decoding = steps(model, ids, pixels, None, Sampling(max_new_tokens=n_new + 1))
    next(decoding)
    seconds, n = timed(lambda: sum(1 for _ in decoding))
    return n / seconds


def int8_speed(preset: str, n_new: int = 24) -> None:
    """Decoding speed of a preset with random weights: fp32, bf16, and int8 with either.

    bf16 is left out where it is not faster: CPUs without it emulate it, which takes minutes.
    """
    cfg = without_pretrained(PRESETS[preset]).model
    has_bf16 = bf16_is_faster(torch.device("cpu"))
    models = {}
    for name in ("fp32", "int8 over fp32", *(("bf16", "int8 over bf16") if has_bf16 else ())):
        torch.manual_seed(0)
        model = VisionLanguageModel(cfg).eval()
        models[name] = model.bfloat16() if "bf16" in name else model
        if "int8" in name:
            quantize_int8(model.decoder)
    rounds = [{name: speed(model, n_new) for name, model in models.items()} for _ in range(2)]
    print(f"{'weights':15} {'tokens/s':>9} {'MiB':>7}")
    for name, model in models.items():
        fastest = max(found[name] for found in rounds)
        print(f"{name:15} {fastest:9.2f} {weight_bytes(model) / 2**20:7.0f}")


def int8_accuracy(chat: Chat, n: int = 400) -> None:
    """Accuracy on the same questions before and after quantisation."""
    questions = load_items(DataConfig(), "test", n)
    before = [a.score for a in answer_questions(chat, questions)]
    size = weight_bytes(chat.model)
    quantize_int8(chat.model.decoder)
    after = [a.score for a in answer_questions(chat, questions)]
    low, high = bootstrap_interval(before)
    found = paired_difference(after, before)
    print(f"fp32 {sum(before) / len(before):.1%} ({low:.1%} to {high:.1%}), "
          f"int8 {sum(after) / len(after):.1%}, difference {found['difference']:+.2%} "
          f"(p = {found['p']:.3f}), n {len(before)}, weights {size / 2**20:.1f} to "
          f"{weight_bytes(chat.model) / 2**20:.1f} MiB")  # fmt: skip


MEASURES = {"conversation": conversation, "batch": batch, "choices": choices, "int8": int8_accuracy}


def main(argv: list[str]) -> None:
    if len(argv) < 2 or argv[0] not in MEASURES:
        names = "conversation, batch, choices or int8"
        raise InputError(f"expected {names}, then a checkpoint (int8: or preset).")
    set_malloc_thresholds()
    torch.set_num_threads(1)
    name, checkpoint, numbers = argv[0], argv[1], [int(n) for n in argv[2:3]]
    if name == "int8" and checkpoint in PRESETS:
        int8_speed(checkpoint, *numbers)
    else:
        MEASURES[name](Chat.load(checkpoint), *numbers)


if __name__ == "__main__":
    command(main)
