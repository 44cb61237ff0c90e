"""generate.py: prompts, chat, files of questions, and error messages."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import generate
from cli import command
from configs import DataConfig
from data.sources.open import open_dataset
from engine.inference import terminal
from engine.inference.chat import Chat
from engine.training.distributed import missing_compiler
from models.inference.sampling import Sampling
from models.vision_language_model import VisionLanguageModel

ROOT = Path(__file__).parent.parent


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header claims a size, with hardly any data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) \
        + chunk(b"IEND", b"")  # fmt: skip


@pytest.fixture
def images(tmp_path) -> Path:
    for i in range(2):
        Image.new("RGB", (30 + 20 * i, 40), (200 * i, 90, 30)).save(tmp_path / f"{i}.png")
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").touch()
    (tmp_path / "huge.png").write_bytes(png_header(60000, 60000))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.png", "no such file"),
        ("text.png", "not a readable image"),
        ("empty.png", "not a readable image"),
        ("huge.png", "more than 89,478,485 pixels"),
        (".", "not a readable image"),
    ],
)
def test_unreadable_images(small_checkpoint, images, refused, name, message):
    path = images / name
    line = refused(generate.main, small_checkpoint, "--image", path)
    assert str(path) in line and message in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "word " * 400], "the model's context ends at 256"),
        (["--prompt", " "], "prompt is empty"),
        (["--prompt", "<image>What?"], "1 <image> placeholders for 0 images"),
        (["--prompt", "Say <end_of_utterance>"], "special token <end_of_utterance>"),
        (["--temperature", "-1"], "temperature = -1.0 must be at least 0"),
        (["--max-new-tokens", "0"], "max_new_tokens = 0 must be greater than 0"),
        (["--n", "0"], "n = 0: must be at least 1"),
        (["--temperature", "inf"], "temperature = inf must be at least 0, and finite"),
        (["--seed", str(2**64)], "must be in [0, 2 ** 63)"),
        (["--device", "nowhere"], "device = 'nowhere': "),
        (["--n", "abc"], "--n: invalid literal for int() with base 10: 'abc'; --help"),
        (["--quantize", "int4"], "invalid choice 'int4' for argument '--quantize'"),
        (["--n"], "Missing value for argument '--n'"),
        (["--choices", "yes", "no"], "choices: needs --prompt or --jsonl"),
        (["--logprobs"], "logprobs: needs --prompt or --jsonl"),
        (["--prompt", "a", "--choices", "yes"], "needs at least two choices"),
        (["--prompt", "a", "--choices", "yes,"], "must not contain an empty string"),
        (["--prompt", "a", "--choices", "a", "b", "--n", "2"], "n: not used with --choices"),
        (["--prompt", "a", "--choices", "a", "a"], "contains the same choice twice"),
        (["--prompt", "a", "--choices", "a", "b", "--stop", "x"], "stop: not used with --choices"),
        (["--prompt", "a", "--choices", "a", "b", "--seed", "3"], "seed: not used with --choices"),
        (["--prompt", "a", "--batch-size", "2"], "batch_size: needs --jsonl"),
        (["--prompt", "a", "--choices", "a", "b", "--compile"], "compile: not used with --choices"),
        (["--jsonl", "a", "--out", "b", "--compile"], "compile: not used with --jsonl"),
        (["--prompt", "a", "--choices", "<image>", "no"], "an answer contains <image>"),
        (["--prompt", "a", "--choices", "no", "yes " * 300], "and the longest choice 301"),
    ],
)
def test_invalid_arguments(small_checkpoint, refused, flags, message):
    assert message in refused(generate.main, small_checkpoint, *flags)


def test_stdin_that_is_not_utf_8(small_checkpoint, refused, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), "utf-8"))
    assert "surrogate" in refused(generate.main, small_checkpoint, "--prompt", "-")


def test_invalid_checkpoints(small_checkpoint, tmp_path, refused):
    line = refused(generate.main, tmp_path / "nowhere")
    assert "nowhere: no such checkpoint" in line
    assert "neither a checkpoint" in refused(generate.main, tmp_path)
    broken = tmp_path / "broken"
    shutil.copytree(small_checkpoint, broken)
    tensors = load_file(broken / "model.safetensors")
    gone = sorted(tensors)[5]
    del tensors[gone]
    save_file(tensors, broken / "model.safetensors")
    assert gone in refused(generate.main, broken)
    (broken / "model.safetensors").write_bytes(b"half a file")
    assert "not a whole safetensors file" in refused(generate.main, broken)


def test_missing_compiler(small_checkpoint, monkeypatch, refused):
    monkeypatch.setenv("CXX", "no-such-compiler")
    line = refused(generate.main, small_checkpoint, "--prompt", "a", "--compile")
    assert "compile: torch.compile needs no-such-compiler; remove --compile" in line


@pytest.mark.slow
def test_broken_compiler(small_checkpoint, tmp_path):
    """In a new process, because this one may have compiled already."""
    argv = [sys.executable, ROOT / "generate.py", small_checkpoint, "--prompt", "a", "--compile"]
    env = os.environ | {"CXX": "false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: compile: torch.compile failed (")
    assert line.endswith("; remove --compile.")


@pytest.mark.slow
def test_compiled_decoding_gives_the_same_answers(small_checkpoint, images, capsys, monkeypatch):
    """In a conversation, which reuses its cache, with a second image in the second turn."""
    if reason := missing_compiler(torch.device("cpu")):
        pytest.skip(reason)
    lines = f"What is it?\n/image {images / '1.png'}\nAnd this?\n"
    flags = [small_checkpoint, "--image", images / "0.png", "--max-new-tokens", 30]
    printed = []
    for extra in ([], ["--compile"]):
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        printed.append(ask(capsys, *flags, *extra))
    assert printed[0][0] == printed[1][0] and len(printed[0][0]) > 20
    assert printed[1][1].startswith("decoding step compiled in ")


def ask(capsys, *argv: object) -> tuple[str, str]:
    command(generate.main, [str(a) for a in argv])
    return capsys.readouterr()


def test_only_the_answer_is_on_stdout(small_checkpoint, images, capsys, monkeypatch):
    flags = ["--image", images / "0.png", "--max-new-tokens", 8]
    out, err = ask(capsys, small_checkpoint, *flags, "--prompt", "What is it?")
    assert out.endswith("\n") and "tokens/s" not in out
    assert re.fullmatch(r"\d+ ms to the first token, [\d.]+ tokens/s\n", err)
    monkeypatch.setattr("sys.stdin", io.StringIO("What is it?\n"))
    assert ask(capsys, small_checkpoint, *flags, "--prompt", "-")[0] == out
    monkeypatch.setattr("sys.stdin", io.StringIO("How many?\n"))
    assert ask(capsys, small_checkpoint, *flags, "--prompt", "-")[0] != out


def test_sampling_is_reproducible(small_checkpoint, images, capsys):
    flags = ["--image", images / "0.png", "--prompt", "What?", "--max-new-tokens", 8, "--n", 3,
             "--temperature", 1]  # fmt: skip
    first = ask(capsys, small_checkpoint, *flags, "--seed", 0)[0]
    assert ask(capsys, small_checkpoint, *flags, "--seed", 0)[0] == first
    assert ask(capsys, small_checkpoint, *flags, "--seed", 7)[0] != first
    single = ask(capsys, small_checkpoint, *flags[:-4], "--temperature", 1, "--seed", 0)[0]
    assert first.startswith(single) and first != 3 * single


def test_several_images_in_a_prompt(small_checkpoint, images, capsys, refused):
    one, two = images / "0.png", images / "1.png"
    flags = [small_checkpoint, "--max-new-tokens", 8]
    both = ask(capsys, *flags, "--image", one, two, "--prompt", "Which?")[0]
    assert ask(capsys, *flags, "--image", one, two, "--prompt", "<image><image>Which?")[0] == both
    prompt = "<image>One <image>two: which?"
    assert ask(capsys, *flags, "--image", one, two, "--prompt", prompt)[0] \
        != ask(capsys, *flags, "--image", two, one, "--prompt", prompt)[0]  # fmt: skip
    message = refused(generate.main, *flags, "--image", one, "--prompt", prompt)
    assert "2 <image> placeholders for 1 images" in message


def test_choices(small_checkpoint, images, capsys):
    flags = ["--image", images / "0.png", "--prompt", "Is it red?", "--choices", "yes", "no"]
    out, err = ask(capsys, small_checkpoint, *flags)
    probabilities = dict(reversed(line.split("% ")) for line in err.splitlines())
    assert set(probabilities) == {"yes", "no"}
    assert sum(map(float, probabilities.values())) == pytest.approx(100)
    assert out.strip() == max(probabilities, key=lambda name: float(probabilities[name]))
    assert ask(capsys, small_checkpoint, *flags[:-2], "yes, no") == (out, err)


def test_logprobs(small_checkpoint, images, capsys):
    flags = ["--image", images / "0.png", "--prompt", "What?", "--max-new-tokens", 5]
    plain, _ = ask(capsys, small_checkpoint, *flags)
    out, err = ask(capsys, small_checkpoint, *flags, "--logprobs")
    assert out == plain and len(err.splitlines()) == 1 + 5
    word, logprob, *others = err.splitlines()[1].split()
    assert float(logprob) < 0 and "%" in others[1] and word.startswith('"')


def test_stop_string(small_checkpoint, images, capsys):
    flags = ["--image", images / "0.png", "--prompt", "What?", "--max-new-tokens", 8]
    plain = ask(capsys, small_checkpoint, *flags)[0].strip()
    stop = plain[3:5]
    assert ask(capsys, small_checkpoint, *flags, "--stop", stop)[0].strip() \
        == plain.split(stop)[0].rstrip()  # fmt: skip


@pytest.fixture
def typed(monkeypatch, capsys):
    """`typed(checkpoint, *flags, lines=[...])` -> (stdout, stderr) of a conversation."""

    def run(*argv: object, lines: list[str]) -> tuple[str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
        return ask(capsys, *argv)

    return run


def test_a_conversation_in_the_terminal(small_checkpoint, images, typed, tmp_path):
    flags = [small_checkpoint, "--image", images / "0.png", "--max-new-tokens", 6]
    saved = tmp_path / "conversation.jsonl"
    lines = ["What?", "", "Sure?", "/image lost.png", "/nonsense", f"/save {saved}", "/reset"]
    lines += ["What?", f"/image {images / '1.png'}", "Which?", f"/save {saved}", "/quit", "No?"]
    out, err = typed(*flags, lines=lines)
    answers = out.removesuffix("\n").split("\n")  # not splitlines: answers are random text
    assert len(answers) == 4 and answers[0] == answers[2], "the image is still given after a reset"
    assert "error: lost.png: no such file." in err and "/save FILE" in err
    assert "/nonsense: unknown command." in err
    first, second = map(json.loads, saved.read_text().splitlines())
    assert [m["role"] for m in first["messages"]] == ["user", "assistant"] * 2
    assert first["messages"][0]["content"] == "<image>What?" and len(first["images"]) == 1
    assert second["messages"][2]["content"] == "<image>Which?" and len(second["images"]) == 2
    rows = open_dataset(DataConfig(source=str(saved), val_fraction=0.0), "train")
    assert [len(rows[i].images) for i in (0, 1)] == [1, 2], "train.py reads the file"
    assert "nothing to save" in typed(*flags, lines=[f"/save {saved}"])[1]
    shutil.copy(images / "1.png", images / "my image.png")
    lines = ["/image", '/image "', f"/image '{images}/my image.png'", "What?", "/save"]
    assert typed(*flags, lines=lines)[1].count("error: file name missing; use quotes") == 3
    long = typed(*flags, lines=["word " * 300, "What?"])
    assert "context ends at 256" in long[1] and long[0].strip() == answers[0]


def test_too_many_images_for_a_question(small_checkpoint, images, typed):
    """They are refused at once; otherwise every later question would be too long."""
    command = f"/image {' '.join([str(images / '0.png')] * 20)}"  # about 10 tokens each
    flags = [small_checkpoint, "--max-new-tokens", 3]
    out, err = typed(*flags, lines=[command, command, "What?", "/save a\0b", "Sure?"])
    assert err.count("error: ") == 2 and "context ends at 256" in err, err
    assert "cannot be written (embedded null byte)" in err and len(out.split("\n")) >= 3


def test_keyboard_input(monkeypatch, capsys):
    """Ctrl-C discards the line, Ctrl-D quits."""
    lines = iter(["What?", KeyboardInterrupt, "Sure?", EOFError])

    def typed(prompt: str) -> str:
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", typed)
    assert list(terminal.read_keyboard()) == ["What?", "Sure?"]
    assert "/help lists commands" in capsys.readouterr().err


def test_ctrl_c_before_the_first_token_keeps_the_image(
    small_checkpoint, images, typed, monkeypatch, tmp_path
):
    flags = [small_checkpoint, "--image", images / "0.png", "--max-new-tokens", 6]
    prefill, calls = VisionLanguageModel.prefill, []

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return prefill(self, *args)

    monkeypatch.setattr(VisionLanguageModel, "prefill", interrupted)
    out, _ = typed(*flags, lines=["What?", "Sure?", f"/save {tmp_path / 'conversation.jsonl'}"])
    row = json.loads((tmp_path / "conversation.jsonl").read_text())
    assert len(row["images"]) == 1 and out.strip()
    assert row["messages"][0]["content"] == "<image>Sure?"


# --- A file of questions --------------------------------------------------------------------------


@pytest.fixture
def questions(images) -> Path:
    rows = [{"image": f"{i % 2}.png", "question": f"What is {i}?", "id": i} for i in range(9)]
    rows[4] = {"prompt": "Hello?", "image": None, "choices": None}
    rows[6]["choices"] = ["yes", "no", "maybe"]
    (images / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return images / "in.jsonl"


def test_a_file_of_questions(small_checkpoint, questions, capsys, tmp_path):
    out = tmp_path / "out.jsonl"
    flags = [small_checkpoint, "--jsonl", questions, "--out", out, "--max-new-tokens", 5]
    ask(capsys, *flags, "--batch-size", 3, "--logprobs")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["row"] for row in rows] == list(range(9)) and rows[3]["id"] == 3
    chat = Chat.load(small_checkpoint)
    alone = chat("What is 5?", [questions.parent / "1.png"], Sampling(5))
    assert rows[5]["answer"] == alone and len(rows[5]["logprobs"]) == len(rows[5]["tokens"]) == 5
    assert rows[6]["answer"] in ("yes", "no", "maybe") and sum(rows[6]["shares"]) == \
        pytest.approx(1, abs=1e-5)  # fmt: skip
    # Resume with an incomplete last line: only missing answers are generated.
    whole = out.read_text()
    lines = whole.splitlines(keepends=True)
    out.write_text("".join([*lines[5:], lines[0], lines[1][:20]]))
    ask(capsys, *flags, "--logprobs")
    assert out.read_text() == whole
    out.write_text(whole.replace('"answer": "', '"answer": "kept '))
    ask(capsys, *flags, "--logprobs")
    assert out.read_text().count("kept ") >= 8, "existing answers are kept"


def test_errors_with_a_file_of_questions(small_checkpoint, questions, capsys, tmp_path, refused):
    out = tmp_path / "out.jsonl"
    flags = [small_checkpoint, "--jsonl", questions, "--max-new-tokens", 3]
    assert "must be used together" in refused(generate.main, *flags)
    for place in (tmp_path, tmp_path / "nowhere" / "out.jsonl"):
        message = refused(generate.main, *flags, "--out", place)
        assert "must be a file in an existing folder" in message
    flags += ["--out", out]
    for ignored in (["--prompt", "What?"], ["--image", "0.png"], ["--n", "2"]):
        assert f"{ignored[0][2:]}: " in refused(generate.main, *flags, *ignored)
    rows = questions.read_text()
    questions.write_text(rows.replace('"1.png"', '"text.png"', 1))
    with pytest.raises(SystemExit) as stop:
        command(generate.main, [str(a) for a in flags])
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "1 of 9 rows have no answer" in last
    assert "in.jsonl row 2" in last and "not a readable image" in last
    assert len(out.read_text().splitlines()) == 8
    questions.write_text(rows)
    ask(capsys, *flags)
    assert len(out.read_text().splitlines()) == 9, "the next run answers the repaired row"
    questions.write_text(rows.replace("What is 3?", "Else?"))
    assert "holds answers to other questions" in refused(generate.main, *flags)
    questions.write_text(rows)
    for other in (["--temperature", "1"], ["--choices", "yes", "no"]):
        assert "other settings" in refused(generate.main, *flags, *other)
    other = VisionLanguageModel.from_pretrained(small_checkpoint)
    shutil.copytree(small_checkpoint, tmp_path / "other")
    with torch.no_grad():
        other.MP.proj.weight[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    assert "another model" in refused(generate.main, tmp_path / "other", *flags[1:])
    flags[-1] = tmp_path / "n"
    for row, message in (
        ('{"image": "0.png"}', "expected text in 'question'"),
        ('{"question": "a", "image": 3}', "'image' must be a path or a list of paths"),
        ('{"question": "a", "choices": "yes"}', "'choices' must be a list of strings"),
    ):
        questions.write_text(row + "\n")
        assert message in refused(generate.main, *flags)
    assert not (tmp_path / "n").exists()
    questions.write_text('{"question": "a", "choices": ["b", "<image>"]}\n')
    with pytest.raises(SystemExit):
        command(generate.main, [str(a) for a in flags])
    assert "row 1: answer '<image>': an answer contains <image>" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["some text", '{"question": "What?"}', '{"row": 0}\n'])
def test_other_files_are_not_overwritten(small_checkpoint, tmp_path, content, refused):
    questions, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    questions.write_text('{"question": "What?"}')
    out.write_text(content)
    flags = [small_checkpoint, "--jsonl", questions, "--max-new-tokens", 3, "--out"]
    assert "holds answers to other questions" in refused(generate.main, *flags, out)
    assert "holds answers to other questions" in refused(generate.main, *flags, questions)
    assert out.read_text() == content and questions.read_text() == '{"question": "What?"}'
