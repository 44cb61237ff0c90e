"""Pure metrics: what an answer is worth, how sure we are of an average, and of a difference.

A metric takes an answer and its references, right answers of which most data sets have one, and
gives 0..1; `each` makes it one over many questions, which captions need: they are weighed by how
rare their words are among all references.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from statistics import mean

import numpy as np

from config_tools import InputError

Metric = Callable[[Sequence[str], Sequence[Sequence[str]]], list[float]]
ARTICLES = {"a", "an", "the"}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {"none": "0"} | {word: str(i) for i, word in enumerate(NUMBERS)}


def each(metric: Callable[[str, Sequence[str]], float]) -> Metric:
    """A metric of one question over many."""
    return lambda answers, references: [
        metric(a, r) for a, r in zip(answers, references, strict=True)
    ]


# --- One answer ---------------------------------------------------------------------------------


def exact(answer: str, expected: str) -> float:
    """1 when both say the same, whatever the case, outer spaces and a final full stop."""
    return float(_plain(answer) == _plain(expected))


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")


def any_exact(answer: str, references: Sequence[str]) -> float:
    """`exact`, of any reference."""
    return max(exact(answer, r) for r in references)


def letter(answer: str, references: Sequence[str]) -> float:
    """Multiple choice: the first reference is the right letter, the second the choice in words.

    Right are "B", "b.", "(B) a cat", "The answer is B", and the words themselves.
    """
    right, *words = references
    if words and exact(answer, words[0]):
        return 1.0
    found = re.match(
        r"\W*(?i:(?:the |correct )*answer(?: is)?\W*|option |choice )?"
        r"([A-Z](?![\w'])|[a-z](?=\W*$|[.):,]))",
        answer.strip(),
    )
    return float(found is not None and found[1].upper() == right.upper())


def first_word(answer: str, references: Sequence[str]) -> float:
    """1 when the answer begins with the reference: "Yes, there is." is yes (POPE)."""
    words = re.findall(r"\w+", answer.lower())
    return float(bool(words) and words[0] == references[0].lower())


def relaxed(answer: str, references: Sequence[str]) -> float:
    """Within 5 % of a number, else the same text (ChartQA, Masry et al. 2022, section 5.1)."""
    return max(_close(answer, reference) for reference in references)


def _close(answer: str, reference: str) -> float:
    said, wanted = _number(answer), _number(reference)
    if said is None or not wanted:
        return exact(answer, reference)
    return float(abs(said - wanted) <= 0.05 * abs(wanted))


def _number(text: str) -> float | None:
    text = text.strip().rstrip(".").replace(",", "")
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None


def anls(answer: str, references: Sequence[str]) -> float:
    """1 minus the edit distance over the longer length; 0 from a half on (Biten et al. 2019)."""
    said = " ".join(answer.lower().split())
    scores = []
    for reference in references:
        wanted = " ".join(reference.lower().split())
        distance = edit_distance(said, wanted) / max(1, len(said), len(wanted))
        scores.append(1 - distance if distance < 0.5 else 0.0)
    return max(scores)


def edit_distance(a: str, b: str) -> int:
    """Fewest insertions, deletions and replacements that make one the other (Levenshtein 1966)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """A third for each of ten people who say the same, at most 1, over all nine-person panels.

    Antol et al. 2015. Case, punctuation, articles and number words do not matter; the contractions
    that the official script also restores do.
    """
    said, wanted = _vqa_words(answer), [_vqa_words(r) for r in references]
    n_same = wanted.count(said)
    return mean(min(1.0, (n_same - (other == said)) / 3) for other in wanted)


def _vqa_words(text: str) -> str:
    text = re.sub(r"(?<=\d),(?=\d)", "", text.lower())
    text = re.sub(r"[;/\[\]\"{}()=+\\_\-><@`,?!]", " ", text)
    text = re.sub(r"\.(?!\d)", "", text)
    return " ".join(DIGITS.get(w, w) for w in text.split() if w not in ARTICLES)


# --- Many answers -------------------------------------------------------------------------------


def cider(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each caption (Vedantam et al. 2015) by pycocoevalcap; 1 is what tables call 100.

    Words are lower case and without punctuation, not by the Java tokenizer of the official script.
    Raises `InputError` without the package.
    """
    try:
        from pycocoevalcap.cider.cider import Cider
    except ImportError:
        raise InputError(
            "the caption metric needs pycocoevalcap, so run `pip install pycocoevalcap`."
        ) from None
    said = {i: [_caption_words(a)] for i, a in enumerate(answers)}
    wanted = {i: [_caption_words(r) for r in rs] for i, rs in enumerate(references)}
    _, scores = Cider().compute_score(wanted, said)
    return [float(s) for s in scores]


def _caption_words(text: str) -> str:
    table = str.maketrans("", "", string.punctuation.replace("'", "").replace("-", ""))
    return " ".join(text.lower().translate(table).split())


def yes_no_figures(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict:
    """Precision, recall and F1 of "yes", and how often it is said (POPE, Li et al. 2023)."""
    said = [bool(first_word(a, ("yes",))) for a in answers]
    true = [r[0].lower() == "yes" for r in references]
    hits = sum(s and t for s, t in zip(said, true, strict=True))
    precision, recall = hits / max(1, sum(said)), hits / max(1, sum(true))
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    return {"precision": precision, "recall": recall, "f1": f1, "says_yes": mean(said)}


# --- How sure we are ----------------------------------------------------------------------------


def bootstrap_interval(
    scores: Sequence[float], n_resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of the mean (Efron 1979)."""
    values = np.asarray(scores, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(len(values), size=(n_resamples, len(values)))
    low, high = np.percentile(values[picks].mean(1), (2.5, 97.5))
    return float(low), float(high)


def paired_difference(
    ours: Sequence[float], theirs: Sequence[float], n_resamples: int = 10_000, seed: int = 0
) -> dict:
    """How much better `ours` is on the same questions, with its interval and p-value.

    The p-value is two-sided, of flipping signs at random (Fisher 1935): how often models that are
    equal would differ so much.
    """
    difference = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
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
