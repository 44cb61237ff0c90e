"""The preview reports rows, tokens and tiles; training without supervised tokens does not start."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train
from cli import command
from config_tools import InputError
from configs import DataConfig, VLMConfig
from data import preview
from data import processor as processors
from data.preview import (  # fmt: skip
    GREEN,
    PLAIN,
    arrange_tiles,
    check_before_training,
    describe_rows,
    draw_contact_sheet,
    evenly_spaced,
    histogram,
    inspect_row,
    mark_supervised,
    tile_spans,
)
from data.sources.open import open_dataset

ROOT = Path(__file__).parent.parent.parent
TILED = VLMConfig(vit_img_size=16, vit_patch_size=4, max_img_size=64)


@pytest.fixture(scope="module")
def tiled():
    return processors.build(TILED)


@pytest.fixture
def file(tmp_path) -> Path:
    """Ten rows: an image of 64 x 32 with two halves, a broken image, and text; and a bad line."""
    halves = np.zeros((32, 64, 3), dtype=np.uint8)
    halves[:, 32:] = 255
    Image.fromarray(halves).save(tmp_path / "wide.png")
    (tmp_path / "broken.png").write_text("not an image")
    rows = [
        {"image": "wide.png", "question": "Which half is dark?", "answer": "left"},
        {"image": "broken.png", "question": "What?", "answer": "nothing"},
        *({"question": f"{i}?", "answer": "word " * 4 ** (i % 4)} for i in range(8)),
        "broken",
    ]
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return tmp_path / "rows.jsonl"


def config(file: Path, **changes) -> DataConfig:
    return DataConfig(source=str(file), val_fraction=0.0, **changes)


# --- What is shown ------------------------------------------------------------------------------


def test_answers_are_marked_and_placeholders_counted(tiled, file):
    source = open_dataset(config(file), "train")
    tokens = tiled.encode(source[0], 500, 20)
    fake = "<fake_token_around_image>"
    rows = "".join(
        "".join(f"{fake}<row_{r}_col_{c}><image> x 4" for c in range(1, 5)) + "\n" for r in (1, 2)
    )
    view = f"{fake}<global-img><image> x 4{fake}"
    asked = f"<|im_start|>User:{rows}\n{view}Which half is dark?<end_of_utterance>\nAssistant:"
    assert mark_supervised(tokens, tiled, color=False) == f"{asked}[[ left<end_of_utterance>]]\n"
    assert (
        mark_supervised(tokens, tiled, color=True)
        == f"{asked}{GREEN} left<end_of_utterance>{PLAIN}\n"
    )


def test_a_histogram_counts_every_value_once():
    text = histogram("tiles", [1, 1, 1, 2, 4])
    assert text.splitlines()[0] == "tiles: 1 to 4, mean 1.8"
    counts = [line.split()[:2] for line in text.splitlines()[1:]]
    assert counts == [["1", "3"], ["2", "1"], ["3", "0"], ["4", "1"]]
    values = np.random.default_rng(0).integers(5, 3000, 500).tolist()
    lines = histogram("tokens", values).splitlines()[1:]
    assert len(lines) <= 8 and sum(int(line.split()[1]) for line in lines) == 500
    for line in lines:
        low, high = map(int, line.split()[0].split("-"))
        assert sum(low <= v <= high for v in values) == int(line.split()[1])
        assert line.count("#") <= 40
    assert histogram("tokens", []) == "tokens: none"


def test_the_counts_of_the_report(tiled, file):
    cfg = config(file, max_length=40)
    source = open_dataset(cfg, "train")
    seen = [inspect_row(source, tiled, cfg, i) for i in range(len(source))]
    text = describe_rows(source, seen, cfg)
    whole = [tiled.encode_whole(source[i], 20) for i in range(2, 10)]
    n_all = sum(int(t.supervised.sum()) for t in whole)
    n_kept = sum(int(t.supervised[:40].sum()) for t in whole)
    n_tokens = sum(min(40, len(t)) for t in whole)
    n_long = sum(len(t) > 40 for t in whole)
    assert 0 < n_kept < n_all and n_long == 4
    assert f"skipped: {file} row 11: not JSON" in text
    assert "checked 10 of 10 training rows" in text
    assert "unusable rows: 2 of the checked ones; 1 more on opening the source" in text
    assert f"  {file} row 1: its images take" in text and "broken.png: not a readable" in text
    assert f"max_length = 40: {n_long} rows, which lose {n_all - n_kept} of {n_all} sup" in text
    assert f"supervised: {n_kept:,} of {n_tokens:,} tokens ({n_kept / n_tokens:.1%})" in text
    assert "tiles per row: 0 to 0, mean 0.0" in text


def test_rows_are_spread_over_the_whole_source():
    assert evenly_spaced(10, 4) == [0, 3, 6, 9]
    assert evenly_spaced(3, 16) == [0, 1, 2]
    assert len(evenly_spaced(200_000, 200)) == 200 and evenly_spaced(200_000, 200)[-1] == 199_999


# --- The contact sheet --------------------------------------------------------------------------


def test_tiles_are_arranged_as_in_the_image():
    names = ["row_1_col_1", "row_1_col_2", "row_2_col_1", "row_2_col_2", "global-img"]
    grid = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2)]
    assert arrange_tiles(names) == grid
    assert arrange_tiles(["global-img", *names, "global-img"]) == [
        (0, 0), *((line + 1, column) for line, column in grid), (3, 0)
    ]  # fmt: skip
    assert arrange_tiles([]) == []


def test_tile_spans_cover_the_placeholders(tiled, file):
    tokens = tiled.encode(open_dataset(config(file), "train")[0], 500, 20)
    spans = tile_spans(tokens, tiled)
    assert [name for name, _, _ in spans][:5] == [
        "row_1_col_1", "row_1_col_2", "row_1_col_3", "row_1_col_4", "row_2_col_1"
    ]  # fmt: skip
    assert spans[-1][0] == "global-img" and len(spans) == len(tokens.tiles) == 9
    covered = [at for _, first, last in spans for at in range(first, last + 1)]
    assert covered == np.flatnonzero(tokens.ids == TILED.vlm_image_token_id).tolist()


def test_the_contact_sheet_shows_the_tiles(tiled, file, tmp_path):
    source = open_dataset(config(file), "train")
    shown = [tiled.encode(source[0], 500, 20), tiled.encode(source[2], 500, 20)]
    draw_contact_sheet(shown, tiled, tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("L"))
    side, step = preview.SIDE, preview.SIDE + preview.GAP
    lines = preview.GAP + 24 + np.arange(2) * (preview.SIDE + 46)
    for top in lines:
        for column in range(4):
            at = sheet[top : top + side, preview.GAP + column * step :][:, :side]
            assert (at == (0 if column < 2 else 255)).mean() > 0.9, column
    view = sheet[lines[0] :][:side, preview.GAP + 4 * step :][:, :side]
    assert view[:, : side // 4].max() < 20 and view[:, -side // 4 :].min() > 235
    with pytest.raises(InputError, match=r"contact_sheet = .*x\.nothing: cannot be written"):
        draw_contact_sheet(shown, tiled, tmp_path / "x.nothing")


# --- The command --------------------------------------------------------------------------------


def test_the_command_end_to_end(file, tmp_path):
    sheet = str(tmp_path / "s.png")
    argv = ["-m", "data.preview", str(file), "tiny", "--contact-sheet", sheet, "--n", "2"]
    argv += ["--data.max-length", "50", "--data.val-fraction", "0"]
    done = subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{file}: 2 rows of image + question + answer; 8 rows of question" in done.stdout
    assert "truncated at data.max_length = 50: 4 rows, which lose" in done.stdout
    assert len(re.findall(r"\[\[.*?\]\]", done.stdout, re.S)) == 3  # two samples and the legend
    assert Image.open(tmp_path / "s.png").width > 500


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--n", "0"], "n = 0: must be at least 1"),
        (["--rows", "-1"], "rows = -1: must be at least 1"),
        (["--rows", "abc"], "--rows: invalid literal for int() with base 10: 'abc'; --help"),
        (["--sheat", "x"], "unknown argument '--sheat'"),
        (["--data.max-lenght", "3"], "did you mean --data.max-length?"),
        (["--contact-sheet", "no/such/place.png"], "must be a file in an existing folder"),
        (["tinny"], "did you mean 'tiny'?"),
    ],
)
def test_wrong_flags_have_one_line_errors(file, capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        command(preview.main, [str(file), *argv])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and message in err and err.count("\n") == 1


def test_init_from_selects_the_processor(small_checkpoint, file, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "step-000010").symlink_to(small_checkpoint)
    for folder in (small_checkpoint, run):
        preview.main([str(file), "--train.init-from", str(folder), "--contact-sheet",
                      str(tmp_path / "s.png"), "--n", "1"])  # fmt: skip
        assert "<image> x 4<fake" in capsys.readouterr().out  # 9 with the preset tiny


# --- Before training ----------------------------------------------------------------------------


def test_the_check_summarises_rows(tiled, file):
    cfg = config(file, max_length=250)
    line = check_before_training(open_dataset(cfg, "train"), tiled, cfg)
    assert line.startswith("checked 10 rows: ") and line.endswith("0 rows truncated, 1 unusable")
    assert re.search(r"\d+\.\d% of tokens supervised", line)


def test_rows_without_supervised_tokens_are_printed_and_an_error(tiled, tmp_path, capsys):
    """The question is so long that every answer is truncated."""
    rows = [json.dumps({"question": "why " * 50, "answer": "so"})] * 30
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    cfg = config(tmp_path / "a.jsonl", max_length=40)
    with pytest.raises(InputError) as caught:
        check_before_training(open_dataset(cfg, "train"), tiled, cfg)
    assert str(caught.value).startswith(
        f"{tmp_path / 'a.jsonl'}: none of the 16 checked rows is usable; the first: "
    )
    assert "row 1: no supervised token in the first 40 tokens" in str(caught.value)
    shown = capsys.readouterr().out
    assert "a.jsonl row 1: <|im_start|>User: why why" in shown and "[[ so<end" in shown


def test_train_stops_before_writing_if_no_row_is_usable(run_file, tmp_path, capsys):
    rows = [json.dumps({"question": "why " * 50, "answer": f"so {i}"}) for i in range(30)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    path = run_file(data={"source": str(tmp_path / "a.jsonl"), "max_length": 40})
    with pytest.raises(SystemExit) as stop:
        command(train.main, [str(path)])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "none of the 16 checked rows is usable" in err
    assert not (tmp_path / "run").exists()


def test_train_prints_the_rows_and_the_check(run_file, capsys):
    train.main([str(run_file(steps=1))])
    out = capsys.readouterr().out
    assert "24 rows of image + question + answer; 0 of them for validation" in out
    assert "checked 16 rows: " in out and "0 rows truncated, 0 unusable" in out
