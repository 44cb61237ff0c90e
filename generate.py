"""Ask a model about pictures: the answer alone on stdout as it is made, speed on stderr.

python generate.py runs/demo --image cat.png                       a conversation in the terminal
python generate.py runs/demo --image cat.png --prompt "What color is the circle?"
python generate.py runs/demo --image a.png b.png --prompt "<image>One <image>two: which is bigger?"
python generate.py runs/demo --image cat.png --prompt "Is it red?" --choices yes no
python generate.py runs/demo --jsonl questions.jsonl --out answers.jsonl
echo "Describe the picture." | python generate.py runs/demo --image cat.png --prompt -
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from cli import command, parse
from config_tools import InputError, json_line
from engine.evaluation.predictions import fingerprint
from engine.inference.batch import answer_file
from engine.inference.chat import Chat, Piece, alternatives
from engine.inference.conversation import Conversation
from engine.training.checkpoint import resolve
from engine.training.distributed import lacks_compiler
from models.inference.compile import compile_decoding
from models.inference.int8 import quantize_int8
from models.inference.sampling import Sampling

# Options of `Sampling`, by the same names.
SAMPLED = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed")
HELP = """/image FILE ...   show pictures with the next question
/reset            forget what was said, keep the pictures
/save FILE        append the conversation to a JSONL file that trains as it is
/quit             leave, as does Ctrl-D; Ctrl-C cuts an answer short"""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Ask a model about pictures; without a prompt or a file of questions, talk with it."""

    checkpoint: Annotated[str, tyro.conf.Positional]
    """Checkpoint directory, or run folder (its newest checkpoint is used)."""
    image: tuple[str, ...] = ()
    """Picture files, any number; they precede the prompt unless it places them by <image>."""
    prompt: str | None = None
    """The question; - reads it from stdin."""
    jsonl: Path | None = None
    """Questions, one {"image": ..., "question": ...} a line; image paths relative to the file."""
    out: Path | None = None
    """Where the answers to --jsonl go; lines that are there already are not asked again."""
    n: int = 1
    """How many answers; more than one needs a temperature above 0 to differ."""
    choices: tuple[str, ...] = ()
    """Answer with the likeliest of these: yes no, or yes,no."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer; they are not part of it."""
    logprobs: bool = False
    """Show each token's log-probability and what else was likely, on stderr or in --out."""
    batch_size: int = 64
    """Questions of --jsonl answered together."""
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
    quantize: Literal["no", "int8"] = "no"
    """int8: hold the decoder's matrices in 8 bits; with --compile, three times as fast."""
    compile: bool = False
    """Compile the step that makes a token (needs g++, on a GPU gcc): seconds at the start."""
    device: str = "cpu"
    """cpu, cuda, mps."""


def main(argv: list[str]) -> None:
    args = parse(Arguments, argv)
    if len(args.choices) == 1:
        args = replace(args, choices=tuple(c.strip() for c in args.choices[0].split(",")))
    sampling = check(args)
    chat = Chat.load(args.checkpoint, args.device)
    if args.quantize == "int8":
        quantize_int8(chat.model.decoder)
    if args.compile:
        compile_step(chat)
    if args.jsonl is not None:
        what = (sampling, args.stop, args.choices, args.quantize, args.logprobs)
        run = fingerprint(resolve(args.checkpoint), what)
        answer_file(chat, args.jsonl, args.out, run, sampling, args.stop, args.choices,
                    args.logprobs, args.batch_size)  # fmt: skip
        return
    if args.prompt is None:
        lines = typed() if sys.stdin.isatty() else sys.stdin
        talk(Conversation(chat), args.image, lines, sampling, args.stop)
        return
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    tokens = chat.prompt(prompt, args.image)
    if args.choices:
        shares = chat.choose(tokens, args.choices)
        print(max(zip(shares, args.choices))[1])
        for share, choice in zip(shares, args.choices):
            print(f"{share:.1%} {choice}", file=sys.stderr)
        return
    for i in range(args.n):
        # Each answer has its own seed, so that they differ and can still be repeated.
        own = replace(sampling, seed=None if args.seed is None else (args.seed + i) % 2**63)
        pieces = list(show(chat.watch(tokens, own, args.stop)))
        if args.logprobs:
            print(token_table(chat, pieces), file=sys.stderr)


def check(args: Arguments) -> Sampling:
    """The sampling options; `InputError` where an argument is wrong."""
    try:
        sampling = Sampling(**{name: getattr(args, name) for name in SAMPLED})
    except ValueError as error:
        raise InputError(f"{error}.") from None
    for name in ("n", "batch_size"):
        if getattr(args, name) < 1:
            raise InputError(f"{name} = {getattr(args, name)}: must be at least 1.")
    if (args.jsonl is None) != (args.out is None):
        raise InputError("jsonl and out: give both, where to read questions and put answers.")
    other = args.out is not None and args.out.exists() and not args.out.is_file()  # as a pipe
    if args.out is not None and (other or not args.out.parent.is_dir()):
        raise InputError(f"out = {args.out}: must be a file in a folder that exists.")
    for name, reason in unused(args).items():
        if getattr(args, name) != getattr(Arguments, name):
            raise InputError(f"{name}: {reason}.")
    if "" in args.stop or "" in args.choices:
        raise InputError("stop and choices: an empty text is none.")
    if len(set(args.choices)) < len(args.choices):
        raise InputError("choices: name each once.")
    if len(args.choices) == 1:
        raise InputError(f"choices = {args.choices[0]!r}: one alone leaves nothing to choose.")
    return sampling


