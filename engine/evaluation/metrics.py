"""Metrics of answers, and confidence intervals of their averages and differences.

The metric of one answer takes the answer and its references (correct answers) and returns 0 to 1.
A `Metric` takes many answers at once, as CIDEr weights words by their frequency in all references;
`per_answer` makes one from the metric of one answer.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from statistics import mean

import numpy as np
from numpy.typing import ArrayLike

from config_tools import import_optional

Metric = Callable[[Sequence[str], Sequence[Sequence[str]]], list[float]]
ARTICLES = {"a", "an", "the"}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {"none": "0"} | {word: str(i) for i, word in enumerate(NUMBERS)}


def per_answer(metric: Callable[[str, Sequence[str]], float]) -> Metric:
    """Apply the metric of one answer to many."""
    return lambda answers, references: [
        metric(a, r) for a, r in zip(answers, references, strict=True)
    ]


# --- One answer ---------------------------------------------------------------------------------


def exact(answer: str, expected: str) -> float:
    """1 if both are equal, ignoring case, spaces and a final full stop."""
    return float(_plain(answer) == _plain(expected))


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")


def any_exact(answer: str, references: Sequence[str]) -> float:
    """`exact` for any of the references."""
    return max(exact(answer, r) for r in references)


def letter(answer: str, references: Sequence[str]) -> float:
    """Multiple choice: the first reference is the correct letter, the second the option's text.

    Accepted: "B", "b.", "(B) a cat", "The answer is B", and the text of the option.
    """
    correct, *words = references
    if words and exact(answer, words[0]):
        return 1.0
    found = re.match(
        r"\W*(?i:(?:the |correct )*answer(?: is)?\W*|option |choice )?"
        r"([A-Z](?![\w'])|[a-z](?=\W*$|[.):,]))",
        answer.strip(),
    )
    return float(found is not None and found[1].upper() == correct.upper())


def first_word(answer: str, references: Sequence[str]) -> float:
    """1 if the first word is the reference: "Yes, there is." counts as yes (POPE)."""
    words = re.findall(r"\w+", answer.lower())
    return float(bool(words) and words[0] == references[0].lower())


def relaxed_accuracy(answer: str, references: Sequence[str]) -> float:
    """1 if a number is within 5 %, or a text is equal (ChartQA, Masry et al. 2022, section 5.1)."""
    return max(_close(answer, reference) for reference in references)


def _close(answer: str, reference: str) -> float:
    number, expected = _number(answer), _number(reference)
    if number is None or not expected:
        return exact(answer, reference)
    return float(abs(number - expected) <= 0.05 * abs(expected))


def _number(text: str) -> float | None:
    text = text.strip().rstrip(".").replace(",", "")
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None


def anls(answer: str, references: Sequence[str]) -> float:
    """1 - normalized edit distance; 0 if the distance is 0.5 or more (ANLS, Biten et al. 2019)."""
    text = " ".join(answer.lower().split())
    distances = []
    for reference in references:
        expected = " ".join(reference.lower().split())
        distances.append(edit_distance(text, expected) / max(1, len(text), len(expected)))
    return 1 - min(distances) if min(distances) < 0.5 else 0.0


def edit_distance(a: str, b: str) -> int:
    """Minimum number of insertions, deletions and replacements (Levenshtein 1966)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """VQA accuracy (Antol et al. 2015): matches / 3, at most 1, averaged over leaving one out.

    Ignores case, punctuation, articles and number words; unlike the official script, it does not
    restore contractions.
    """
    text, expected = _vqa_words(answer), [_vqa_words(r) for r in references]
    n_same = expected.count(text)
    return mean(min(1.0, (n_same - (other == text)) / 3) for other in expected)


def _vqa_words(text: str) -> str:
    text = re.sub(r"(?<=\d),(?=\d)", "", text.lower())
    text = re.sub(r"[;/\[\]\"{}()=+\\_\-><@`,?!]", " ", text)
    text = re.sub(r"\.(?!\d)", "", text)
    return " ".join(DIGITS.get(w, w) for w in text.split() if w not in ARTICLES)


# --- Many answers -------------------------------------------------------------------------------


def cider(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each caption (Vedantam et al. 2015), by pycocoevalcap; 1.0 is 100 in papers.

    Words are lowercased, without punctuation; the official script uses a Java tokenizer instead.
    Raises `InputError` without pycocoevalcap.
    """
    official = import_optional("pycocoevalcap.cider.cider", "the caption metric", "pycocoevalcap")
    captions = {i: [_caption_words(a)] for i, a in enumerate(answers)}
    expected = {i: [_caption_words(r) for r in rs] for i, rs in enumerate(references)}
    _, scores = official.Cider().compute_score(expected, captions)
    return [float(s) for s in scores]


def _caption_words(text: str) -> str:
    table = str.maketrans("", "", string.punctuation.replace("'", "").replace("-", ""))
    return " ".join(text.lower().translate(table).split())


def yes_no_figures(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict:
    """Precision, recall and F1 of "yes", and the ratio of yes answers (POPE, Li et al. 2023)."""
    yes = [bool(first_word(a, ("yes",))) for a in answers]
    true = [r[0].lower() == "yes" for r in references]
    hits = sum(s and t for s, t in zip(yes, true, strict=True))
    precision, recall = hits / max(1, sum(yes)), hits / max(1, sum(true))
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    return {"precision": precision, "recall": recall, "f1": f1, "yes_ratio": mean(yes)}


# --- Confidence ---------------------------------------------------------------------------------


def bootstrap_interval(
    scores: ArrayLike, n_resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % bootstrap percentile interval of the mean (Efron 1979)."""
    values = np.asarray(scores, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(len(values), size=(n_resamples, len(values)))
    low, high = np.percentile(values[picks].mean(1), (2.5, 97.5))
    return float(low), float(high)


def paired_difference(
    scores: Sequence[float], others: Sequence[float], n_resamples: int = 10_000, seed: int = 0
) -> dict:
    """Mean of `scores` minus mean of `others` on the same questions, with interval and p-value.

    The p-value is that of a two-sided sign-flip permutation test (Fisher 1935).
    """
    difference = np.asarray(scores, dtype=np.float64) - np.asarray(others, dtype=np.float64)
    signs = np.random.default_rng(seed)
    observed, extreme = abs(difference.mean()), 0
    for _ in range(n_resamples):
        flipped = difference * signs.choice((-1.0, 1.0), size=len(difference))
        extreme += abs(flipped.mean()) >= observed - 1e-12
    return {
        "difference": float(difference.mean()),
        "interval": bootstrap_interval(difference),
        "p": (extreme + 1) / (n_resamples + 1),
    }
