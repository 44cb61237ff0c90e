"""Style of all figures: colors, the font, and texts that fit their place.

Sheets, plots and the report share one font, Aileron. Pillow contains it, so sheets do not need
matplotlib. Not here: the figures (curves.py, heatmaps.py, sheet.py).
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Generator
from functools import cache
from pathlib import Path
from typing import Any

from PIL import ImageFont

from config_tools import import_optional

INK, MUTED, PALE, RULE, PAPER = "#222222", "#666666", "#bbbbbb", "#e6e6e6", "#ffffff"
# Okabe and Ito's palette, which color-blind readers can tell apart.
BLUE, ORANGE, GREEN, PURPLE, SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, SKY)
RIGHT, WRONG = "#00734f", "#b3400a"  # GREEN and ORANGE, dark enough for text
FONT = "Aileron"
ELLIPSIS = "…"
LETTERS = {*map(chr, range(0x20, 0x7F)), *"…‘’“”«»°±·"}  # that the font has

MATPLOTLIB = {
    "font.family": [FONT, "DejaVu Sans"],  # the second for characters that the first lacks
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.labelcolor": MUTED,
    "axes.edgecolor": "#999999",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": False,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": "#999999",
    "ytick.color": "#999999",
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "text.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "figure.constrained_layout.use": True,
    "savefig.dpi": 200,
}


@cache
def font_bytes() -> bytes:
    """The font file that Pillow contains."""
    font: Any = ImageFont.load_default(10)
    return font.path.getvalue()  # a BytesIO


@cache
def font_folder() -> tempfile.TemporaryDirectory:
    """A folder with the font as a file, which matplotlib needs; deleted when Python exits."""
    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    Path(folder.name, f"{FONT}.ttf").write_bytes(font_bytes())
    return folder


@cache
def _font(size: int, has_other_letters: bool) -> ImageFont.FreeTypeFont:
    if has_other_letters:
        with contextlib.suppress(ImportError, OSError):
            from matplotlib import get_data_path

            return ImageFont.truetype(Path(get_data_path(), "fonts/ttf/DejaVuSans.ttf"), size)
    font: Any = ImageFont.load_default(size)
    return font


def font_for(text: str, size: int) -> ImageFont.FreeTypeFont:
    """The font of a text; matplotlib's, if installed, for letters that Pillow's font lacks."""
    return _font(size, not LETTERS.issuperset(text))


def shorten(text: str, width: float, size: int) -> str:
    """Shorten a text to `width` pixels with an ellipsis at its end."""
    font = font_for(text, size)
    if font.getlength(text) <= width:
        return text
    n = min(len(text), int(width))
    while n and font.getlength(text[:n].rstrip() + ELLIPSIS) > width:
        n -= 1
    return text[:n].rstrip() + ELLIPSIS


def shorten_path(path: str, width: float, size: int) -> str:
    """Shorten a path to `width` pixels with an ellipsis at its start, where possible at a slash."""
    font = font_for(path, size)
    if font.getlength(path) <= width:
        return path
    end = path[-int(width) :]
    while end and font.getlength(ELLIPSIS + end) > width:
        end = end[1:]
    return ELLIPSIS + end[max(0, end.find("/")) :]


def split_word(word: str, width: float, font: ImageFont.FreeTypeFont) -> list[str]:
    """Cut a word into parts of at most `width` pixels, for example text without spaces."""
    parts = [word]
    while len(parts[-1]) > 1 and font.getlength(parts[-1]) > width:
        rest = parts.pop()
        n = next((n for n in range(2, len(rest)) if font.getlength(rest[:n]) > width), len(rest))
        parts += [rest[: n - 1], rest[n - 1 :]]
    return parts


def wrap(text: str, width: float, size: int, max_lines: int) -> list[str]:
    """Break a text into lines of at most `width` pixels; the last one may end in an ellipsis."""
    text = text[: max_lines * int(width)]  # more would not fit, as a letter is wider than a pixel
    font, lines = font_for(text, size), [""]
    words = [part for word in text.split() for part in split_word(word, width, font)]
    for i, word in enumerate(words):
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        elif len(lines) < max_lines:
            lines.append(word)
        else:
            lines[-1] = shorten(" ".join([lines[-1], *words[i:]]), width, size)
            break
    return lines


@contextlib.contextmanager
def plotting(user: str) -> Generator[Any]:
    """Give matplotlib this style within a `with` block, which gets the class `Figure`.

    Raises `InputError` if matplotlib is missing; `user` is what needs it.
    """
    matplotlib = import_optional("matplotlib", user)
    cycler = import_optional("cycler", user).cycler
    fonts = import_optional("matplotlib.font_manager", user).fontManager
    file = str(Path(font_folder().name, f"{FONT}.ttf"))
    if all(font.fname != file for font in fonts.ttflist):
        fonts.addfont(file)
    with matplotlib.rc_context(MATPLOTLIB | {"axes.prop_cycle": cycler(color=PALETTE)}):
        yield import_optional("matplotlib.figure", user).Figure
