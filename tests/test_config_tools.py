"""What goes wrong on the machine is one line; what is written is whole."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

import cli
import config_tools


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(28, "No space left on device", "a/b.png"), 2, "a/b.png: No space left on device."),
        (OSError("disk on fire"), 2, "disk on fire."),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_the_machine_refuses_is_one_line(error, code, said, capsys):
    def main(argv):
        raise error

    with pytest.raises(SystemExit) as caught:
        cli.command(main, [])
    assert caught.value.code == code
    assert capsys.readouterr().err.removeprefix("error: ") == f"{said}\n"


def test_names_of_any_bytes_pass(monkeypatch):
    """As of files in old archives."""
    heard, said = (io.TextIOWrapper(io.BytesIO(x), "utf-8") for x in (b"caf\xe9\n", b""))
    monkeypatch.setattr("sys.stdin", heard)
    monkeypatch.setattr("sys.stdout", said)
    cli.command(lambda _: print(sys.stdin.read(), end="", flush=True), [])
    assert said.buffer.getvalue() == b"caf\xe9\n"


def test_a_list_is_given_once():
    """Of two, the first would be dropped: here, what was to be frozen."""
    for again in (["--train.freeze", "language"], ["--train.freeze=language"]):
        with pytest.raises(
            config_tools.InputError, match=r"--train\.freeze: given 2 times; put all"
        ):
            cli.parse_run(["tiny", "--train.freeze", "vision", *again])
    cfg = cli.parse_run(["tiny", "--train.freeze", "vision", "language", "--train.steps", "3",
                             "--train.steps", "4"])  # fmt: skip
    assert cfg.train.freeze == ("vision", "language") and cfg.train.steps == 4, "the last of one"


def test_a_file_is_written_whole_or_left_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    config_tools.write_atomic(path, "old")

    def full(self, text, **options):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        config_tools.write_atomic(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
