"""Two trees are measured in turns; differences are found and failures reported."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks.speed import revisions
from benchmarks.speed.revisions import ROOT, ROWS, Result
from config_tools import InputError
from configs import VLMConfig

CHANGE = '''

_forward = VisionLanguageModel.forward


def forward(self, *args, **options):
    """Ten times the work, half the loss, and at least 64 MiB more."""
    self.unused = torch.ones(1 << 24)
    for _ in range(9):
        _forward(self, *args, **options)
    logits, loss = _forward(self, *args, **options)
    return logits, 0.5 * loss


VisionLanguageModel.forward = forward
'''


@pytest.fixture
def other_tree(tmp_path) -> Path:
    """A copy of this tree with a slow and wrong `forward`, which only training calls."""
    tree = tmp_path / "other"
    shutil.copytree(ROOT / "models", tree / "models", ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tree)
    with open(tree / "models" / "vision_language_model.py", "a") as file:
        file.write(CHANGE)
    return tree


def test_a_slow_tree_is_found(other_tree, minute_config, monkeypatch):
    monkeypatch.setattr(revisions, "MEMORY_TURNS", 1)
    default = vars(VLMConfig())
    changes = {k: v for k, v in vars(minute_config()).items() if v != default[k]}
    found = revisions.measure([ROOT, other_tree], ["tiny"], ["fp32"], list(ROWS), 1, turns=3,
                              changes=changes)  # fmt: skip
    by_row = {result.row: result for result in found}
    assert list(by_row) == list(ROWS)
    for row in ("train", "packed"):
        result = by_row[row]
        assert result.ratio > 2 and result.interval[0] > 1
        assert [len(numbers) for numbers in result.numbers] == [3, 3]
        for (a,), (b,) in zip(*result.values, strict=True):
            assert b == pytest.approx(a / 2, rel=1e-3)
        losses = [loss for (loss,) in result.values[0]]
        assert losses[-1] < losses[0] and losses[0] > 3, "random weights, then training"
    for row, n_tokens in (("first", 1), ("decode1", 33), ("decode8", 8 * 33)):
        result = by_row[row]
        assert result.values[0] == result.values[1]
        assert {len(tokens) for tokens in result.values[0]} == {n_tokens}
    (before,), (after,) = by_row["memory"].numbers
    assert 48 < (after - before) / 2**20 < 200
    assert "tiny fp32: training step, padded rows (+" in revisions.slower(found)
    assert "tokens are equal" in revisions.difference(found)
    assert "loss: 0.0e+00" not in revisions.difference(found)


def test_the_same_tree_computes_the_same(capsys):
    argv = [str(ROOT), "--presets", "tiny", "--precisions", "bf16", "--rows", "decode8", "packed"]
    revisions.main([*argv, "--turns", "1", "--threads", "1"])
    out = capsys.readouterr().out
    assert "`OMP_NUM_THREADS" in out or "`python -m benchmarks.speed.revisions" in out
    assert "| tiny bf16: decoding step, 8 rows |" in out
    assert "loss: 0.0e+00 in first steps, 0.0e+00 in all steps. Greedy tokens are equal." in out


def test_turns_alternate():
    asked = []

    def worker(name):
        return lambda **_: asked.append(name) or {"seconds": 1.0, "values": []}

    result = Result("tiny", "fp32", "train")
    revisions.time_row(result, [worker("A"), worker("B")], {}, 0, turns=3)
    assert "".join(asked) == "ABABBAAB", "the first two are the warm-up"


def test_ratio_and_interval():
    result = Result("tiny", "fp32", "train", ([1.0] * 4 + [9.0], [1.1] * 5))
    assert result.ratio == pytest.approx(1.1)
    low, high = result.interval
    assert 1.1 / 9 <= low < 1 and high == pytest.approx(1.1)
    assert "(+10.0%, but the interval includes 1)" in revisions.slower([result])
    result.numbers = ([1.0] * 4 + [9.0], [1.02] * 5)
    assert revisions.slower([result]) == "No row is more than 3% slower."
    lines = revisions.table([result]).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "| 1020 ms (1020 - 1020) | 1.020 |" in lines[-1]


def test_a_revision_is_unpacked(tmp_path):
    if not (ROOT / ".git").exists():
        pytest.skip("no git repository")
    tree = revisions.checkout("HEAD", tmp_path / "head")
    assert (tree / "configs.py").is_file() and tree != ROOT
    assert revisions.checkout(str(ROOT), tmp_path / "unused") == ROOT
    with pytest.raises(InputError, match="'no-such-revision': neither a folder with configs"):
        revisions.checkout("no-such-revision", tmp_path / "none")


def test_a_failed_worker_is_reported(tmp_path):
    (tmp_path / "configs.py").write_text("raise RuntimeError('broken tree')\n")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "vision_language_model.py").write_text("import configs\n")
    with pytest.raises(InputError, match=r"its worker ended with status 1, see above"):
        revisions.measure([ROOT, tmp_path], ["tiny"], ["fp32"], ["first"], 1, turns=1)


def test_numbers_below_one_are_rejected():
    with pytest.raises(InputError, match="--turns 0: must be at least 1"):
        revisions.main([str(ROOT), "--turns", "0"])
