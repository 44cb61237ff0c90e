"""Flags and presets become configs; errors are one sentence."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest

import classify
import cli
import config_tools
import configs
import embed
import score
from cli import flags, parse_run
from config_tools import InputError, to_dict
from configs import (
    PRESETS,
    RunConfig,
    TrainConfig,
    VLMConfig,
)
from configs_classify import ClassifyConfig

# --- Command line -------------------------------------------------------------------------------


def test_presets_and_flags():
    assert parse_run([]) == parse_run(["tiny"]) == PRESETS["tiny"]
    assert parse_run(["--train.steps", "7"]).train.steps == 7
    flags = "--train.steps 7 --data.no-packing --model.vit-image-mean 0.1 0.2 0.3"
    flags += " --train.freeze vision language --model.lm-head-dim 64 --train.optimizer muon"
    run, want = parse_run(["222m", *flags.split()]), PRESETS["222m"]
    assert run == RunConfig(
        model=replace(want.model, vit_image_mean=(0.1, 0.2, 0.3), lm_head_dim=64),
        data=replace(want.data, packing=False),
        train=replace(want.train, steps=7, freeze=("vision", "language"), optimizer="muon"),
    )
    assert PRESETS["222m"].train.steps == 40000


def test_a_json_file_and_flags(tmp_path):
    saved = replace(PRESETS["460m"], train=TrainConfig(steps=11, lr_muon=0.5))
    path = tmp_path / "run.json"
    path.write_text(json.dumps(to_dict(saved)))
    assert parse_run([str(path)]) == saved
    run = parse_run([str(path), "--train.resume", "auto", "--data.batch-size", "3"])
    assert run.train == replace(saved.train, resume="auto")
    assert run.data == replace(saved.data, batch_size=3) and run.model == saved.model
    path.write_text('{"train": {"stepz": 1}}')
    with pytest.raises(InputError, match=r"run\.json\.train: unknown field 'stepz'"):
        parse_run([str(path)])
    with pytest.raises(InputError, match="no such file"):
        parse_run([str(tmp_path / "none.json")])


def test_a_mistyped_preset_names_the_nearest():
    with pytest.raises(InputError, match=r"'tinny' is neither .*did you mean 'tiny'"):
        parse_run(["tinny"])
    with pytest.raises(InputError, match="presets are tiny, tiny-long, portable, 222m"):
        parse_run(["zzzzzz"])


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--train.stepz 3", "--train.steps"),
        ("--train.steps many", "--train.steps"),
        ("--train.optimizer sgd", "adamw"),
        ("--data.batch-size 0", "batch_size = 0: must be greater than 0"),
        ("--model.max-img-size 50", "max_img_size = 50"),
        ("--train.steps", "--train.steps"),
        ("again", "again"),
    ],
)
def test_a_bad_flag_exits_with_2_and_is_named(flags, message, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.command(parse_run, ["tiny", *flags.split()])
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert message in " ".join((output.out + output.err).replace("│", " ").split())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("--data.world-first=3", "--data.world-captions-first"),
        ("--data.world_described", "--data.world-caption-fraction"),
        ("--data.world-shapes", "--data.world-min-shapes"),
        ("--train.answers-every", "--train.answer-sheet-every"),
    ],
)
def test_a_renamed_flag_names_the_new_one(old, new):
    with pytest.raises(InputError, match=rf"is now {new}; use the new name"):
        parse_run(["tiny", old, "1"])


def test_new_names_of_renamed_flags_and_subcommands_exist():
    known = {*flags(RunConfig), *flags(ClassifyConfig), *classify.COMMANDS}
    known |= {*flags(score.Arguments), *flags(embed.Search)}
    assert not known & set(cli.RENAMED_FLAGS)
    names = {name for names in cli.RENAMED_FLAGS.values() for name in names}
    for new in config_tools.RENAMED.values():
        flag = new.replace("_", "-")
        assert {f"--data.{flag}", f"--train.{flag}"} & names & known, new
    for script, argv, new in (
        (score.main, ["x", "--sheet", "a.png"], "--sheet is now --answer-sheet"),
        (embed.main, ["search", "x", "--sheet", "a.png"], "--sheet is now --contact-sheet"),
        (
            classify.main,
            ["train", "--data.erase", "1"],
            "--data.erase is now --data.random-erasing",
        ),
        (classify.main, ["look", "x"], "look is now rollout"),
    ):
        with pytest.raises(InputError, match=new):
            script(argv)


@pytest.mark.parametrize("script, parts", [
    (cli.parse_run, "model, data, train"), (cli.parse_classify, "model, data, train"),
])  # fmt: skip
def test_help_for_an_unknown_part_names_the_parts(script, parts):
    with pytest.raises(InputError, match=f"--help modle: must be one of {parts}"):
        script(["--help", "modle"])


def test_help_among_other_flags(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_run(["tiny", "--help", "--train.steps", "3"])
    assert stop.value.code == 0 and "--data.source" in capsys.readouterr().out


def test_model_fields_are_found_in_every_spelling():
    argv = ["--model.lm-n-blocks", "3", "--model.no_vit_qkv_bias", "--model.vit_dropout=0.1"]
    assert cli.model_fields_of(argv) == ["lm_n_blocks", "vit_qkv_bias", "vit_dropout"]


def docstrings(cls: type) -> dict[str, str]:
    """Field -> the string under it, read from the source."""
    body = ast.parse(inspect.getsource(cls)).body[0].body
    return {
        field.target.id: " ".join(ast.literal_eval(below.value).split())
        for field, below in zip(body, body[1:])
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr)
    }


def test_help_shows_every_field_with_its_docstring():
    """`--help` has data and training, `--help model` the model."""
    environment = os.environ | {"COLUMNS": "400", "NO_COLOR": "1"}
    pages = []
    for words in (["--help"], ["--help", "model"]):
        out = subprocess.run(
            [sys.executable, "train.py", "tiny", *words],
            capture_output=True, text=True, env=environment, cwd=configs.__file__[:-10],
        )  # fmt: skip
        assert out.returncode == 0, out.stderr
        pages.append(" ".join(re.sub("[│─╭╮╰╯]", " ", out.stdout).split()))
    assert "--model." not in pages[0] and "--help model" in pages[0]
    assert "--data." not in pages[1] and "--train." not in pages[1]
    shown = " ".join(pages)
    fields = set()
    parts = {
        "model": (configs.ViTConfig, configs.LMConfig, configs.ProjectorConfig, VLMConfig),
        "data": (configs.DataConfig,),
        "train": (configs.LoopConfig, configs.TrainConfig),
    }
    for part, classes in parts.items():
        for cls in classes:
            documented = docstrings(cls)
            own = set(cls.__annotations__)
            assert set(documented) == own, f"{cls.__name__}: {own - set(documented)} undocumented"
            for name, words in documented.items():
                flag = f"--{part}.{name.replace('_', '-')}"
                assert flag in shown, flag
                assert words in shown, f"{flag}: {words}"
                fields.add((part, name))
    assert len(fields) == sum(
        len(dataclasses.fields(c)) for c in (VLMConfig, configs.DataConfig, configs.TrainConfig)
    )


def test_a_wrong_input_is_one_line_and_exit_code_2(capsys):
    def main(argv):
        raise InputError(f"bad {argv[0]}.")

    with pytest.raises(SystemExit) as caught:
        cli.command(main, ["thing"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: bad thing.\n"
    with pytest.raises(ZeroDivisionError):  # unexpected exceptions keep their traceback
        cli.command(lambda argv: 1 / 0, [])
