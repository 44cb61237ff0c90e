"""POPE: is there such a thing in the picture? Half the answers are yes (Li et al. 2023)."""

from engine.evaluation.evaluate import Task, row_items
from engine.evaluation.metrics import each, first_word, yes_no_figures

PROMPT = "{}\nAnswer the question using a single word or phrase."


def read(row: dict) -> tuple:
    """id, question_id, question, answer, image_source, image, category.

    The category says how the absent things were chosen: random, popular, adversarial.
    """
    answer = row["answer"].strip().lower()
    fields = {"skill": row["category"], "references": (answer,), "choices": ("yes", "no")}
    return PROMPT.format(row["question"].strip()), row["image"], fields


TASK = Task(row_items(read), each(first_word), "hf:lmms-lab/POPE@test", yes_no_figures)
