"""export.py: every format, every dtype, and its error messages."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file

import export
from cli import command
from configs import LMConfig
from engine.inference.chat import Chat
from models.inference.sampling import Sampling
from models.language_model import LanguageModel
from models.vision_language_model import VisionLanguageModel


def run(*argv: object) -> None:
    command(export.main, [str(a) for a in argv])


def refused(capsys, *argv: object) -> str:
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and len(err.splitlines()) == 1, err
    return err


def test_export_in_another_dtype(small_checkpoint, tmp_path, capsys):
    run(small_checkpoint, "--out", tmp_path / "bf16", "--dtype", "bf16")
    assert "4 x 4 patches per tile: transformers 4.55 to 5.16 may" in capsys.readouterr().out
    folders = (small_checkpoint, tmp_path / "bf16")
    before, after = (load_file(folder / "model.safetensors") for folder in folders)
    assert before.keys() == after.keys() and {t.dtype for t in after.values()} == {torch.bfloat16}
    assert all(torch.equal(t.bfloat16(), after[name]) for name, t in before.items())
    assert {p.name for p in (tmp_path / "bf16").iterdir()} == {
        p.name for p in small_checkpoint.iterdir()
    }
    reference = hf.AutoModelForImageTextToText.from_pretrained(tmp_path / "bf16")
    assert reference.dtype == torch.bfloat16
    run(small_checkpoint, "--out", tmp_path / "same")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        same = [(d / name).read_bytes() for d in (small_checkpoint, tmp_path / "same")]
        assert same[0] == same[1], name


@pytest.mark.parametrize("fields", [{}, dict(lm_tie_weights=True, lm_qkv_bias=True)], ids=str)
@torch.no_grad()
def test_text_only(fields, minute_config, tiny_processor, lively, tmp_path, monkeypatch):
    cfg = minute_config(**fields)
    model = lively(VisionLanguageModel(cfg))
    model.save_pretrained(tmp_path / "vlm", replace(tiny_processor, cfg=cfg))
    run(tmp_path / "vlm", "--to", "text-only", "--out", tmp_path / "text")
    reference = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "text")
    assert reference.config.model_type == ("qwen2" if fields else "llama")
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "text")
    ids = tokenizer("What color is the circle?", return_tensors="pt").input_ids
    decoder = model.decoder
    expected = decoder.logits(decoder(decoder.token_embedding(ids)))
    torch.testing.assert_close(reference(ids).logits, expected, rtol=1e-5, atol=1e-4)
    again = LanguageModel.from_pretrained(LMConfig(lm_model_type=str(tmp_path / "text")))
    assert torch.equal(again.logits(again(again.token_embedding(ids))), expected)


def test_nanovlm_and_back(small_checkpoint, tmp_path):
    run(small_checkpoint, "--to", "nanovlm", "--out", tmp_path / "nano")
    config = json.loads((tmp_path / "nano" / "config.json").read_text())
    assert config["lm_tokenizer"] == str(tmp_path / "nano") and "model_type" not in config
    assert (tmp_path / "nano" / "tokenizer.json").is_file()
    folders = (small_checkpoint, tmp_path / "nano")
    model, back = (VisionLanguageModel.from_pretrained(folder) for folder in folders)
    for name, p in back.vision_encoder.named_parameters():
        torch.testing.assert_close(p, model.vision_encoder.get_parameter(name), rtol=0, atol=1e-6)
    assert torch.equal(back.decoder.token_embedding.weight, model.decoder.token_embedding.weight)
    image = Image.effect_noise((40, 30), 90).convert("RGB")
    answers = [Chat.load(f)("What is it?", [image], Sampling(max_new_tokens=8)) for f in folders]
    assert answers[0] == answers[1], "the tokenizer is exported too"


def test_a_push_dry_run_writes_what_would_be_uploaded(
    small_checkpoint, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(
        "models.pretrained.hub.push", lambda *a, **k: pytest.fail("a dry run sends nothing")
    )
    run(small_checkpoint, "--push", "user/name", "--push-dry-run", tmp_path / "up")
    names = {p.name for p in small_checkpoint.iterdir()} | {"README.md"}
    assert {p.name for p in (tmp_path / "up").iterdir()} == names
    assert 'from_pretrained("user/name")' in (tmp_path / "up" / "README.md").read_text()
    chats = [Chat.load(d) for d in (small_checkpoint, tmp_path / "up")]
    one, two = (chat("What is it?", sampling=Sampling(max_new_tokens=8)) for chat in chats)
    assert one == two


def test_error_messages(small_checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    assert "needs one of --out, --push" in refused(capsys, small_checkpoint)
    assert "needs one of" in refused(capsys, small_checkpoint, "--out", out, "--push", "user/name")
    assert "use --out" in refused(capsys, small_checkpoint, "--to", "nanovlm", "--push", "u/n")
    assert "no such checkpoint" in refused(capsys, tmp_path / "nowhere", "--out", out)
    assert "is not a repository name" in refused(capsys, small_checkpoint, "--push", "name")
    missing = tmp_path / "missing" / "out"
    assert "its parent folder does not exist" in refused(capsys, small_checkpoint, "--out", missing)
    assert not out.exists() and not list(tmp_path.iterdir())
    assert "already exists" in refused(capsys, small_checkpoint, "--out", tmp_path)


def test_an_encoder_that_idefics3_does_not_support(
    minute_config, tiny_processor, lively, tmp_path, capsys
):
    """The files have model_type `picovlm`, and a line is printed."""
    cfg = minute_config(vit_cls_flag=True)
    model = lively(VisionLanguageModel(cfg))
    model.save_pretrained(tmp_path / "cls", replace(tiny_processor, cfg=cfg))
    run(tmp_path / "cls", "--out", tmp_path / "copy")
    out = capsys.readouterr().out
    assert "Idefics3 format does not support vit_cls_flag = True" in out
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["model_type"] == "picovlm"
    chats = [Chat.load(tmp_path / name) for name in ("cls", "copy")]
    assert chats[0]("What?", sampling=Sampling(max_new_tokens=6)) == chats[1](
        "What?", sampling=Sampling(max_new_tokens=6)
    )
    run(tmp_path / "cls", "--push-dry-run", tmp_path / "up")
    card = (tmp_path / "up" / "README.md").read_text()
    assert 'library_name: "picovlm"' in card and "AutoProcessor" not in card
    capsys.readouterr()
    message = refused(capsys, tmp_path / "cls", "--to", "nanovlm", "--out", tmp_path / "no")
    assert "nanoVLM does not support vit_cls_flag = True" in message
    assert not (tmp_path / "no").exists()
