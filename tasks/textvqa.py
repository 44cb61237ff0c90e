"""TextVQA: reading text in photos, with ten reference answers (Singh et al. 2019)."""

from engine.evaluation.evaluate import Task, row_questions
from engine.evaluation.metrics import per_answer, vqa_accuracy

PROMPT = "{}\nAnswer the question using a single word or phrase."


def read(row: dict) -> tuple:
    """image_id, question_id, question, question_tokens, image, image_width, image_height,
    flickr_original_url, flickr_300k_url, answers (ten), image_classes, set_name, ocr_tokens."""
    fields = {"skill": "all", "references": tuple(row["answers"])}
    return PROMPT.format(row["question"].capitalize()), row["image"], fields


TASK = Task(row_questions(read), per_answer(vqa_accuracy), "hf:lmms-lab/textvqa@validation")
