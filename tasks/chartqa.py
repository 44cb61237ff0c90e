"""ChartQA: questions about charts; numbers count within 5 % (Masry et al. 2022)."""

from engine.evaluation.evaluate import Task, row_questions
from engine.evaluation.metrics import per_answer, relaxed_accuracy

PROMPT = "{}\nAnswer the question with a single word."


def read(row: dict) -> tuple:
    """type (human_test or augmented_test), question, answer, image."""
    fields = {"skill": row["type"].removesuffix("_test"), "references": (row["answer"],)}
    return PROMPT.format(row["question"]), row["image"], fields


TASK = Task(row_questions(read), per_answer(relaxed_accuracy), "hf:lmms-lab/ChartQA@test")
