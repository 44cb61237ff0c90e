"""Metrics and intervals against values computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from engine.evaluation.metrics import (
    anls,
    any_exact,
    bootstrap_interval,
    cider,
    edit_distance,
    exact,
    first_word,
    letter,
    paired_difference,
    per_answer,
    relaxed_accuracy,
    vqa_accuracy,
    yes_no_figures,
)


@pytest.mark.parametrize(
    ("answer", "expected", "score"),
    [
        ("red", "red", 1), (" Red. ", "red", 1), ("two  red\ncircles", "Two red circles.", 1),
        ("red", "blue", 0), ("", "red", 0), ("", "", 1), ("a red circle", "red", 0),
        ("1.5", "15", 0), ("3", "3.", 1), ("ja", "nein", 0),
    ],
)  # fmt: skip
def test_exact(answer, expected, score):
    assert exact(answer, expected) == score and isinstance(exact(answer, expected), float)


def test_the_bootstrap_interval_matches_the_normal_approximation():
    scores = np.random.default_rng(1).random(400) < 0.7
    low, high = bootstrap_interval(scores.tolist())
    half = 1.96 * scores.std() / 20
    assert low == pytest.approx(scores.mean() - half, abs=0.01)
    assert high == pytest.approx(scores.mean() + half, abs=0.01)
    assert (low, high) == bootstrap_interval(scores.tolist())  # repeatable
    assert bootstrap_interval([1.0] * 9) == (1.0, 1.0) and bootstrap_interval([0]) == (0, 0)


def test_any_reference_counts():
    assert per_answer(any_exact)(["Red.", "red"], [["blue", "red"], ["blue"]]) == [1, 0]
    with pytest.raises(ValueError, match="zip"):
        per_answer(any_exact)(["red"], [])


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("B", 1), ("b", 1), ("B.", 1), ("(B)", 1), ("(b) a dog", 1), ("B: a dog", 1), ("b)", 1),
        ("The answer is B", 1), ("Answer: B", 1), ("Option B", 1), ("a dog", 1), ("A dog.", 1),
        ("A", 0), ("", 0), ("A or B", 0), ("Because", 0), ("bus", 0), ("dog", 0), ("the B", 0),
        ("The answer is A, not B", 0), ("a", 0), ("?", 0),
    ],
)  # fmt: skip
def test_letter(answer, score):
    assert letter(answer, ("B", "a dog")) == score
    assert letter("a big dog", ("A",)) == 0, "an article is not a choice"


def test_first_word():
    assert [first_word(a, ("yes",)) for a in ("Yes", "yes, there is", "No", "yesterday", "")] \
        == [1, 1, 0, 0, 0]  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("104", "100", 1), ("105", "100", 1), ("105.1", "100", 0), ("95", "100", 1),
        ("1,040", "1000", 1), ("0.52", "52%", 1), ("52%", "0.5", 1), ("52", "52%", 0),
        ("-3", "3", 0), ("0", "0", 1), ("0.01", "0", 0), ("Norway", "norway", 1),
        ("12 apples", "12", 0), ("", "5", 0), ("5.", "5", 1), ("nan", "5", 0),
    ],
)  # fmt: skip
def test_relaxed(answer, reference, score):
    assert relaxed_accuracy(answer, (reference,)) == score


@pytest.mark.parametrize(
    ("a", "b", "n"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("abc", "abc", 0), ("ab", "ba", 2),
     ("flaw", "lawn", 2)],
)  # fmt: skip
def test_edit_distance(a, b, n):
    assert edit_distance(a, b) == edit_distance(b, a) == n


def test_anls():
    assert anls("$4,000", ("$ 4,000", "4000")) == pytest.approx(1 - 1 / 7)
    assert anls("The  Smiths", ("the smiths",)) == 1 and anls("yes", ("no",)) == 0
    assert anls("ab", ("abcd",)) == 0, "a distance of 0.5 scores 0"
    assert anls("abc", ("abcd",)) == 0.75 and anls("", ("",)) == 1 and anls("", ("x",)) == 0


def test_vqa_accuracy():
    references = ["red"] * 2 + ["a red"] + ["blue"] * 3 + ["4"] * 4
    # Of the ten subsets of nine references, three contain two "red", the others three.
    assert vqa_accuracy("Red!", references) == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert vqa_accuracy("four", references) == 1 and vqa_accuracy("green", references) == 0
    assert vqa_accuracy("one", ["1"] + ["x"] * 9) == pytest.approx(0.3)
    same = (("1,000.5 m", "1000.5 m"), ("co-op; shop", "co op shop"), ("U.S.A", "usa"))
    for answer, reference in same:
        assert vqa_accuracy(answer, [reference] * 10) == 1, answer


def test_cider_rewards_rare_words_of_the_references():
    pytest.importorskip("pycocoevalcap")
    references = [
        ["a red cross on a lawn", "a red cross stands on green grass"],
        ["a dog on a lawn", "a brown dog on grass"],
        ["two boats on a lake", "a pair of boats"],
    ]
    right = cider([r[0].upper() + "." for r in references], references)
    assert len(right) == 3 and min(right) > 2
    swapped = cider([references[1][0], references[0][0], references[2][0]], references)
    assert swapped[0] < 0.5 * right[0] and swapped[2] == pytest.approx(right[2])
    assert cider(["", "on a", "boats on a lake"], references)[:1] == [0.0]


def test_cider_matches_pycocoevalcap():
    """On captions that both tokenizers split in the same way."""
    pytest.importorskip("pycocoevalcap")
    from pycocoevalcap.cider.cider import Cider

    references = [["a red cross", "red cross here"], ["one dog", "a dog runs"]]
    answers = ["a red cross", "a dog"]
    gts = dict(enumerate(references))
    mean, scores = Cider().compute_score(gts, {i: [a] for i, a in enumerate(answers)})
    assert cider(answers, references) == pytest.approx(scores.tolist()) and mean > 0
    assert cider(["A red cross!", "(a) dog."], references) == pytest.approx(scores.tolist())


def test_yes_no_figures():
    right = [["yes"], ["no"], ["yes"], ["no"], ["yes"]]
    figures = yes_no_figures(["yes", "Yes.", "no", "no", "maybe"], right)
    assert figures == {
        "precision": 0.5,
        "recall": 1 / 3,
        "f1": pytest.approx(0.4),
        "yes_ratio": 0.4,
    }
    assert yes_no_figures(["no"], [["yes"]])["f1"] == 0


def test_a_paired_test_finds_a_difference_that_intervals_do_not():
    g = np.random.default_rng(0)
    other = (g.random(300) < 0.5).astype(float)
    better = other.copy()
    better[np.flatnonzero(other == 0)[:15]] = 1  # better on fifteen questions, worse on none
    found = paired_difference(better, other, n_resamples=2000)
    assert found["difference"] == pytest.approx(15 / 300)
    assert 0 < found["interval"][0] < 0.05 < found["interval"][1] and found["p"] < 0.01
    low, high = bootstrap_interval(other)
    assert low < better.mean() < high, "the plain intervals overlap"
    # All sign flips of three equal differences: 2 of 8 are as extreme. A tie has p = 1.
    assert paired_difference([1, 1, 1], [0, 0, 0], 4000)["p"] == pytest.approx(0.25, abs=0.03)
    assert paired_difference([1, 0], [0, 1])["p"] == 1
