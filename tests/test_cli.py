"""Bad input gets one sentence and exit code 2, good input what was asked."""

from __future__ import annotations

import io
import json
import re
import shutil
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import generate
import score
import train
from configs import command, read_json


def refused(capsys, main, *argv: object) -> str:
    """The one line on stderr of a refused command."""
    with pytest.raises(SystemExit) as stop:
        command(main, [str(a) for a in argv])
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if "step/s" not in line]
    assert stop.value.code == 2 and len(lines) == 1, err
    assert lines[0].startswith("error: ") and out == ""
    return lines[0]


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) \
        + chunk(b"IEND", b"")  # fmt: skip


@pytest.fixture
def pictures(tmp_path) -> Path:
    for i in range(2):
        Image.new("RGB", (30 + 20 * i, 40), (200 * i, 90, 30)).save(tmp_path / f"{i}.png")
    (tmp_path / "text.png").write_text("not a picture at all")
    (tmp_path / "empty.png").touch()
    (tmp_path / "huge.png").write_bytes(png_header(60000, 60000))
    return tmp_path


# --- generate.py ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("absent.png", "no such file"),
        ("text.png", "not a readable picture"),
        ("empty.png", "not a readable picture"),
        ("huge.png", "more than 89,478,485 pixels"),
        (".", "not a readable picture"),
    ],
)
def test_a_picture_that_cannot_be_read(small_checkpoint, pictures, capsys, name, says):
    path = pictures / name
    line = refused(capsys, generate.main, small_checkpoint, "--image", path)
    assert str(path) in line and says in line


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--prompt", "word " * 400], "the model's context ends at 256"),
        (["--prompt", " "], "prompt is empty"),
        (["--prompt", "<image>What?"], "1 <image> placeholders for 0 images"),
        (["--prompt", "Say <end_of_utterance>"], "special token <end_of_utterance>"),
        (["--temperature", "-1"], "temperature = -1.0 must be at least 0"),
        (["--max-new-tokens", "0"], "max_new_tokens = 0 must be greater than 0"),
        (["--n", "0"], "n = 0: must be at least 1"),
    ],
)
def test_a_question_that_cannot_be_asked(small_checkpoint, capsys, flags, says):
    assert says in refused(capsys, generate.main, small_checkpoint, *flags)


def test_a_checkpoint_that_cannot_be_opened(small_checkpoint, tmp_path, capsys):
    line = refused(capsys, generate.main, tmp_path / "nowhere")
    assert "nowhere: no such checkpoint" in line
    assert "neither a checkpoint" in refused(capsys, generate.main, tmp_path)
    broken = tmp_path / "broken"
    shutil.copytree(small_checkpoint, broken)
    tensors = load_file(broken / "model.safetensors")
    gone = sorted(tensors)[5]
    del tensors[gone]
    save_file(tensors, broken / "model.safetensors")
    assert gone in refused(capsys, generate.main, broken)
    (broken / "model.safetensors").write_bytes(b"half a file")
    assert "not a whole safetensors file" in refused(capsys, generate.main, broken)


def ask(capsys, *argv: object) -> tuple[str, str]:
    command(generate.main, [str(a) for a in argv])
    return capsys.readouterr()


def test_the_answer_alone_is_on_stdout(small_checkpoint, pictures, capsys, monkeypatch):
    flags = ["--image", pictures / "0.png", "--max-new-tokens", 8]
    out, err = ask(capsys, small_checkpoint, *flags, "--prompt", "What is it?")
    assert out.endswith("\n") and "tokens/s" not in out
    assert re.fullmatch(r"\d+ ms to the first token, [\d.]+ tokens/s\n", err)
    monkeypatch.setattr("sys.stdin", io.StringIO("What is it?\n"))
    assert ask(capsys, small_checkpoint, *flags, "--prompt", "-")[0] == out
    monkeypatch.setattr("sys.stdin", io.StringIO("How many?\n"))
    assert ask(capsys, small_checkpoint, *flags, "--prompt", "-")[0] != out


def test_sampled_answers_differ_and_repeat(small_checkpoint, pictures, capsys):
    flags = ["--image", pictures / "0.png", "--max-new-tokens", 8, "--n", 3, "--temperature", 1]
    first = ask(capsys, small_checkpoint, *flags, "--seed", 0)[0]
    assert ask(capsys, small_checkpoint, *flags, "--seed", 0)[0] == first
    assert ask(capsys, small_checkpoint, *flags, "--seed", 7)[0] != first
    single = ask(capsys, small_checkpoint, *flags[:-4], "--temperature", 1, "--seed", 0)[0]
    assert first.startswith(single) and first != 3 * single


def test_several_pictures_stand_where_the_prompt_says(small_checkpoint, pictures, capsys):
    one, two = pictures / "0.png", pictures / "1.png"
    flags = [small_checkpoint, "--max-new-tokens", 8]
    both = ask(capsys, *flags, "--image", one, two, "--prompt", "Which?")[0]
    assert ask(capsys, *flags, "--image", one, two, "--prompt", "<image><image>Which?")[0] == both
    prompt = "<image>One <image>two: which?"
    assert ask(capsys, *flags, "--image", one, two, "--prompt", prompt)[0] \
        != ask(capsys, *flags, "--image", two, one, "--prompt", prompt)[0]  # fmt: skip
    says = refused(capsys, generate.main, *flags, "--image", one, "--prompt", prompt)
    assert "2 <image> placeholders for 1 images" in says


