"""ChartQA: numbers and labels read off charts, within 5 % (Masry et al. 2022)."""

from engine.evaluation.evaluate import Task, row_items
from engine.evaluation.metrics import each, relaxed

PROMPT = "{}\nAnswer the question with a single word."


def read(row: dict) -> tuple:
    """type (human_test or augmented_test), question, answer, image."""
    fields = {"skill": row["type"].removesuffix("_test"), "references": (row["answer"],)}
    return PROMPT.format(row["question"]), row["image"], fields


TASK = Task(row_items(read), each(relaxed), "hf:lmms-lab/ChartQA@test")
