"""What we save, transformers alone opens: no line of this repository, and the same answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from engine.chat import Chat
from models.generation import Sampling
from models.vision_language_model import VisionLanguageModel

NEW = 12
STRANGER = """
import json, sys
for name in ("models", "configs", "data", "engine"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(f"{name} can be imported here")
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

asked, answers = json.load(sys.stdin), []
processor = AutoProcessor.from_pretrained(asked["folder"])
model = AutoModelForImageTextToText.from_pretrained(asked["folder"], dtype=torch.float32).eval()
for question, paths in asked["questions"]:
    content = [{"type": "image"} for _ in paths] + [{"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=text, images=[Image.open(p) for p in paths], return_tensors="pt")
    new = model.generate(**inputs, do_sample=False, max_new_tokens=asked["new"])
    new = new[:, inputs["input_ids"].shape[1] :]
    answers.append(processor.batch_decode(new, skip_special_tokens=True)[0].strip())
print(json.dumps(answers))
"""


@pytest.fixture
def questions(tmp_path) -> list[tuple[str, list[str]]]:
    """Five questions about pictures of odd sizes, one of them CMYK."""

    def picture(width: int, height: int, name: str, mode: str = "RGB") -> str:
        rng = np.random.default_rng(width)
        small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        image.convert(mode).save(tmp_path / name)
        return str(tmp_path / name)

    a, b = picture(32, 70, "a.png"), picture(48, 48, "b.png")
    c, d = picture(300, 200, "c.png"), picture(81, 57, "d.jpg", "CMYK")
    return [
        ("What color is it?", [a]),
        ("Describe the picture.", [b]),
        ("How many circles are there?", [c]),
        ("Is there a square?", [d]),
        ("Which is bigger, the first or the second?", [c, a]),
    ]


@pytest.mark.parametrize(
    "changes",
    [{}, {"vit_img_size": 32, "vit_patch_size": 8, "max_img_size": 64}],
    ids=["untiled", "tiled"],
)
def test_a_stranger_gets_our_answers(
    changes, questions, tmp_path, tiny_processor, minute_config, lively
):
    cfg = minute_config(lm_tie_weights=False, **changes)
    model = lively(VisionLanguageModel(cfg))
    folder = tmp_path / "saved"
    model.save_pretrained(folder, replace(tiny_processor, cfg=cfg))

    chat = Chat.load(folder)
    ours = [chat(q, paths, Sampling(max_new_tokens=NEW)) for q, paths in questions]
    assert len(set(ours)) == len(ours)

    script = tmp_path / "stranger.py"
    script.write_text(STRANGER)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    asked = {"folder": str(folder), "questions": questions, "new": NEW}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=env, input=json.dumps(asked),
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == ours
