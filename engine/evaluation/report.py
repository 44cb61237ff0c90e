"""One web page about a run, or two side by side: a single file that needs no network.

python -m engine.evaluation.report runs/demo
python -m engine.evaluation.report runs/demo runs/other --out compared.html

Settings, curves, accuracy per skill, answers as they changed, where the model looks, the data,
speed and scores with their intervals. Not here: what is measured (evaluation.py, score.py).
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import jinja2
import tyro
from PIL import Image

from cli import command, parse
from config_tools import InputError, from_dict, read_json, write_whole
from configs import PRESETS, RunConfig
from data.images import open_image
from data.preview import look as look_at_row
from data.preview import report as describe_rows
from data.preview import spread
from data.sources.open import open_source
from engine.evaluation.evaluate import Answered, askable, firsts, graded
from engine.evaluation.metrics import any_exact, each, exact
from engine.inference.attention_overlay import (
    attention_overlay,
    over_picture,
    paint,
    split_pictures,
)
from engine.inference.chat import Chat
from engine.training import checkpoint
from engine.training.logger import read_log

THUMB, LOOKS, ROWS = 120, 4, 100  # pixels; questions with maps; rows looked at for the summary
PAGE = Path(__file__).with_name("report.html.jinja")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Write one web page about one run, or two side by side."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders."""
    out: Path | None = None
    """Where the page goes; by default report.html in the first run's folder."""


def main(argv: list[str]) -> None:
    args = parse(Arguments, argv)
    if not 1 <= len(args.runs) <= 2:
        raise InputError(f"{len(args.runs)} run folders: name one or two.")
    out = args.out or args.runs[0] / "report.html"
    if out.is_dir() or not out.parent.is_dir():
        raise InputError(f"out = {out}: must be a file in a folder that exists.")
    page = write_page([about(run) for run in args.runs])
    write_whole(out, page)
    print(f"{out}: {len(page) / 2**20:.1f} MiB, opens in any browser")


def write_page(runs: Sequence[dict]) -> str:
    """The HTML of what `about` found."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(PAGE.read_text(encoding="utf-8"))
    rows = [settings(run["config"]) for run in runs]
    differ = {name for row in rows for name in row if len({str(r.get(name)) for r in rows}) > 1}
    usual = settings(PRESETS["tiny"])
    changed = [
        [(k, v, k in differ) for k, v in row.items() if v != usual[k] or k in differ]
        for row in rows
    ]
    return template.render(runs=runs, changed=changed, all_settings=rows)


def about(run: Path) -> dict:
    """Everything the page shows of one run. Raises `InputError` where it is none."""
    if not (run / "config.json").is_file() or not (run / "log.jsonl").is_file():
        raise InputError(f"{run}: not a run folder; it has no config.json and log.jsonl.")
    cfg = from_dict(RunConfig, read_json(run / "config.json"), f"{run}/config.json")
    events = read_log(run)
    train = [e for e in events if "loss" in e]
    val = [e for e in events if "val_loss" in e]
    return {
        "name": str(run),
        "config": cfg,
        "facts": facts(train, val),
        "curves": [curve(*c) for c in curves(train, val)],
        "data": describe(cfg, run),
        "scores": scores(run),
        **shown(run, cfg, val),
    }


# --- Settings and figures -------------------------------------------------------------------------


def settings(cfg: RunConfig) -> dict[str, object]:
    """Every field by its flag's name."""
    return {f"{part}.{k}": v for part, values in asdict(cfg).items() for k, v in values.items()}


def facts(train: list[dict], val: list[dict]) -> list[tuple[str, str]]:
    """The run in a few numbers."""
    if not train:
        return [("steps", "0")]
    last = train[-1]
    seconds = sum(max(0.0, b["seconds"] - a["seconds"]) for a, b in zip(train, train[1:]))
    speeds = sorted(e["tokens_per_s"] for e in train)
    found = [
        ("steps", f"{last['step']:,}"),
        ("minutes between first and last log line", f"{seconds / 60:.1f}"),
        ("training loss", f"{last['loss']:.3f}"),
        ("tokens/s, median", f"{speeds[len(speeds) // 2]:,.0f}"),
        ("pictures/s, last", f"{last['images_per_s']:,.1f}"),
        ("waited for data", f"{sum(e['data_wait'] for e in train) / len(train):.0%}"),
        ("bad rows", str(last["bad_rows"])),
    ]
    if val:
        found.insert(3, ("validation loss", f"{val[-1]['val_loss']:.3f}"))
        found.insert(4, ("validation accuracy", f"{val[-1]['val_accuracy']:.1%}"))
    return found