# --- train.py ------------------------------------------------------------------------------------


def test_a_preset_that_does_not_exist(capsys):
    assert "did you mean 'tiny'?" in refused(capsys, train.main, "tinny")


def test_a_flag_that_does_not_exist(capsys):
    with pytest.raises(SystemExit) as stop:
        command(train.main, ["tiny", "--train.stpes", "3"])
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert "--train.stpes" in err and "--train.steps" in err and "Traceback" not in err


def test_a_config_that_is_wrong(run_file, capsys, tmp_path):
    values = read_json(run_file())
    values["train"]["stepz"] = 3
    (tmp_path / "typo.json").write_text(json.dumps(values))
    assert "did you mean 'steps'?" in refused(capsys, train.main, tmp_path / "typo.json")
    (tmp_path / "torn.json").write_text('{"train": {')
    assert "torn.json: not JSON" in refused(capsys, train.main, tmp_path / "torn.json")
    line = refused(capsys, train.main, run_file(), "--data.source", tmp_path / "no.jsonl")
    assert "no.jsonl: no such file" in line


def test_too_many_bad_rows(run_file, capsys, tmp_path):
    good = json.dumps({"question": "What?", "answer": "yes"})
    rows = [good, good, '{"question": "no answer"}', *["{"] * 5, good, good]
    (tmp_path / "bad.jsonl").write_text("\n".join(rows))
    line = refused(capsys, train.main, run_file(data={"source": str(tmp_path / "bad.jsonl")}))
    assert "6 of 10 rows are bad" in line and "bad.jsonl row 3" in line and "'answer'" in line


def first_row(tmp_path) -> dict:
    """A data set of one row, whose picture makes many tiles."""
    Image.new("RGB", (90, 90)).save(tmp_path / "big.png")
    row = json.dumps({"image": "big.png", "question": "What?", "answer": "yes"})
    (tmp_path / "one.jsonl").write_text(row)
    return {"source": str(tmp_path / "one.jsonl")}


@pytest.mark.parametrize(
    ("model", "data", "says"),
    [
        ({"max_img_size": 64}, {"max_tiles": 3}, "17 tiles are more than data.max_tiles = 3"),
        ({"max_img_size": 64}, {"max_length": 64}, "raise data.max_length"),
    ],
)
def test_a_picture_over_the_budget(run_file, capsys, tmp_path, model, data, says):
    config = run_file(model=model, data=first_row(tmp_path) | data)
    with pytest.raises(SystemExit) as stop:
        command(train.main, [str(config)])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in err
    assert says in err.splitlines()[-1] and "one.jsonl row 1" in err


def test_a_run_folder_that_cannot_be_written(run_file, capsys, tmp_path):
    (tmp_path / "taken").write_text("a file")
    line = refused(capsys, train.main, run_file("taken/run".replace("/", "_")),
                   "--train.out", tmp_path / "taken" / "run")  # fmt: skip
    assert "train.out" in line and "cannot be written" in line


def test_nothing_to_train(run_file, capsys):
    every = ["vision", "projector", "language"]
    with pytest.raises(SystemExit) as stop:
        command(train.main, [str(run_file()), "--train.freeze", *every])
    err = " ".join(capsys.readouterr().err.split())
    assert stop.value.code == 2 and "Traceback" not in err
    assert "freeze = ('vision', 'projector', 'language'): leaves nothing to train" in err


def test_backbones_that_cannot_be_had(run_file, capsys, tmp_path):
    argv = [run_file(), "--model.vit-model-type"]
    line = refused(capsys, train.main, *argv, "some/encoder")
    assert "some/encoder: no such checkpoint directory, and from the Hub it cannot be had" in line
    assert "HF_HUB_OFFLINE is set" in line
    assert "no such checkpoint directory." in refused(capsys, train.main, *argv, tmp_path / "no")
    line = refused(capsys, train.main, run_file(), "--model.lm-model-type", tmp_path)
    assert "lm_tokenizer = 'world'" in line and "name its own tokenizer" in line


# --- score.py ------------------------------------------------------------------------------------


def test_a_score_that_cannot_be_made(small_checkpoint, rows_file, capsys, tmp_path):
    on = [small_checkpoint, "--data.source", rows_file, "--data.val-fraction", 0]
    assert "no rows in split val" in refused(capsys, score.main, *on, "--split", "val")
    missing = tmp_path / "missing" / "score.json"
    assert "its folder does not exist" in refused(capsys, score.main, *on, "--json", missing)
    assert str(tmp_path) in refused(capsys, score.main, *on, "--json", tmp_path)
    assert "n = 0" in refused(capsys, score.main, *on, "--n", 0)


def test_score_writes_what_it_prints(small_checkpoint, rows_file, capsys, tmp_path):
    flags = ["--n", 3, "--max-new-tokens", 4, "--json", tmp_path / "s.json"]
    flags += ["--predictions", tmp_path / "p.jsonl", "--sheet", tmp_path / "s.png"]
    argv = [small_checkpoint, "--data.source", rows_file, *flags]
    command(score.main, [str(a) for a in argv])
    result = read_json(tmp_path / "s.json")
    assert result["n"] == 3 and f"{result['accuracy']:.1%}" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert sum(r["score"] for r in rows) / 3 == pytest.approx(result["accuracy"])
    assert Image.open(tmp_path / "s.png").width > 1000
