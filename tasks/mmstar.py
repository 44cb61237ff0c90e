"""MMStar: 1,500 multiple-choice questions that cannot be answered blind (Chen et al. 2024)."""

from engine.evaluation.evaluate import Task, row_items
from engine.evaluation.metrics import each, letter

PROMPT = "{}\nAnswer with the option's letter from the given choices directly."


def read(row: dict) -> tuple:
    """index, question (its options included), image, answer, category, l2_category, meta_info."""
    fields = {"skill": row["category"], "references": (row["answer"],), "choices": tuple("ABCD")}
    return PROMPT.format(row["question"].strip()), row["image"], fields


TASK = Task(row_items(read), each(letter), "hf:Lin-Chen/MMStar@val")
