"""The tables of speed: what is timed is equal, what disagrees is not timed, what is counted is so.

On shapes so small that figures mean nothing here.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.speed import compare, peers, timing
from config_tools import InputError
from configs import DataConfig, RunConfig, TrainConfig
from data import processor as processors
from engine.training.distributed import lacks_compiler
from models.vision_language_model import VisionLanguageModel


@pytest.fixture(autouse=True)
def small_machine(monkeypatch, tiny_processor):
    monkeypatch.setattr(timing, "PRODUCT", 32)
    monkeypatch.setattr(timing, "READ", 1 << 12)
    monkeypatch.setattr(compare, "SAID", 4)
    monkeypatch.setattr(compare, "fast_dtype", lambda *_: torch.float32)
    monkeypatch.setattr(processors, "build", lambda cfg: replace(tiny_processor, cfg=cfg))


@pytest.fixture
def run(minute_config) -> RunConfig:
    return RunConfig(model=minute_config(), data=DataConfig(), train=TrainConfig(out="runs/none"))


def test_every_row_beside_transformers(run):
    rows = compare.measure(run, ["encode", "first", "decode", "train"], seconds=0)
    timed = [row for row in rows if row.ratio is not None]
    assert [row.name.split(",")[0].split(" ")[0] for row in timed] == [
        "encode", "first", "decode", "decode", "train", "train"]  # fmt: skip
    for row in timed:
        assert row.ratio[1] <= row.ratio[0] <= row.ratio[2], row
        assert row.disturbed.endswith(" of 6") and row.share.count("%") == 2, row
    assert rows[-1].ours == "not measured: no bf16 arithmetic here"
    assert "2 x 1,024 packed" in timed[-1].name
    lines = compare.table(rows).splitlines()
    assert len(lines) == 2 + len(rows) and len({line.count(" | ") for line in lines}) == 1


def test_other_weights_are_not_timed(run, tmp_path, monkeypatch):
    VisionLanguageModel(run.model).save_pretrained(tmp_path)
    theirs = peers.their_model(tmp_path, torch.float32)
    monkeypatch.setattr(peers, "their_model", lambda *_: theirs)
    case = peers.open_case(run, tmp_path, torch.float32, 0)
    with torch.no_grad():
        theirs.lm_head.weight.neg_()
        theirs.model.connector.modality_projection.proj.weight.mul_(1.01)
    for rows, says in (
        (compare.encode_rows, "image tokens: differs"),
        (compare.train_rows, "loss, .* nothing was timed"),
        (compare.first_rows, "greedy tokens differ"),
    ):
        with pytest.raises(InputError, match=says):
            rows(case, 1.0, 1.0)


@pytest.fixture
def case(run, tmp_path) -> peers.Case:
    torch.manual_seed(0)
    VisionLanguageModel(run.model).save_pretrained(tmp_path)
    return peers.open_case(run, tmp_path, torch.float32)


def test_what_is_not_installed_is_said(case, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    (row,) = compare.compiled_rows(case, 1.0, 1.0)
    assert row.ratio is None and row.ours == "not measured: torch.compile needs no-such-compiler"


def test_eight_bits_stand_beside_all_of_theirs(case):
    (row,) = compare.int8_rows(case, 1.0, 1.0)
    assert row.ratio[1] <= row.ratio[0] <= row.ratio[2] and row.ours.endswith(" tok/s")
    assert row.share.endswith("%") and "," not in row.share


def test_a_static_cache_says_the_same(case, monkeypatch):
    """Without the compiler, which takes a minute: what it is given computes the same tokens."""
    made = []
    monkeypatch.setattr(torch, "compile", lambda step, **_: made.append(step) or step)
    monkeypatch.setattr(compare, "lacks_compiler", lambda _: "")
    row, paid, eight, small = compare.compiled_rows(case, 1.0, 1.0)
    assert row.ratio[0] > 0 and eight.ratio[0] > 0 and " by the wall; " in paid.ours
    assert small.ratio[0] > 0 and "," in row.share and "," not in small.share
    models = {id(step.__self__) for step in made}  # one as it is, one in 8 bits
    assert len(models) == 2 and id(case.ours) not in models


@pytest.mark.slow
def test_a_compiled_step_says_the_same(case):
    if why := lacks_compiler(torch.device("cpu")):
        pytest.skip(why)
    row, _, eight, small = compare.compiled_rows(case, 1.0, 1.0)
    assert row.ratio[0] > 0 and eight.ratio[0] > 0 and small.ratio[0] > 0
    # Bars of one name would lie on each other.
    assert all(case.kind in found.name for found in (row, eight, small))


def test_the_peak_of_a_process(run, tmp_path, capsys, monkeypatch):
    torch.manual_seed(0)
    VisionLanguageModel(run.model).save_pretrained(tmp_path)
    monkeypatch.setitem(compare.PRESETS, "tiny", run)
    for who in ("ours", "theirs"):
        compare.main(["tiny", "--folder", str(tmp_path), "--peak-memory", who])
        assert 1e7 < int(capsys.readouterr().out) < 1e11


@pytest.mark.slow
def test_the_first_step():
    seen = timing.watch_run(["--data.batch-size=1", "--data.max-length=128"], steps=2)
    assert 1 < seen.begins < seen.ends < 200 and 1 < seen.cpu < 60
    assert [line["step"] for line in seen.log[:2]] == [1, 2]


@pytest.mark.slow
def test_a_wrong_start_says_why():
    with pytest.raises(InputError, match=r"train\.py: .*batch_size = 0"):
        timing.watch_run(["--data.batch-size=0"])


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [compare.Row("a", "1 s", "2 s", (2.0, 1.9, 2.1)), compare.Row("b", "3 GB/s")]
    compare.draw(rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


# --- What all tables share ----------------------------------------------------------------------


def test_turns_alternate_and_a_call_may_time_a_part():
    said = []
    found = timing.alternate(
        {"a": lambda: said.append("a"), "b": lambda: (said.append("b"), 0.5)[1]}, 0, least=2
    )
    assert said == ["a", "b"] * 3, "one round is not measured"
    assert len(found["a"].seconds) == 2 and max(found["b"].seconds) <= 0.5
    slow, fast = timing.Times([4.0, 2.0], [0.0, 0.2]), timing.Times([2.0, 2.0], [0.0, 0.0])
    assert timing.ratios(fast, slow) == (1.5, 1.0, 2.0) and slow.n_disturbed == 1


def test_a_block_of_a_page_is_replaced(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- x -->\nold\n<!-- /x -->\nafter\n")
    timing.write_block(page, "x", "new")
    assert page.read_text() == "before\n<!-- x -->\nnew\n<!-- /x -->\nafter\n"
    with pytest.raises(InputError, match="has no place"):
        timing.write_block(page, "y", "new")


def test_products_are_counted_by_hand():
    layer = torch.nn.Linear(8, 16, bias=False)
    x = torch.randn(4, 8, requires_grad=True)
    assert timing.count(lambda: layer(x).sum().backward()) == (3 * 2 * 4 * 8 * 16, 0)


@pytest.mark.parametrize("n_kv", [1, 2, 6])
def test_attention_is_counted_by_hand(n_kv):
    """Forward 2 products of every query and key, backward 5; so for grouped queries."""
    q, k, v = (torch.randn(3, n, 10, 8, requires_grad=True) for n in (6, n_kv, n_kv))
    attend = torch.nn.functional.scaled_dot_product_attention
    forward = 2 * 2 * 3 * 6 * 10 * 10 * 8
    found = timing.count(lambda: attend(q, k, v, is_causal=True, enable_gqa=True).sum().backward())
    assert found == (3.5 * forward, 3.5 * forward)


def test_segments_are_counted_by_their_squares():
    """The sum of the squares, not the square of the sum; the kernel is a GPU's, its formula not."""
    q, bounds = torch.randn(12, 6, 8), torch.tensor([0, 3, 4, 12], dtype=torch.int32)
    forward = 2 * 2 * 6 * 8 * (3 * 3 + 1 + 8 * 8)
    assert timing._bounded(q, q, q, bounds, bounds, 8, 8) == forward
    assert timing._bounded_backward(q, q, q, q, q, None, bounds, bounds, 8, 8) == 2.5 * forward
    assert set(timing.attention_formulas()) > {torch.ops.torch_attn._varlen_attn}
