"""MMStar: 1,500 multiple-choice questions that need the image (Chen et al. 2024)."""

from engine.evaluation.evaluate import Task, row_questions
from engine.evaluation.metrics import letter, per_answer

PROMPT = "{}\nAnswer with the option's letter from the given choices directly."


def read(row: dict) -> tuple:
    """index, question (its options included), image, answer, category, l2_category, meta_info."""
    fields = {"skill": row["category"], "references": (row["answer"],), "choices": tuple("ABCD")}
    return PROMPT.format(row["question"].strip()), row["image"], fields


TASK = Task(row_questions(read), per_answer(letter), "hf:Lin-Chen/MMStar@val")
