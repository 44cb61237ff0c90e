"""The model card: figures come from the files of the run."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml
from PIL import Image

import train
from cli import command
from config_tools import InputError, read_json
from configs import DataConfig, RunConfig, TrainConfig, VLMConfig
from engine.publishing import model_card


@pytest.fixture
def finished(run_file, tmp_path, capsys):
    """A run of four steps with a score and a loss curve."""
    config = run_file(save_every=2)
    command(train.main, [str(config), "--train.steps", "4"])
    run = tmp_path / "run"
    skills = {"what": {"accuracy": 0.5, "interval": [0.4, 0.6], "blind": None, "n": 10}}
    score = {"accuracy": 0.75, "interval": [0.7, 0.8], "blind": 0.25, "n": 20, "skills": skills}
    (run / "score.json").write_text(json.dumps(score))
    if not (run / "loss.png").exists():  # matplotlib is optional
        Image.new("RGB", (4, 4)).save(run / "loss.png")
    return run


def test_an_invalid_score_and_a_damaged_state(finished, tmp_path):
    (finished / "score.json").write_text('{"accuracy": 0.5}')
    with pytest.raises(InputError, match=r"score\.json: not a result of score\.py --json"):
        model_card.write_repository(finished, tmp_path / "up", "user/name")
    (finished / "step-000004" / "state.pt").write_bytes(b"half")
    with pytest.raises(InputError, match=r"state\.pt: damaged"):
        model_card.write_repository(finished, tmp_path / "up", "user/name")


def test_the_card_of_a_run(finished, tmp_path):
    model_card.write_repository(finished, tmp_path / "up", "user/name")
    card = (tmp_path / "up" / "README.md").read_text()
    _, head, body = card.split("---\n", 2)
    head = yaml.safe_load(head)
    assert head == {
        "library_name": "transformers", "pipeline_tag": "image-text-to-text",
        "tags": ["picovlm", "vision-language-model"],
    }  # fmt: skip
    events = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    last = [e["loss"] for e in events if "loss" in e][-1]
    record = model_card.read_record(finished / "step-000004")
    for words in (
        "# name", "| steps | 4 of 4 |", f"| last loss | {last:.4f} |", f"commit {record['git']}",
        f"| hardware | {record['hardware']} |", f"| data | {record['data']} |",
        "| what | 50.0% | 40.0% - 60.0% | - | 10 |", "| all | 75.0% | 70.0% - 80.0% | 25.0% | 20 |",
        "python train.py train_config.json", "![training loss and validation accuracy](loss.png)",
        'AutoModelForImageTextToText.from_pretrained("user/name")', 'Chat.load("user/name")',
        "| language | ", "| random weights |", "No license is set",
    ):  # fmt: skip
        assert words in body, words
    config = read_json(tmp_path / "up" / "train_config.json")
    assert config["model"] == read_json(finished / "config.json")["model"]
    assert config["train"]["out"] == finished.name, "without its folders, which are private"
    assert {"model.safetensors", "tokenizer.json", "loss.png"} <= {
        p.name for p in (tmp_path / "up").iterdir()
    } and not (tmp_path / "up" / "state.pt").exists()


def test_a_checkpoint_without_a_run(small_checkpoint, tmp_path):
    """The card has no training and score sections."""
    model_card.write_repository(small_checkpoint, tmp_path / "up", "user/name")
    card = (tmp_path / "up" / "README.md").read_text()
    assert "## Training" not in card and "## Scores" not in card and "loss.png" not in card
    assert not (tmp_path / "up" / "train_config.json").exists()


def test_the_fingerprint_changes_with_the_rows(rows_file, tmp_path):
    copy = tmp_path / "rows.jsonl"
    shutil.copy(rows_file, copy)
    before = model_card.fingerprint(str(copy), 0)
    assert before == model_card.fingerprint(str(rows_file), 1)
    copy.write_text(copy.read_text() + "\n")
    assert model_card.fingerprint(str(copy), 0) != before
    assert model_card.fingerprint("world", 3) == "the built-in world, seed 3"
    assert "not available" in model_card.fingerprint(str(tmp_path / "gone.jsonl"), 0)


def test_hours_of_a_resumed_run():
    """Resuming restarts `seconds` at 0: here after 100 s; then 50 s follow."""
    events = [{"seconds": s} for s in (10, 60, 100, 5, 50)]
    assert model_card.hours(events) == pytest.approx(150 / 3600)
    assert model_card.hours([]) == 0


@pytest.mark.parametrize(
    ("vision", "language", "licence"),
    [
        ("", "", ""),
        ("google/siglip2-base-patch16-512", "HuggingFaceTB/SmolLM2-135M", "apache-2.0"),
        ("openai/clip-vit-base-patch16", "HuggingFaceTB/SmolLM2-135M", "other"),
        ("", "somebody/model", "other"),
        ("openai/clip-vit-base-patch16", "", "mit"),
    ],
)
def test_the_license_of_the_backbones(vision, language, licence):
    assert model_card.licence(VLMConfig(vit_model_type=vision, lm_model_type=language)) == licence


@pytest.fixture
def foreign(small_checkpoint, tmp_path):
    """A checkpoint as transformers saves it: without picoVLM's section of config.json."""
    folder = tmp_path / "foreign"
    shutil.copytree(small_checkpoint, folder)
    config = read_json(folder / "config.json")
    del config["picovlm"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def name_origin(folder, name: str) -> None:
    config = read_json(folder / "config.json") | {"_name_or_path": name}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(("name", "origin", "licence"), [
    ("HuggingFaceTB/SmolVLM-256M-Instruct", "HuggingFaceTB/SmolVLM-256M-Instruct", "apache-2.0"),
    ("/home/me/secret/model", "foreign (local)", "other"), ("", "foreign (local)", "other"),
])  # fmt: skip
def test_the_origin_survives_two_rounds_of_fine_tuning(foreign, tmp_path, name, origin, licence):
    """Never MIT or random weights for somebody else's model, and no private folder."""
    name_origin(foreign, name)
    source = foreign
    for round_ in ("first", "second"):
        cfg = RunConfig(data=DataConfig(max_length=256), train=TrainConfig(init_from=str(source)))
        cfg, model, processor = train.build(cfg)
        assert cfg.model.vlm_base_models == (origin,)
        source = tmp_path / round_
        model.save_pretrained(source, processor)
    model_card.write_repository(source, tmp_path / "up", "user/name")
    card = (tmp_path / "up" / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["license"] == licence
    assert head.get("base_model", []) == ([origin] if "/" in origin else [])
    assert card.count(f"| {origin} |") == 3 and "random weights" not in card
    for file in (tmp_path / "up").glob("*.*"):
        content = file.read_bytes()
        assert b"secret" not in content and str(tmp_path).encode() not in content, file


@pytest.mark.parametrize("is_own", [False, True])
def test_a_model_from_the_cache_of_the_hub_keeps_its_id(
    foreign, small_checkpoint, tmp_path, is_own
):
    """Scripts resolve a Hub id to its folder in the cache before they load the model."""
    cached = tmp_path / "models--user--some-name" / "snapshots" / "0123abc"
    shutil.copytree(small_checkpoint if is_own else foreign, cached)
    data, start = DataConfig(max_length=256), TrainConfig(init_from=str(cached))
    cfg, _, _ = train.build(RunConfig(data=data, train=start))
    assert cfg.model.vlm_base_models == ("user/some-name",)


@pytest.mark.parametrize(("text", "public"), [
    ("/home/me/data/my.jsonl=0.7 world=0.3", "my.jsonl=0.7 world=0.3"), ("runs/demo", "runs/demo"),
    ("hf:owner/name", "hf:owner/name"), ("~/models/siglip", "siglip"), ("C:\\models\\x", "x"),
])  # fmt: skip
def test_folders_of_absolute_paths_are_not_published(text, public):
    assert model_card.without_folders(text) == public
