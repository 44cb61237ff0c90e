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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import jinja2
import tyro
from PIL import Image

from cli import command, parse
from config_tools import InputError, from_dict, read_json, write_atomic
from configs import PRESETS, RunConfig
from data.images import open_image
from data.preview import describe_rows, evenly_spaced, inspect_row
from data.sources.open import open_dataset
from engine.evaluation import evaluate
from engine.evaluation.evaluate import Answered
from engine.evaluation.metrics import any_exact, exact, per_answer
from engine.figures import style
from engine.figures.curves import draw_accuracies, draw_curves, draw_losses
from engine.inference.attention_overlay import draw_overlays
from engine.inference.chat import Chat
from engine.training import checkpoint
from engine.training.logger import read_log

THUMBNAIL = 120  # longest side, in pixels
N_OVERLAYS = 4  # questions with attention overlays
MAX_TOKENS = 11  # of an answer, with attention overlays
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
        raise InputError(f"expected one or two run folders, got {len(args.runs)}.")
    out = args.out or args.runs[0] / "report.html"
    if out.is_dir() or not out.parent.is_dir():
        raise InputError(f"out = {out}: must be a file in an existing folder.")
    page = write_page([collect(run) for run in args.runs])
    write_atomic(out, page)
    print(f"{out}: {len(page) / 2**20:.1f} MiB, opens in any browser")


def write_page(runs: Sequence[dict]) -> str:
    """Render the HTML page from the results of `collect`."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(PAGE.read_text(encoding="utf-8"))
    rows, defaults = [settings(run["config"]) for run in runs], settings(PRESETS["tiny"])
    differ = {name for row in rows for name in row if len({str(r.get(name)) for r in rows}) > 1}

    def changed(row: dict) -> list[tuple]:
        return [(k, v, k in differ) for k, v in row.items() if v != defaults[k] or k in differ]

    font = inline(style.font_bytes(), "font/ttf")
    return template.render(
        runs=runs, changed=list(map(changed, rows)), all_settings=rows, style=style, font=font
    )


def collect(run: Path) -> dict:
    """Everything the page shows of a run; raises `InputError` if it is not a run folder."""
    if not (run / "config.json").is_file() or not (run / "log.jsonl").is_file():
        raise InputError(f"{run}: not a run folder; expected config.json and log.jsonl.")
    cfg = from_dict(RunConfig, read_json(run / "config.json"), f"{run}/config.json")
    events = read_log(run)
    train = [e for e in events if "loss" in e]
    val = [e for e in events if "val_loss" in e]
    shown = {"name": str(run), "config": cfg, "facts": facts(train, val), "curves": curves(events)}
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
        *[("validation accuracy", f"{100 * e['val_accuracy']:.1f} %") for e in val[-1:]],
        ("tokens/s, median", f"{speeds[len(speeds) // 2]:,.0f}"),
        ("images/s, last", f"{last['images_per_s']:,.1f}"),
        ("waiting for data", f"{100 * sum(e['data_wait'] for e in train) / len(train):.0f} %"),
        ("bad rows", str(last["bad_rows"])),
    ]


def curves(events: list[dict]) -> list[dict]:
    """Plots of the log; raises `InputError` without matplotlib."""

    def values(title: str, prefix: str, is_noisy: bool = True) -> Callable[[Any], None]:
        return lambda figure: draw_curves(figure, events, title, prefix, is_noisy)

    plots: dict[str, Callable[[Any], None]] = {
        "loss": lambda figure: draw_losses(figure, events),
        "accuracy": lambda figure: draw_accuracies(figure, events),
        "gradient norm": values("Gradient norm", "grad_norm"),
        "learning rate": values("Learning rate", "lr_", is_noisy=False),
        "throughput": values("Throughput (tokens/s)", "tokens_per_s"),
    }
    return [plot(name, draw) for name, draw in plots.items()] if events else []


def plot(name: str, draw: Callable[[Any], None]) -> dict:
    """A plot as an SVG data URI; raises `InputError` without matplotlib."""
    text = io.StringIO()
    with style.plotting("a report") as figure_class:
        figure = figure_class(figsize=(6, 3.4))
        draw(figure)
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return {"name": name, "svg": inline(svg[svg.index("<svg") :].encode(), "image/svg+xml")}


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


def overlays_of(chat: Chat, a: Answered) -> dict:
    """The answer, and a sheet of attention overlays for its first tokens, if there is an image."""
    sources = a.item.sample.images
    images = [open_image(source) for source in sources]
    prompt = chat.processor.encode_prompt(a.item.sample.turns[:-1], images)
    ((_, reply),) = chat.generate_replies([prompt])
    shown = {"question": question_of(a), "answer": reply.text, "sheet": "", "width": 0}
    if images and reply.tokens:
        name = sources[0] if isinstance(sources[0], (str, Path)) else a.item.sample.row or "image"
        sheet = draw_overlays(
            chat, prompt, reply.tokens[:MAX_TOKENS], images, str(name), shown["question"]
        )
        shown |= {"sheet": encode(sheet, "JPEG"), "width": sheet.width // 2}
    return shown


def thumbnail(image: Image.Image) -> str:
    """A small copy of an image, as a data URI."""
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return encode(image, "PNG")


def encode(image: Image.Image, file_format: str) -> str:
    """An image as a data URI."""
    data = io.BytesIO()
    image.save(data, file_format, quality=88)
    return inline(data.getvalue(), f"image/{file_format.lower()}")


def inline(content: bytes, media_type: str) -> str:
    """Bytes as a data URI."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


if __name__ == "__main__":
    command(main)
