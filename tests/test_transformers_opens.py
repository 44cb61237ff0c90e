"""transformers loads picoVLM's checkpoints without this repository and gives the same answers.

Tested with the installed version, and with older ones in separate environments (slow).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from configs import PRESETS
from data import processor as processors
from data.images import normalise
from engine.inference.chat import Chat
from models.inference.sampling import Sampling
from models.vision_language_model import VisionLanguageModel

ROOT = Path(__file__).parent.parent
NEW = 12
SCRIPT = """
import json, sys
asked, answers, arrays = json.load(sys.stdin), [], {}
sys.path = [path for path in sys.path if path != asked["repository"]]  # an editable installation
for name in ("models", "configs", "data", "engine"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(f"{name} can be imported here")
import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained(asked["folder"])
model = AutoModelForImageTextToText.from_pretrained(asked["folder"]).float().eval()
for i, (question, paths) in enumerate(asked["questions"]):
    content = [{"type": "image"} for _ in paths] + [{"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=text, images=[Image.open(p) for p in paths], return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[0, -8:]
    new = model.generate(**inputs, do_sample=False, max_new_tokens=asked["new"])
    new = new[:, inputs["input_ids"].shape[1] :]
    answers.append(processor.batch_decode(new, skip_special_tokens=True)[0].strip())
    arrays |= {f"ids{i}": inputs["input_ids"][0], f"pixels{i}": inputs["pixel_values"][0]}
    arrays[f"logits{i}"] = logits
np.savez(asked["out"], **{name: x.numpy() for name, x in arrays.items()})
print(json.dumps(answers))
"""
WORDS = ["What color is it?", "Describe the picture.", "How many circles are there?",
         "Is there a square?", "Where is 7 of 42?"]  # fmt: skip


MODES = [("RGB", "png"), ("L", "png"), ("CMYK", "jpg")]


def make_questions(folder: Path, n: int, modes=MODES) -> list[tuple[str, list[str]]]:
    """Questions about images of odd sizes and modes; every seventh has two."""
    rng, paths = np.random.default_rng(0), []
    for i in range(n):
        width, height = (int(x) for x in rng.integers(5, 320, 2))
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        mode, kind = modes[i % len(modes)]
        path = folder / f"{i}.{kind}"
        small.resize((width, height), Image.Resampling.BICUBIC).convert(mode).save(path)
        paths.append(str(path))
    return [(WORDS[i % 5], [paths[i], paths[i - 1]][: 1 + (i % 7 == 6)]) for i in range(n)]


def ask_transformers(folder: Path, questions, at: Path, python: str = sys.executable):
    """(answers, arrays) of a process that cannot import this repository."""
    script = at / "ask.py"
    script.write_text(SCRIPT)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    asked = {"repository": str(ROOT), "folder": str(folder), "questions": questions, "new": NEW,
             "out": str(at / "out.npz")}  # fmt: skip
    done = subprocess.run(
        [python, str(script)], cwd=at, env=env, input=json.dumps(asked), capture_output=True,
        text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), np.load(at / "out.npz")


@torch.no_grad()
def compare(folder: Path, questions, at: Path, python: str = sys.executable) -> dict[str, float]:
    """Compare with transformers: largest difference of pixels and logits, equal answers."""
    answers, arrays = ask_transformers(folder, questions, at, python)
    chat = Chat.load(folder)
    worst, same = {"pixels": 0.0, "logits": 0.0}, 0
    for i, (question, paths) in enumerate(questions):
        tokens = chat.encode_prompt(question, paths)
        assert tokens.ids.tolist() == arrays[f"ids{i}"].tolist(), (question, paths)
        pixels = normalise(tokens.tiles, chat.processor.cfg)
        logits, _ = chat.model(torch.from_numpy(tokens.ids)[None].long(), pixels)
        for name, value in (("pixels", pixels), ("logits", logits[0, -8:])):
            difference = np.abs(value.numpy() - arrays[f"{name}{i}"]).max()
            worst[name] = max(worst[name], float(difference))
        same += chat(question, paths, Sampling(max_new_tokens=NEW)) == answers[i]
    return worst | {"same": same / len(questions), "distinct": len(set(answers))}


TILED = {"vit_img_size": 32, "vit_patch_size": 8, "max_img_size": 64}


@pytest.fixture
def saved(tmp_path, tiny_processor, minute_config, lively):
    """`saved(**model fields)` -> a directory of random weights that react to images and text."""

    def save(**fields) -> Path:
        cfg = minute_config(**fields)
        # A fresh model ignores its inputs; much larger weights make logits too coarse to compare.
        torch.manual_seed(0)
        model = lively(VisionLanguageModel(cfg))
        model.save_pretrained(tmp_path / "saved", replace(tiny_processor, cfg=cfg))
        return tmp_path / "saved"

    return save


@pytest.mark.parametrize(
    "tiling, tied",
    [
        pytest.param({}, True, id="untiled-tied"),
        pytest.param(TILED, False, id="tiled-untied"),
        pytest.param({}, False, id="untiled-untied", marks=pytest.mark.slow),
        pytest.param(TILED, True, id="tiled-tied", marks=pytest.mark.slow),
    ],
)
def test_transformers_gives_the_same_answers(tiling, tied, saved, tmp_path):
    found = compare(saved(lm_tie_weights=tied, **tiling), make_questions(tmp_path, 8), tmp_path)
    assert found["same"] == 1 and found["distinct"] > 3, found
    assert found["pixels"] < 1e-6 and found["logits"] < 1e-4, found


def smollm2(shared: Path, minute_config, lively, tmp_path: Path) -> Path:
    """A small model with SmolLM2's tokenizer and SmolVLM's token ids."""
    real = PRESETS["460m"].model
    names = ("lm_vocab_size", "vlm_pad_token_id", "vlm_bos_token_id", "vlm_eos_token_id",
             "vlm_image_token_id")  # fmt: skip
    ids = {name: getattr(real, name) for name in names}
    cfg = minute_config(**ids, **TILED, lm_tokenizer=str(shared / "tokenizers" / "smollm2"))
    folder = tmp_path / "smollm2"
    torch.manual_seed(0)
    lively(VisionLanguageModel(cfg)).save_pretrained(folder, processors.build(cfg))
    return folder


def test_the_same_answers_with_smollm2s_tokenizer(shared, minute_config, lively, tmp_path):
    folder = smollm2(shared, minute_config, lively, tmp_path)
    found = compare(folder, make_questions(tmp_path, 8), tmp_path)
    assert found["same"] == 1 and found["pixels"] < 1e-6 and found["logits"] < 1e-4, found


# --- A hundred questions, a trained model, older versions ----------------------------------------


@pytest.fixture(params=["trained", "tiled", "smollm2"])
def folder(request, tmp_path):
    if request.param == "trained":
        runs = sorted((ROOT / "runs" / "demo").glob("step-*"))
        if not runs:
            pytest.skip("runs/demo is absent: make demo trains it")
        return runs[-1]
    if request.param == "tiled":
        return request.getfixturevalue("saved")(lm_tie_weights=False, **TILED)
    parts = [request.getfixturevalue(name) for name in ("shared", "minute_config", "lively")]
    return smollm2(*parts, tmp_path)


def environment(version: str) -> str:
    """Python of an environment with this transformers and the installed Pillow; created if missing.

    Pillow 13 rounds a resized pixel differently from 12.
    """
    home = Path(tempfile.gettempdir()) / f"picovlm-transformers-{version}"
    python = home / "bin" / "python"
    if not (home / "whole").exists():
        wanted = [f"transformers=={version}", f"torch=={torch.__version__.split('+')[0]}",
                  f"pillow=={PIL.__version__}", "jinja2", "numpy"]  # fmt: skip
        try:
            shutil.rmtree(home, ignore_errors=True)  # an interrupted installation
            subprocess.run([sys.executable, "-m", "venv", home], check=True, timeout=120)
            subprocess.run(
                [python, "-m", "pip", "install", "-q", *wanted],
                check=True, timeout=1200, capture_output=True,
            )  # fmt: skip
            (home / "whole").touch()
        except (subprocess.SubprocessError, OSError) as error:
            shutil.rmtree(home, ignore_errors=True)
            pytest.skip(f"no environment with transformers {version}: {error}")
    return str(python)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["here", "4.57.1", "4.50.3"])
def test_a_hundred_questions(version, folder, tmp_path, record_property):
    """100 questions to three models, with the installed transformers and two older versions.

    4.57 shifts patch positions by one in fp32, in SmolVLM too, so the test is an expected failure.
    Versions before 5 do not convert images to RGB, so they only get RGB images.
    4.50 rounds rotary angles differently, which changes a logit of 35 by up to 1.5e-4, so only its
    answers are compared.
    """
    python = sys.executable if version == "here" else environment(version)
    questions = make_questions(tmp_path, 100, MODES if version == "here" else MODES[:1])
    found = compare(folder, questions, tmp_path, python)
    print(f"\ntransformers {version}, {folder.name}: {found}")
    record_property("found", found)
    assert found["pixels"] < 1e-6, found
    if version == "4.57.1":
        pytest.xfail(f"huggingface/transformers issue 41190: {found}")
    assert found["same"] == 1, found
    assert found["logits"] < 1e-4 or version != "here", found