def unused(args: Arguments) -> dict[str, str]:
    """What cannot be given along with the rest, and why: nothing that was asked for is ignored."""
    if args.jsonl is not None:
        rows = "the rows of --jsonl hold their own; leave it out"
        found = {"image": rows, "prompt": rows, "n": "a row of --jsonl has one answer"}
        return found | {"compile": "the rows of --jsonl are answered together; leave it out"}
    if args.prompt is None:
        found = dict.fromkeys(("n", "choices", "logprobs"), "needs --prompt, or --jsonl")
        return found | {"batch_size": "is for the rows of --jsonl"}
    found = {"batch_size": "is for the rows of --jsonl"}
    if args.choices:
        found |= dict.fromkeys(("logprobs", "stop", *SAMPLED), "choices are weighed, not written")
        found["n"] = "the likeliest choice is one answer"
        found["compile"] = "choices are weighed, not written"
    return found


def compile_step(chat: Chat) -> None:
    """Compile, and say how long that took; `InputError` where it cannot be."""
    device = chat.model.device
    why = lacks_compiler(device) if device.type in ("cpu", "cuda") else f"not for {device.type}"
    if why:
        raise InputError(f"compile: {why}; leave it out.")
    from torch._dynamo.exc import BackendCompilerFailed  # takes a second

    try:
        seconds = compile_decoding(chat.model)
    except BackendCompilerFailed as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"compile: torch.compile failed ({reason}); leave it out.") from None
    print(f"a step of decoding compiled in {seconds:.1f} s", file=sys.stderr)


def show(pieces: Iterator[Piece]) -> Iterator[Piece]:
    """Print an answer as it is made, then its speed on stderr; pass its pieces on."""
    start, times = time.perf_counter(), []
    for piece in pieces:
        times.append(time.perf_counter() - start)
        print(piece.text, end="", flush=True)
        yield piece
    print()
    print(
        f"{times[0] * 1000:.0f} ms to the first token, {len(times) / times[-1]:.1f} tokens/s",
        file=sys.stderr,
    )


def token_table(chat: Chat, pieces: Iterable[Piece]) -> str:
    """A line per token: itself, its log-probability, and what else was likely."""
    word = chat.processor.tokenizer.id_to_token
    lines = []
    for piece in pieces:
        if piece.token is None:
            continue
        logprob = float(piece.logits.float().log_softmax(-1)[piece.token])
        others = [(t, p) for t, p in alternatives(piece.logits, 4) if t != piece.token][:3]
        likely = "  ".join(f"{json.dumps(word(t), ensure_ascii=False)} {p:.1%}" for t, p in others)
        name = json.dumps(word(piece.token), ensure_ascii=False)
        lines.append(f"{name:24} {logprob:8.3f}   {likely}")
    return "\n".join(lines)


# --- In the terminal ----------------------------------------------------------------------------


def typed() -> Iterator[str]:
    """Lines from the keyboard, with history where Python has readline."""
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  input() then edits lines and remembers them
    print("Ask; /help lists commands.", file=sys.stderr)
    while True:
        try:
            line = input("> ")
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:  # forgets the line, as in a shell
            print(file=sys.stderr)
            continue
        yield line


def talk(
    conversation: Conversation,
    images: Iterable[str],
    lines: Iterable[str],
    sampling: Sampling,
    stop: tuple[str, ...],
) -> None:
    """Answer line after line. A mistake costs a sentence, not the conversation."""
    shown = list(images)
    if shown:
        conversation.chat.prompt("", shown)  # a picture that cannot be read is said at once
    for line in map(str.strip, lines):
        word = line.split(" ")[0]
        try:
            if word == "/quit":
                return
            if word == "/image":
                waiting = shown[len(conversation.pictures) :]
                conversation.chat.prompt("", waiting + files(line))  # all, as they go together
                shown += files(line)
            elif word == "/reset":
                conversation.reset()
            elif word == "/save":
                save(conversation, Path(files(line)[0]))
            elif word.startswith("/"):
                print("" if word == "/help" else f"{word}: no such command.\n", HELP, sep="",
                      file=sys.stderr)  # fmt: skip
            elif line:
                new = shown[len(conversation.pictures) :]
                for _ in show(conversation.ask(line, new, sampling, stop)):
                    pass
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print(file=sys.stderr)


def files(line: str) -> list[str]:
    """The files that a command names."""
    try:
        _, *found = shlex.split(line)
    except ValueError:  # a quote without its second
        found = []
    if not found:
        raise InputError("name a file, in quotes where it has spaces.")
    return found


def save(conversation: Conversation, path: Path) -> None:
    """Append the conversation as a row that `data.source` reads."""
    if not conversation.turns:
        raise InputError("nothing was said yet.")
    row = {
        "images": [str(Path(p).resolve()) for p in conversation.pictures],
        "messages": [{"role": turn.role, "content": turn.text} for turn in conversation.turns],
    }
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json_line(row))
    except (OSError, ValueError) as error:  # the latter of a name that no file can have
        reason = getattr(error, "strerror", error)
        raise InputError(f"{str(path)!r}: cannot be written ({reason}).") from None
    print(f"appended to {path}", file=sys.stderr)


if __name__ == "__main__":
    command(main)
