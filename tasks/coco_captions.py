"""COCO captions: a one-sentence caption of a photo, with five references (Chen et al. 2015)."""

from engine.evaluation.evaluate import Task, row_questions
from engine.evaluation.metrics import cider

PROMPT = "Provide a one-sentence caption for the provided image."


def read(row: dict) -> tuple:
    """question_id, image, question, answer (five captions), id, license, file_name, coco_url,
    height, width, date_captured."""
    return PROMPT, row["image"], {"skill": "all", "references": tuple(row["answer"])}


TASK = Task(row_questions(read), cider, "hf:lmms-lab/COCO-Caption@val")
