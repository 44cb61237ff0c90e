"""The terminal: print an answer while it is generated, and a conversation with commands.

Not here: the prefix cache (conversation.py), flags (generate.py).
"""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from config_tools import InputError, json_line
from engine.inference.chat import Chat, Chunk, top_tokens
from engine.inference.conversation import Conversation
from models.inference.sampling import Sampling

HELP = """/image FILE ...   add images to the next question
/reset            start a new conversation; encoded images stay cached
/save FILE        append the conversation to a JSONL file that train.py reads
/quit             quit (also Ctrl-D); Ctrl-C interrupts an answer"""


def print_chunks(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """Print chunks while they are generated and yield them; then print the speed on stderr."""
    start, times = time.perf_counter(), []
    for chunk in chunks:
        times.append(time.perf_counter() - start)
        print(chunk.text, end="", flush=True)
        yield chunk
    print()
    first, rate = f"{times[0] * 1000:.0f} ms", f"{len(times) / times[-1]:.1f} tokens/s"
    print(f"{first} to the first token, {rate}", file=sys.stderr)


def token_table(chat: Chat, chunks: Iterable[Chunk]) -> str:
    """A line per token: the token, its log-probability, and likely alternatives."""
    word = chat.processor.tokenizer.id_to_token
    lines = []
    for chunk in chunks:
        if chunk.token is None or chunk.logits is None:
            continue
        logprob = float(chunk.logits.float().log_softmax(-1)[chunk.token])
        others = [(t, p) for t, p in top_tokens(chunk.logits, 4) if t != chunk.token][:3]
        likely = "  ".join(f"{json.dumps(word(t), ensure_ascii=False)} {p:.1%}" for t, p in others)
        name = json.dumps(word(chunk.token), ensure_ascii=False)
        lines.append(f"{name:24} {logprob:8.3f}   {likely}")
    return "\n".join(lines)


# --- Conversation -------------------------------------------------------------------------------


def read_keyboard() -> Iterator[str]:
    """Yield lines from the keyboard; with history if Python has readline."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() line editing and history
    print("Ask a question; /help lists commands.", file=sys.stderr)
    while True:
        try:
            line = input("> ")
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:  # discard the line, as a shell does
            print(file=sys.stderr)
            continue
        yield line


def run_conversation(
    conversation: Conversation, images: Iterable[str], lines: Iterable[str],
    sampling: Sampling, stop: tuple[str, ...],
) -> None:  # fmt: skip
    """Answer each line or run its command; an `InputError` is printed and the loop continues."""
    given = list(images)  # all images so far, including those for the next question
    if given:
        conversation.chat.encode_prompt("", given)  # fail now if an image cannot be read
    for line in map(str.strip, lines):
        word, waiting = line.split(" ")[0], given[len(conversation.images) :]
        try:
            if word == "/quit":
                return
            if word == "/image":
                new = file_arguments(line)
                conversation.chat.encode_prompt("", waiting + new)  # fail now if they do not fit
                given += new
            elif word == "/reset":
                conversation.reset()
            elif word == "/save":
                save_conversation(conversation, Path(file_arguments(line)[0]))
            elif word.startswith("/"):
                print("" if word == "/help" else f"{word}: unknown command.\n", HELP, sep="",
                      file=sys.stderr)  # fmt: skip
            elif line:
                list(print_chunks(conversation.ask(line, waiting, sampling, stop)))
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print(file=sys.stderr)


def file_arguments(line: str) -> list[str]:
    """Return the file names after a command; raises `InputError` if there are none."""
    try:
        _, *names = shlex.split(line)
    except ValueError:  # an unclosed quote
        names = []
    if not names:
        raise InputError("file name missing; use quotes if it has spaces.")
    return names


def save_conversation(conversation: Conversation, path: Path) -> None:
    """Append the conversation to a JSONL file, as a row that `data.source` reads."""
    if not conversation.turns:
        raise InputError("nothing to save: the conversation is empty.")
    row = {
        "images": [str(Path(p).resolve()) for p in conversation.images],
        "messages": [{"role": turn.role, "content": turn.text} for turn in conversation.turns],
    }
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json_line(row))
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = getattr(error, "strerror", error)
        raise InputError(f"{str(path)!r}: cannot be written ({reason}).") from None
    print(f"appended to {path}", file=sys.stderr)
