"""Ask a model about images: the answer streams to stdout, its speed goes to stderr.

python generate.py runs/demo --image cat.png                       chat in the terminal
python generate.py runs/demo --image cat.png --prompt "What color is the circle?"
python generate.py runs/demo --image a.png b.png --prompt "<image>One <image>two: which is bigger?"
python generate.py runs/demo --image cat.png --prompt "Is it red?" --choices yes no
python generate.py runs/demo --jsonl questions.jsonl --out answers.jsonl
echo "Describe the picture." | python generate.py runs/demo --image cat.png --prompt -
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from cli import command, parse
from config_tools import InputError, check
from engine.evaluation.predictions import fingerprint
from engine.inference.batch import answer_file
from engine.inference.chat import Chat
from engine.inference.conversation import Conversation
from engine.inference.terminal import print_chunks, read_keyboard, run_conversation, token_table
from engine.training.checkpoint import resolve
from engine.training.distributed import missing_compiler
from models.inference.compile import compile_decoding
from models.inference.int8 import quantize_int8
from models.inference.sampling import Sampling

SAMPLING_FIELDS = [f.name for f in fields(Sampling)]  # all are arguments, too


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Ask a model about images; without --prompt and --jsonl, chat in the terminal."""

    checkpoint: Annotated[str, tyro.conf.Positional]
    """Checkpoint, run folder (its newest checkpoint), or Hub id."""
    image: tuple[str, ...] = ()
    """Image files, placed before the prompt unless it contains <image> for each of them."""
    prompt: str | None = None
    """Question; - reads it from stdin. Without it: chat."""
    jsonl: Path | None = None
    """Questions file, {"image": ..., "question": ...} per line; paths are relative to it."""
    out: Path | None = None
    """File for the answers to --jsonl; an interrupted run resumes from it."""
    n: int = 1
    """Number of answers; they differ only with a temperature above 0."""
    choices: tuple[str, ...] = ()
    """Possible answers; the most likely one is printed. Two forms: yes no, or yes,no."""
    stop: tuple[str, ...] = ()
    """Stop strings; an answer ends before the first of them."""
    logprobs: bool = False
    """Report each token's log-probability and alternatives, on stderr or in --out."""
    batch_size: int = 64
    """Number of --jsonl questions generated in parallel."""
    max_new_tokens: int = 256
    """Maximum length of an answer, in tokens."""
    temperature: float = 0.0
    """Sampling temperature; 0: greedy."""
    top_k: int = 0
    """Sample from the k most likely tokens only; 0: all."""
    top_p: float = 1.0
    """Nucleus sampling: sample from the most likely tokens with this total probability."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that already occurred become less likely."""
    seed: int | None = None
    """Seed for sampling."""
    quantize: Literal["no", "int8"] = "no"
    """int8: 8-bit weights of the language model; saves memory, and time with --compile."""
    compile: bool = False
    """torch.compile the decoding step (needs g++, on a GPU gcc); takes seconds at the start."""
    device: str = "cpu"
    """Device: cpu, cuda or mps."""


def main(argv: list[str]) -> None:
    args = parse(Arguments, argv)
    if len(args.choices) == 1:
        args = replace(args, choices=tuple(c.strip() for c in args.choices[0].split(",")))
    sampling = check_arguments(args)
    chat = Chat.load(args.checkpoint, args.device)
    if args.quantize == "int8":
        quantize_int8(chat.model.decoder)
    if args.compile:
        compile_chat(chat)
    if args.jsonl is not None:
        settings = (sampling, args.stop, args.choices, args.quantize, args.logprobs)
        run = fingerprint(resolve(args.checkpoint), settings)
        answer_file(chat, args.jsonl, args.out, run, sampling, args.stop, args.choices,
                    args.logprobs, args.batch_size)  # fmt: skip
        return
    if args.prompt is None:
        lines = read_keyboard() if sys.stdin.isatty() else sys.stdin
        run_conversation(Conversation(chat), args.image, lines, sampling, args.stop)
        return
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    tokens = chat.encode_prompt(prompt, args.image)
    if args.choices:
        probabilities = chat.choice_probabilities(tokens, args.choices)
        print(max(zip(probabilities, args.choices))[1])
        for probability, choice in zip(probabilities, args.choices):
            print(f"{probability:.1%} {choice}", file=sys.stderr)
        return
    for i in range(args.n):
        # A different seed per answer, so that answers differ but stay reproducible.
        seed = None if args.seed is None else (args.seed + i) % 2**63
        answer = chat.stream_chunks(tokens, replace(sampling, seed=seed), args.stop)
        chunks = list(print_chunks(answer))
        if args.logprobs:
            print(token_table(chat, chunks), file=sys.stderr)


def check_arguments(args: Arguments) -> Sampling:
    """Validate the arguments and return the sampling options; raises `InputError`."""
    try:
        sampling = Sampling(**{name: getattr(args, name) for name in SAMPLING_FIELDS})
    except ValueError as error:
        raise InputError(f"{error}.") from None
    for name in ("n", "batch_size"):
        check(getattr(args, name) >= 1, args, name, "must be at least 1")
    if (args.jsonl is None) != (args.out is None):
        raise InputError("--jsonl (questions) and --out (answers) must be used together.")
    is_special = args.out is not None and args.out.exists() and not args.out.is_file()
    if args.out is not None and (is_special or not args.out.parent.is_dir()):
        raise InputError(f"out = {args.out}: must be a file in an existing folder.")
    for name, reason in conflicts(args).items():
        if getattr(args, name) != getattr(Arguments, name):
            raise InputError(f"{name}: {reason}.")
    if "" in args.stop or "" in args.choices:
        raise InputError("stop and choices: must not contain an empty string.")
    if len(set(args.choices)) < len(args.choices):
        raise InputError("choices: contains the same choice twice; remove one.")
    if len(args.choices) == 1:
        raise InputError(f"choices = {args.choices[0]!r}: needs at least two choices.")
    return sampling


def conflicts(args: Arguments) -> dict[str, str]:
    """Arguments that conflict with the given ones, and the reason for each."""
    if args.jsonl is not None:
        per_row = "each row has its own"
        reasons = {"image": per_row, "prompt": per_row, "n": "each row gets one answer",
                   "compile": "answers are generated in batches"}  # fmt: skip
        return {name: f"not used with --jsonl ({why}); remove it" for name, why in reasons.items()}
    reasons = {"batch_size": "needs --jsonl"}
    if args.prompt is None:
        reasons |= dict.fromkeys(("n", "choices", "logprobs"), "needs --prompt or --jsonl")
    elif args.choices:
        scored = "not used with --choices (nothing is generated); remove it"
        reasons |= dict.fromkeys(("logprobs", "stop", "n", "compile", *SAMPLING_FIELDS), scored)
    return reasons


def compile_chat(chat: Chat) -> None:
    """Compile the decoding step and print how long that took; raises `InputError`."""
    device = chat.model.device
    is_supported = device.type in ("cpu", "cuda")
    reason = missing_compiler(device) if is_supported else f"not supported on {device.type}"
    if reason:
        raise InputError(f"compile: {reason}; remove --compile.")
    from torch._dynamo.exc import BackendCompilerFailed  # slow to import

    try:
        seconds = compile_decoding(chat.model)
    except BackendCompilerFailed as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"compile: torch.compile failed ({reason}); remove --compile.") from None
    print(f"decoding step compiled in {seconds:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    command(main)
