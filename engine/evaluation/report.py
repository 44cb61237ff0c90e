"""One web page about a run, or two side by side: a single file that needs no network.

python -m engine.evaluation.report runs/demo
python -m engine.evaluation.report runs/demo runs/other --out compared.html

The page has settings, curves, accuracy per skill, answers over time, attention overlays, the data,
speed, and scores with intervals. Not here: the evaluation itself (evaluate.py, score.py).
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
from config_tools import InputError, from_dict, import_optional, read_json, write_atomic
from configs import PRESETS, RunConfig
from data.images import open_image
from data.preview import describe_rows, evenly_spaced, inspect_row
from data.sources.open import open_dataset
from engine.evaluation import evaluate
from engine.evaluation.evaluate import Answered
from engine.evaluation.metrics import any_exact, exact, per_answer
from engine.inference import attention_overlay as overlays
from engine.inference.chat import Chat
from engine.training import checkpoint
from engine.training.logger import read_log

THUMBNAIL = 120  # longest side, in pixels
N_OVERLAYS = 4  # questions with attention overlays
N_ROWS = 100  # rows that the data summary reads
PAGE = Path(__file__).with_name("report.html.jinja")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Write one web page about one run, or two side by side."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders."""
    out: Path | None = None
    """HTML file to write; default: report.html in the first run folder."""


def main(argv: list[str]) -> None:
    args = parse(Arguments, argv)
    if not 1 <= len(args.runs) <= 2:
        raise InputError(f"{len(args.runs)} run folders: name one or two.")
    out = args.out or args.runs[0] / "report.html"
    if out.is_dir() or not out.parent.is_dir():
        raise InputError(f"out = {out}: must be a file in a folder that exists.")
    page = write_page([collect(run) for run in args.runs])
    write_atomic(out, page)
    print(f"{out}: {len(page) / 2**20:.1f} MiB, opens in any browser")


def write_page(runs: Sequence[dict]) -> str:
    """The HTML page of what `collect` returned for each run."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(PAGE.read_text(encoding="utf-8"))
    rows, defaults = [settings(run["config"]) for run in runs], settings(PRESETS["tiny"])
    differ = {name for row in rows for name in row if len({str(r.get(name)) for r in rows}) > 1}

    def changed(row: dict) -> list[tuple]:
        return [(k, v, k in differ) for k, v in row.items() if v != defaults[k] or k in differ]

    return template.render(runs=runs, changed=list(map(changed, rows)), all_settings=rows)


def collect(run: Path) -> dict:
    """Everything the page shows of a run; raises `InputError` if it is not a run folder."""
    if not (run / "config.json").is_file() or not (run / "log.jsonl").is_file():
        raise InputError(f"{run}: not a run folder, as it has no config.json and log.jsonl.")
    cfg = from_dict(RunConfig, read_json(run / "config.json"), f"{run}/config.json")
    events = read_log(run)
    train = [e for e in events if "loss" in e]
    val = [e for e in events if "val_loss" in e]
    plots = [curve(*c) for c in curves(train, val)]
    shown = {"name": str(run), "config": cfg, "facts": facts(train, val), "curves": plots}
    shown |= {"data": describe(cfg, run), "scores": scores(run)}
    return shown | answers_section(run, cfg, val)


# --- Settings and figures -------------------------------------------------------------------------


def settings(cfg: RunConfig) -> dict[str, object]:
    """Every field of the config, by the name of its flag."""
    return {f"{part}.{k}": v for part, values in asdict(cfg).items() for k, v in values.items()}


def facts(train: list[dict], val: list[dict]) -> list[tuple[str, str]]:
    """(name, value) of the main figures of a run."""
    if not train:
        return [("steps", "0")]
    last = train[-1]
    seconds = sum(max(0.0, b["seconds"] - a["seconds"]) for a, b in zip(train, train[1:]))
    speeds = sorted(e["tokens_per_s"] for e in train)
    return [
        ("steps", f"{last['step']:,}"),
        ("minutes from first to last log line", f"{seconds / 60:.1f}"),
        ("training loss", f"{last['loss']:.3f}"),
        *[("validation loss", f"{e['val_loss']:.3f}") for e in val[-1:]],
        *[("validation accuracy", f"{e['val_accuracy']:.1%}") for e in val[-1:]],
        ("tokens/s, median", f"{speeds[len(speeds) // 2]:,.0f}"),
        ("images/s, last", f"{last['images_per_s']:,.1f}"),
        ("waiting for data", f"{sum(e['data_wait'] for e in train) / len(train):.0%}"),
        ("bad rows", str(last["bad_rows"])),
    ]


def curves(train: list[dict], val: list[dict]) -> list[tuple]:
    """(title, label of the y axis, points by name, whether the y axis is logarithmic)."""

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
    """A plot as an SVG data URI; raises `InputError` without matplotlib."""
    plt = import_optional("matplotlib.pyplot", "a report")
    plt.switch_backend("agg")
    figure, axis = plt.subplots(figsize=(6, 3.4), constrained_layout=True)
    for i, (name, points) in enumerate(lines.items()):
        if points:
            style = dict(lw=3, color="black") if name == "accuracy" else dict(lw=1.2)
            style |= dict(marker="o" if len(points) < 30 else None, ls="-" if i < 10 else "--")
            axis.plot(*zip(*points), label=name, ms=3, **style)
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
    """Results of score.py --json in the run folder."""
    needed, scores = {"accuracy", "interval", "n", "seen", "unseen"}, []

    def is_score(values: object) -> bool:
        return isinstance(values, dict) and needed <= set(values)

    for path in sorted(run.glob("*.json")):
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
        if is_score(values) and all(map(is_score, values.get("skills", {}).values())):
            scores.append({"file": path.name, "rows": values["skills"] | {"all": values}})
    return scores


def describe(cfg: RunConfig, run: Path) -> str:
    """The summary of data.preview for the run's data, or the error that prevents it."""
    try:
        source = open_dataset(cfg.data, "train")
        processor = Chat.load(run).processor
        indices = evenly_spaced(len(source), N_ROWS)
        seen = [inspect_row(source, processor, cfg.data, i) for i in indices]
        return describe_rows(source, seen, cfg.data)
    except InputError as error:
        return f"not available: {error}"


