"""ScienceQA, questions with an image: school science, multiple choice (Lu et al. 2022)."""

import string

from engine.evaluation.evaluate import Task, row_questions
from engine.evaluation.metrics import letter, per_answer

PROMPT = "{context}{question}\n{options}\nAnswer with the option's letter from the given choices directly."  # noqa: E501


def read(row: dict) -> tuple:
    """image, question, choices, answer (a number), hint, task, grade, subject, topic, category,
    skill, lecture, solution."""
    letters = string.ascii_uppercase[: len(row["choices"])]
    prompt = PROMPT.format(
        context=f"Context: {row['hint']}\n" if row["hint"] else "",
        question=row["question"],
        options="\n".join(f"{name}. {text}" for name, text in zip(letters, row["choices"])),
    )
    correct = row["answer"]
    references = (letters[correct], row["choices"][correct])
    fields = {"skill": row["subject"], "references": references, "choices": tuple(letters)}
    return prompt, row["image"], fields


TASK = Task(row_questions(read), per_answer(letter), "hf:lmms-lab/ScienceQA:ScienceQA-IMG@test")
