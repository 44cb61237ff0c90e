"""POPE: is an object in the image? Half of the answers are yes (Li et al. 2023)."""

from engine.evaluation.evaluate import Task, row_questions
from engine.evaluation.metrics import first_word, per_answer, yes_no_figures

PROMPT = "{}\nAnswer the question using a single word or phrase."


def read(row: dict) -> tuple:
    """id, question_id, question, answer, image_source, image, category.

    `category` is how absent objects were chosen: random, popular or adversarial.
    """
    answer = row["answer"].strip().lower()
    fields = {"skill": row["category"], "references": (answer,), "choices": ("yes", "no")}
    return PROMPT.format(row["question"].strip()), row["image"], fields


TASK = Task(row_questions(read), per_answer(first_word), "hf:lmms-lab/POPE@test", yes_no_figures)
