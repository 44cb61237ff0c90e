"""Guides stay short, and sentences use the field's terms instead of private ones."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
GENERATED = {"docs/reference.md", "docs/speed_tables.md"}  # tables, without a limit
# Word or phrase -> what to write instead. Only what is wrong wherever it stands.
NOT = {
    r"houses?|rooms?|floors|doors?|stairs?|ladders?|rungs?|blueprints?": "module, package, layer",
    r"mouths?|eyes": "vision encoder, language model",
    r"(read|rows) in passing": "stream",
    r"rows are refilled": "continuous batching",
    r"theirs|ours": "transformers' implementation, picoVLM",
    r"narrowed": "cast once",
    r"blocks that run again|runs its blocks again": "activation checkpointing",
    r"for this code alone": "only picoVLM loads it",
    r"has no place for": "does not support",
    r"what must be said": "supervised tokens",
    r"what training never shows": "held-out combinations",
    r"what is then still right|by itself alone": "a plain sentence",
    r"opens? as it is": "loads without conversion",
    r"least - most|least to most": "minimum, maximum",
    r"learned part|part of them is learned": "supervised tokens",
    r"pictures? (token|processor|encoder)s?": "image",
}
TEXTS = (".py", ".md", ".ipynb", ".jinja", ".toml", ".yml", ".yaml", ".cff")


def files() -> list[str]:
    """All texts of the project, as git lists them; this file holds the words."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    names = [name for name in listed.stdout.splitlines() if name.endswith((*TEXTS, "Makefile"))]
    return sorted(name for name in names if (ROOT / name).is_file() and "test_words" not in name)


def wrong_words(text: str) -> list[str]:
    """`line: word, write instead` for every word of NOT in a text."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        for pattern, instead in NOT.items():
            for match in re.finditer(rf"\b({pattern})\b", line, re.I):
                found.append(f"{number}: {match[0]!r}, write: {instead}")
    return found


def test_every_text_uses_the_fields_terms():
    found = [f"{name}:{word}" for name in files()
             for word in wrong_words((ROOT / name).read_text(encoding="utf-8"))]  # fmt: skip
    assert not found, "\n".join(found)


@pytest.mark.parametrize("text, n", [
    ("the eyes of a VLM", 1), ("the demo's room and floors", 2), ("Theirs is slower", 1),
    ("rows are read in passing", 1), ("math.floor, headroom, house_price, a broomstick", 0),
])  # fmt: skip
def test_wrong_words_are_found(text, n):
    assert len(wrong_words(text)) == n


def test_readme_and_guides_are_short():
    limits = {"README.md": 200, "CONTRIBUTING.md": 120}
    limits |= {f"docs/{page.name}": 120 for page in (ROOT / "docs").glob("*.md")}
    for name in GENERATED:
        del limits[name]
    long = {
        name: n for name, limit in limits.items()
        if (n := len((ROOT / name).read_text(encoding="utf-8").splitlines())) > limit
    }  # fmt: skip
    assert not long


def test_every_log_entry_is_in_the_index():
    """Newest first, each with the title of its file."""
    index = (ROOT / "docs/log/README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^- \[(.+)\]\((.+)\)$", index, re.M)
    entries = {p.name: p.read_text(encoding="utf-8").split("\n")[0].removeprefix("# ")
               for p in (ROOT / "docs/log").glob("2*.md")}  # fmt: skip
    assert {name: title for title, name in listed} == entries
    dates = [name[:10] for _, name in listed]
    assert dates == sorted(dates, reverse=True)
    for title, name in listed:
        assert re.fullmatch(r"\d{4}-\d\d-\d\d-[a-z0-9-]+\.md", name) and title[:10] == name[:10]


def test_every_link_between_pages_exists():
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)
        for link in re.findall(r"\]\((?!http|#)([^)#]+)(?:#[^)]*)?\)", text):
            assert (path.parent / link).exists(), f"{path}: {link}"
