"""DocVQA: questions about scanned pages, scored by edit distance (Mathew et al. 2021)."""

from engine.evaluation.evaluate import Task, row_questions
from engine.evaluation.metrics import anls, per_answer

PROMPT = "{}\nAnswer the question using a single word or phrase."


def read(row: dict) -> tuple:
    """questionId, question, question_types, image, docId, ucsf_document_id,
    ucsf_document_page_no, answers, data_split."""
    fields = {"skill": row["question_types"][0], "references": tuple(row["answers"])}
    return PROMPT.format(row["question"]), row["image"], fields


TASK = Task(row_questions(read), per_answer(anls), "hf:lmms-lab/DocVQA:DocVQA@validation")
