"""Score a checkpoint on a task, shared among processes and resumable; format the result.

Not here: questions, answers and figures (evaluate.py), the predictions file (predictions.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from engine.evaluation import evaluate
from engine.evaluation.evaluate import VIEWS, Answered, Item
from engine.evaluation.metrics import Metric
from engine.evaluation.predictions import Answers, read_answers, record_answers
from engine.inference.chat import Chat
from engine.training.distributed import Dist

YES_NO_FIGURES = ("precision", "recall", "f1", "yes_ratio")
LEGEND = "blind: blank image; shuffled: another question's image"
LEGEND_WORLD = "unseen: combinations that training never contains; "


def answer_all(
    chat: Chat, questions: Sequence[Item], dist: Dist, by: str, predictions: Path | None,
    run: str, max_tiles: int, max_new_tokens: int,
) -> Answers:  # fmt: skip
    """Answer all open questions in all views; every process answers a share of them.

    `by` is generation or likelihood. `predictions` and `run` are as in `record_answers`.
    """
    # Read before any process writes, so that all agree on which questions are open.
    answers = dist.all_gather(read_answers(predictions, run))[0]
    is_open = [i for i in range(len(questions)) if i not in answers]
    share = is_open[dist.rank :: dist.world_size]
    if by == "likelihood":
        new = evaluate.choose_views(chat, questions, share, VIEWS, max_tiles)
    else:
        new = evaluate.generate_views(chat, questions, share, VIEWS, max_tiles, max_new_tokens)
    recorded = record_answers(predictions, dist.rank, run, new)
    is_silent = not dist.is_main or not share
    bar = tqdm(recorded, total=len(share), unit="question", disable=is_silent)
    for part in dist.all_gather(dict(bar)):
        answers |= part
    return answers


def score_views(
    questions: Sequence[Item], answers: Answers, metric: Metric
) -> dict[str, list[Answered]]:
    """The scored answers of each view, in the order of the questions."""
    ordered = [answers[i] for i in range(len(questions))]
    texts = {view: [by_view[view] for by_view in ordered] for view in VIEWS}
    return {view: evaluate.score_answers(questions, texts[view], metric) for view in VIEWS}


def format_result(result: dict) -> str:
    """The result of score.py as a table."""
    has_unseen = result["unseen"] is not None  # only the built-in data has held-out combinations
    columns = (*(("seen", "unseen") if has_unseen else ()), *VIEWS[1:])
    lines = [f"{'skill':10} {'accuracy':>8}  {'95 % interval':>15} "
             + " ".join(f"{c:>8}" for c in (*columns, "n"))]  # fmt: skip
    for skill, s in (result["skills"] | {"all": result}).items():
        low, high = s["interval"]
        cells = ["-" if s[k] is None else f"{s[k]:.1%}" for k in columns]
        line = f"{skill:10} {s['accuracy']:8.1%}  {low:6.1%} - {high:6.1%} "
        lines.append(line + " ".join(f"{cell:>8}" for cell in (*cells, s["n"])))
    figures = [f"{k} {result[k]:.1%}" for k in YES_NO_FIGURES if k in result]
    lines += [", ".join(figures)] if figures else []
    lines.append((LEGEND_WORLD if has_unseen else "") + LEGEND)
    if "against" in result:
        a = result["against"]
        low, high = a["interval"]
        lines.append(f"difference to the other checkpoint: {a['difference']:+.1%} "
                     f"(95 % interval {low:+.1%} to {high:+.1%}), p = {a['p']:.4f}")  # fmt: skip
    return "\n".join(lines)