def curves(train: list[dict], val: list[dict]) -> list[tuple]:
    """(title, y axis, lines by name, whether the y axis is logarithmic)."""

    def points(events: list[dict], key: str) -> list[tuple]:
        return [(e["step"], e[key]) for e in events if key in e]

    other = {"val_loss", "val_answers", "val_left_out", "val_problem"}
    skills = sorted({k for e in val for k in e if k.startswith("val_")} - other)
    return [
        ("Loss", "per token", {"training": points(train, "loss"),
                               "validation": points(val, "val_loss")}, True),
        ("Accuracy per skill", "validation", {k[4:]: points(val, k) for k in skills}, False),
        ("Throughput", "tokens/s", {"": points(train, "tokens_per_s")}, False),
    ]  # fmt: skip


def curve(title: str, label: str, lines: dict[str, list], log: bool) -> dict:
    """A picture in SVG. Raises `InputError` without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("a report needs matplotlib: run `pip install matplotlib`.") from None
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.4), constrained_layout=True)
    for i, (name, points) in enumerate(lines.items()):
        if points:
            style = {"accuracy": dict(lw=3, color="black")}.get(name, dict(lw=1.2))
            mark = "o" if len(points) < 30 else None
            axis.plot(*zip(*points), label=name, marker=mark, ms=3,
                      ls="-" if i < 10 else "--", **style)  # fmt: skip
    axis.set(xlabel="step", ylabel=label, yscale="log" if log and any(lines.values()) else "linear")
    axis.grid(alpha=0.3)
    if len(lines) > 1 and any(lines.values()):
        axis.legend(fontsize=7, ncols=2)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    plt.close(figure)
    svg = text.getvalue()
    return {"title": title, "svg": inline(svg[svg.index("<svg") :].encode(), "svg+xml")}


def scores(run: Path) -> list[dict]:
    """What score.py --json wrote into the run's folder."""
    found = []
    for path in sorted(run.glob("*.json")):
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
        if is_score(values) and all(map(is_score, values.get("skills", {}).values())):
            found.append({"file": path.name, "rows": values["skills"] | {"all": values}})
    return found


def is_score(values: object) -> bool:
    needed = {"accuracy", "interval", "n", "seen", "unseen"}
    return isinstance(values, dict) and needed <= set(values)


def describe(cfg: RunConfig, run: Path) -> str:
    """What the run's data holds, as data.preview says it; or why that cannot be said."""
    try:
        source = open_source(cfg.data, "train")
        processor = Chat.load(run).processor
        seen = [look_at_row(source, processor, cfg.data, i) for i in spread(len(source), ROWS)]
        return describe_rows(source, seen, cfg.data)
    except InputError as error:
        return f"not available: {error}"


# --- Answers and maps -----------------------------------------------------------------------------


def shown(run: Path, cfg: RunConfig, val: list[dict]) -> dict:
    """Answers of every evaluation to the same questions, and where the newest checkpoint looks."""
    empty = {"answers": [], "steps": [], "looks": []}
    try:
        if not checkpoint.folders(run):
            return empty | {"why": f"{run}: no checkpoint yet."}
        chat = Chat.load(run)
        asked, _ = askable(chat.processor, cfg.data, cfg.train.eval_samples)
        chosen = firsts(graded(asked, [""] * len(asked), each(any_exact)))
        logged = [e for e in val if len(e.get("val_answers", ())) == len(chosen)]
        answers = [
            {
                "question": question_of(a),
                "expected": a.item.expected,
                "picture": thumbnail(a),
                "said": [(e["val_answers"][i], exact(e["val_answers"][i], a.item.expected))
                         for e in logged],
            }
            for i, a in enumerate(chosen)
        ]  # fmt: skip
        looks = [maps_of(chat, a) for a in chosen[-LOOKS:]]
        return {"answers": answers, "steps": [e["step"] for e in logged], "looks": looks}
    except InputError as error:
        return empty | {"why": str(error)}


def question_of(a: Answered) -> str:
    return a.item.question.replace("<image>", "")


def thumbnail(a: Answered) -> str:
    if not a.item.sample.images:
        return ""
    picture = open_image(a.item.sample.images[0])
    picture.thumbnail((THUMB, THUMB))
    return as_uri(picture)


def maps_of(chat: Chat, a: Answered, most: int = 12) -> dict:
    """The answer, and for each of its first tokens a painted picture."""
    pictures = [open_image(image) for image in a.item.sample.images]
    prompt = chat.processor.encode_prompt(a.item.sample.turns[:-1], pictures)
    ((_, reply),) = chat.replies([prompt])
    painted = []
    if pictures:
        seen = attention_overlay(chat, prompt, reply.tokens)
        tiles, cut = split_pictures(chat, pictures)[0]
        for t, token in enumerate(reply.tokens[:most]):
            word = chat.processor.tokenizer.decode([token], skip_special_tokens=True)
            view = paint(pictures[0], over_picture(seen.maps[t, tiles], *cut))
            view.thumbnail((THUMB, THUMB))
            painted.append((word.strip() or "(end)", as_uri(view)))
    return {"question": question_of(a), "answer": reply.text, "painted": painted}


def as_uri(picture: Image.Image) -> str:
    data = io.BytesIO()
    picture.save(data, "PNG")
    return inline(data.getvalue(), "png")


def inline(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


if __name__ == "__main__":
    command(main)
