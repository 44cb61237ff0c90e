"""System errors are one line; files are written completely or not at all."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

import cli
import config_tools


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(28, "No space left on device", "a/b.png"), 2, "a/b.png: No space left on device."),
        (OSError("disk on fire"), 2, "disk on fire."),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_system_errors_are_one_line(error, code, message, capsys):
    def main(argv):
        raise error

    with pytest.raises(SystemExit) as caught:
        cli.command(main, [])
    assert caught.value.code == code
    assert capsys.readouterr().err.removeprefix("error: ") == f"{message}\n"


def test_stdin_and_stdout_pass_any_bytes(monkeypatch):
    """File names in old archives are not always UTF-8."""
    stdin, stdout = (io.TextIOWrapper(io.BytesIO(x), "utf-8") for x in (b"caf\xe9\n", b""))
    monkeypatch.setattr("sys.stdin", stdin)
    monkeypatch.setattr("sys.stdout", stdout)
    cli.command(lambda _: print(sys.stdin.read(), end="", flush=True), [])
    assert stdout.buffer.getvalue() == b"caf\xe9\n"


def test_a_list_flag_may_be_given_once():
    """tyro would drop the first of two lists, here a frozen part."""
    for again in (["--train.freeze", "language"], ["--train.freeze=language"]):
        with pytest.raises(
            config_tools.InputError, match=r"--train\.freeze: given 2 times; give it once"
        ):
            cli.parse_run(["tiny", "--train.freeze", "vision", *again])
    cfg = cli.parse_run(["tiny", "--train.freeze", "vision", "language", "--train.steps", "3",
                             "--train.steps", "4"])  # fmt: skip
    assert cfg.train.freeze == ("vision", "language") and cfg.train.steps == 4, (
        "the last value counts"
    )


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    config_tools.write_atomic(path, "old")

    def full(self, text, **options):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        config_tools.write_atomic(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
