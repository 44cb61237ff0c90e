"""Texts fit their width, plots have the shared font, and matplotlib stays as it was."""

from __future__ import annotations

import sys

import pytest

from config_tools import InputError
from engine.figures import style
from engine.figures.style import ELLIPSIS, font_for, plotting, shorten, shorten_path, wrap

TEXTS = ("", "short", "a longer text that does not fit", "x" * 500, "Ωü😀\x00", "漢字" * 60)


def width_of(text: str) -> float:
    return font_for(text, 24).getlength(text)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("width", [60, 300])
def test_every_text_fits(text, width):
    for short in (shorten(text, width, 24), shorten_path(text, width, 24)):
        assert width_of(short) <= width
        assert short == text or ELLIPSIS in short
    lines = wrap(text, width, 24, 3)
    assert len(lines) <= 3 and all(width_of(line) <= width for line in lines)
    if ELLIPSIS not in lines[-1]:
        assert "".join(lines).replace(" ", "") == "".join(text.split())


def test_a_path_keeps_its_end():
    path = "/some/folder/with/a/long/name/cat.png"
    assert shorten_path(path, 150, 24) == "…/cat.png"
    assert shorten_path("x" * 50 + ".png", 150, 24).endswith("xx.png")
    assert shorten_path("cat.png", 220, 24) == "cat.png"


def test_wrapping_breaks_at_spaces():
    assert wrap("How many orange things are there?", 200, 24, 4) == [
        "How many", "orange things are", "there?"
    ]  # fmt: skip
    assert wrap("one two three four five six", 120, 24, 2)[-1].endswith(ELLIPSIS)


def test_matplotlib_adds_the_letters_that_the_font_lacks():
    assert font_for("cat … “x”", 20).getname()[0] == style.FONT
    pytest.importorskip("matplotlib")
    assert font_for("ü", 20).getname()[0] == "DejaVu Sans"


def test_without_matplotlib_other_letters_are_no_error(monkeypatch):
    style._font.cache_clear()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert font_for("ü", 20).getname()[0] == style.FONT
    style._font.cache_clear()
    with pytest.raises(InputError, match="a plot needs the package matplotlib"):
        with plotting("a plot"):
            pass


def test_matplotlib_has_the_style_within_the_block_only(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    from matplotlib.font_manager import fontManager

    with plotting("a test"):
        pass  # adds the font, once per process
    before, n_fonts = dict(matplotlib.rcParams), len(fontManager.ttflist)
    for _ in range(2):
        with plotting("a plot") as figure_class:
            assert fontManager.findfont(style.FONT, fallback_to_default=False)
            figure = figure_class()
            figure.suptitle("1, 2, 3")
            figure.savefig(tmp_path / "a.png")
    assert dict(matplotlib.rcParams) == before and len(fontManager.ttflist) == n_fonts