# --- Answers and overlays -------------------------------------------------------------------------


def answers_section(run: Path, cfg: RunConfig, val: list[dict]) -> dict:
    """Logged answers to the same questions, and attention overlays of the newest checkpoint."""
    empty = {"answers": [], "steps": [], "overlays": []}
    try:
        if not checkpoint.list_checkpoints(run):
            return empty | {"error": f"{run}: no checkpoint yet."}
        chat = Chat.load(run)
        n, metric = cfg.train.eval_samples, per_answer(any_exact)
        items, _ = evaluate.load_answerable_items(chat.processor, cfg.data, n)
        unanswered = evaluate.score_answers(items, [""] * len(items), metric)
        examples = evaluate.select_examples(unanswered)
        logged = [e for e in val if len(e.get("val_answers", ())) == len(examples)]
        answers = [
            {
                "question": question_of(a),
                "expected": a.item.expected,
                "image": "".join(thumbnail(open_image(x)) for x in a.item.sample.images[:1]),
                "logged": [(e["val_answers"][i], exact(e["val_answers"][i], a.item.expected))
                           for e in logged],
            }
            for i, a in enumerate(examples)
        ]  # fmt: skip
        shown = [overlays_of(chat, a) for a in examples[-N_OVERLAYS:]]
        return {"answers": answers, "steps": [e["step"] for e in logged], "overlays": shown}
    except InputError as error:
        return empty | {"error": str(error)}


def question_of(a: Answered) -> str:
    """The question without image placeholders."""
    return a.item.question.replace("<image>", "")


def overlays_of(chat: Chat, a: Answered, max_tokens: int = 12) -> dict:
    """The answer, and an attention overlay of the first image for each of its first tokens."""
    images = [open_image(image) for image in a.item.sample.images]
    prompt = chat.processor.encode_prompt(a.item.sample.turns[:-1], images)
    ((_, reply),) = chat.generate_replies([prompt])
    tokens = []
    if images:
        overlay = overlays.attention_overlay(chat, prompt, reply.tokens)
        tiles, grid = overlays.split_tiles(chat, images)[0]
        for t, token in enumerate(reply.tokens[:max_tokens]):
            word = chat.processor.tokenizer.decode([token], skip_special_tokens=True)
            heat = overlays.merge_tile_maps(overlay.maps[t, tiles], *grid)
            view = thumbnail(overlays.paint_heatmap(images[0], heat))
            tokens.append((word.strip() or "(end)", view))
    return {"question": question_of(a), "answer": reply.text, "tokens": tokens}


def thumbnail(image: Image.Image) -> str:
    """A small copy of an image, as a PNG data URI."""
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    data = io.BytesIO()
    image.save(data, "PNG")
    return inline(data.getvalue(), "png")


def inline(content: bytes, kind: str) -> str:
    """Bytes of an image format as a data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


if __name__ == "__main__":
    command(main)
