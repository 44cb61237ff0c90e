"""Ask a model about pictures: the answer alone on stdout as it is made, speed on stderr.

python generate.py runs/demo --image cat.png --prompt "What color is the circle?"
python generate.py runs/demo --image a.png b.png --prompt "<image>One <image>two: which is bigger?"
echo "Describe the picture." | python generate.py runs/demo --image cat.png --prompt -
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from typing import Annotated

import torch
import tyro

from configs import InputError, command, parse
from engine.chat import Chat
from models.generation import Sampling


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Ask a model about pictures."""

    checkpoint: Annotated[str, tyro.conf.Positional]
    """Checkpoint directory, or run folder (its newest checkpoint is used)."""
    image: tuple[str, ...] = ()
    """Picture files, any number; they precede the prompt unless it places them by <image>."""
    prompt: str = "Describe the picture."
    """The question; - reads it from stdin."""
    n: int = 1
    """How many answers; more than one needs a temperature above 0 to differ."""
    max_new_tokens: int = 256
    """Longest answer in tokens."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """Sample from the k likeliest tokens only; 0: all."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that together hold this probability."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that already occurred less likely."""
    seed: int | None = None
    """Makes sampling repeatable."""
    device: str = "cpu"
    """cpu, cuda, mps."""


def main(argv: list[str]) -> None:
    args = parse(Arguments, argv)
    try:
        sampling = Sampling(
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            repetition_penalty=args.repetition_penalty,
            seed=args.seed,
        )
    except ValueError as error:
        raise InputError(f"{error}.") from None
    if args.n < 1:
        raise InputError(f"n = {args.n}: must be at least 1.")
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:  # the latter: torch built without CUDA
        raise InputError(f"device = {args.device!r}: {str(error).splitlines()[0]}.") from None
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    chat = Chat.load(args.checkpoint, args.device)
    tokens = chat.prompt(prompt, args.image)
    for i in range(args.n):
        # Each answer has its own seed, so that they differ and can still be repeated.
        answer(chat, tokens, replace(sampling, seed=None if args.seed is None else args.seed + i))


def answer(chat: Chat, tokens, sampling: Sampling) -> None:
    """Print one answer as it is made, then its speed on stderr."""
    start = time.perf_counter()
    times = []
    for piece in chat.stream_tokens(tokens, sampling):
        times.append(time.perf_counter() - start)
        print(piece, end="", flush=True)
    print()
    print(
        f"{times[0] * 1000:.0f} ms to the first token, {len(times) / times[-1]:.1f} tokens/s",
        file=sys.stderr,
    )


if __name__ == "__main__":
    command(main)
