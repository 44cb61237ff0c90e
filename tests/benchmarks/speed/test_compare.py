"""Speed tables: only models that compute the same are timed; FLOPs are counted correctly.

The shapes are so small that the figures themselves mean nothing.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.speed import compare, peers, timing
from config_tools import InputError
from configs import DataConfig, RunConfig, TrainConfig
from data import processor as processors
from engine.training import distributed
from models.vision_language_model import VisionLanguageModel


@pytest.fixture(autouse=True)
def small_machine(monkeypatch, tiny_processor):
    monkeypatch.setattr(timing, "MATRIX_SIZE", 32)
    monkeypatch.setattr(timing, "N_BYTES", 1 << 12)
    monkeypatch.setattr(compare, "N_NEW_TOKENS", 4)
    monkeypatch.setattr(distributed, "choose_dtype", lambda *_: torch.float32)
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
    assert rows[-1].picovlm == "not measured: not faster on this CPU"
    assert "2 x 1,024 packed" in timed[-1].name
    lines = timing.table(rows).splitlines()
    assert len(lines) == 2 + len(rows) and len({line.count(" | ") for line in lines}) == 1


def test_models_with_different_weights_are_not_timed(run, tmp_path, monkeypatch):
    VisionLanguageModel(run.model).save_pretrained(tmp_path)
    hf_model = peers.load_hf_model(tmp_path, torch.float32)
    monkeypatch.setattr(peers, "load_hf_model", lambda *_: hf_model)
    case = peers.open_case(run, tmp_path, torch.float32)
    with torch.no_grad():
        hf_model.lm_head.weight.neg_()
        hf_model.model.connector.modality_projection.proj.weight.mul_(1.01)
    for rows, message in (
        (compare.encode_rows, "image tokens: differs"),
        (compare.train_rows, "loss, .* nothing was timed"),
        (compare.first_rows, "greedy tokens differ"),
    ):
        with pytest.raises(InputError, match=message):
            rows(case)


@pytest.fixture
def case(run, tmp_path) -> peers.Case:
    torch.manual_seed(0)
    VisionLanguageModel(run.model).save_pretrained(tmp_path)
    return peers.open_case(run, tmp_path, torch.float32)


def test_a_missing_compiler_is_reported(case, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    (row,) = compare.compiled_rows(case)
    assert row.ratio is None and row.picovlm == "not measured: torch.compile needs no-such-compiler"


def test_int8_shows_the_share_of_picovlm_only(case):
    (row,) = compare.int8_rows(case)
    assert row.ratio[1] <= row.ratio[0] <= row.ratio[2] and row.picovlm.endswith(" tok/s")
    assert row.share.endswith("%") and "," not in row.share


def test_a_static_cache_gives_the_same_tokens(case, monkeypatch):
    """Without the compiler, which takes a minute: the uncompiled step stands in for it."""
    made = []
    monkeypatch.setattr(torch, "compile", lambda step, **_: made.append(step) or step)
    monkeypatch.setattr(distributed, "missing_compiler", lambda _: "")
    row, compiling, eight, small = compare.compiled_rows(case)
    assert row.ratio[0] > 0 and eight.ratio[0] > 0 and " wall time; " in compiling.picovlm
    assert small.ratio[0] > 0 and "," in row.share and "," not in small.share
    models = {id(step.__self__) for step in made}  # one in fp32, one in int8
    assert len(models) == 2 and id(case.model) not in models


@pytest.mark.slow
def test_a_compiled_step_gives_the_same_tokens(case):
    if why := distributed.missing_compiler(torch.device("cpu")):
        pytest.skip(why)
    row, _, eight, small = compare.compiled_rows(case)
    assert row.ratio[0] > 0 and eight.ratio[0] > 0 and small.ratio[0] > 0
    # The chart draws bars of the same name on top of each other.
    assert all(case.kind in found.name for found in (row, eight, small))


def test_peak_memory_of_a_process(run, tmp_path, capsys, monkeypatch):
    torch.manual_seed(0)
    VisionLanguageModel(run.model).save_pretrained(tmp_path)
    monkeypatch.setitem(compare.PRESETS, "tiny", run)
    for side in ("picoVLM", "transformers"):
        compare.main(["tiny", "--folder", str(tmp_path), "--peak-memory", side])
        assert 1e7 < int(capsys.readouterr().out) < 1e11


@pytest.mark.slow
def test_the_first_step():
    run = timing.run_training(["--data.batch-size=1", "--data.max-length=128"], steps=2)
    assert 1 < run.begins < run.ends < 200 and 1 < run.cpu < 60
    assert [line["step"] for line in run.log[:2]] == [1, 2]


@pytest.mark.slow
def test_a_failed_run_reports_its_error():
    with pytest.raises(InputError, match=r"train\.py: .*batch_size = 0"):
        timing.run_training(["--data.batch-size=0"])


def test_chart(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [compare.Row("a", "1 s", "2 s", (2.0, 1.9, 2.1)), compare.Row("b", "3 GB/s")]
    timing.draw(rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


# --- timing.py ----------------------------------------------------------------------------------


def test_turns_alternate_and_a_call_may_time_a_part():
    called = []
    found = timing.alternate(
        {"a": lambda: called.append("a"), "b": lambda: (called.append("b"), 0.5)[1]}, 0, min_turns=2
    )
    assert called == ["a", "b"] * 3, "the first round is the warm-up"
    assert len(found["a"].seconds) == 2 and max(found["b"].seconds) <= 0.5
    slow, fast = timing.Times([4.0, 2.0], [0.0, 0.2]), timing.Times([2.0, 2.0], [0.0, 0.0])
    assert timing.ratios(fast, slow) == (1.5, 1.0, 2.0) and slow.n_disturbed == 1


def test_a_block_of_a_page_is_replaced(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    monkeypatch.setattr(timing, "PAGE", page)
    page.write_text("before\n<!-- x -->\nold\n<!-- /x -->\nafter\n")
    timing.write_block("x", "new")
    assert page.read_text() == "before\n<!-- x -->\nnew\n<!-- /x -->\nafter\n"
    with pytest.raises(InputError, match="expected <!-- y -->"):
        timing.write_block("y", "new")


def test_products_are_counted_by_hand():
    layer = torch.nn.Linear(8, 16, bias=False)
    x = torch.randn(4, 8, requires_grad=True)
    assert timing.count_flops(lambda: layer(x).sum().backward()) == (3 * 2 * 4 * 8 * 16, 0)


@pytest.mark.parametrize("n_kv", [1, 2, 6])
def test_attention_is_counted_by_hand(n_kv):
    """2 products per query and key forward, 5 backward; also for grouped queries."""
    q, k, v = (torch.randn(3, n, 10, 8, requires_grad=True) for n in (6, n_kv, n_kv))
    attention = torch.nn.functional.scaled_dot_product_attention
    forward = 2 * 2 * 3 * 6 * 10 * 10 * 8
    found = timing.count_flops(
        lambda: attention(q, k, v, is_causal=True, enable_gqa=True).sum().backward()
    )
    assert found == (3.5 * forward, 3.5 * forward)


def test_segments_are_counted_by_their_squares():
    """The sum of squares, not the square of the sum; the kernel needs a GPU, the formula none."""
    q, bounds = torch.randn(12, 6, 8), torch.tensor([0, 3, 4, 12], dtype=torch.int32)
    forward = 2 * 2 * 6 * 8 * (3 * 3 + 1 + 8 * 8)
    assert timing._varlen(q, q, q, bounds, bounds, 8, 8) == forward
    assert timing._varlen_backward(q, q, q, q, q, None, bounds, bounds, 8, 8) == 2.5 * forward
    assert set(timing.attention_formulas()) > {torch.ops.torch_attn._varlen_attn}
