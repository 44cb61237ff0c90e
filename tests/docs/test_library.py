"""docs/library.md is true: its code runs in order, in another folder, without a path being set."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parent.parent.parent


def test_code_runs_in_another_folder(tmp_path):
    """The repository is importable after `pip install -e .`, even beside a folder named data."""
    page = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
    for name, color in (("cat", "red"), ("dog", "blue")):
        Image.new("RGB", (60, 40), color).save(tmp_path / f"{name}.png")
    (tmp_path / "data").mkdir()
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    outputs = []
    for number, code in enumerate(re.findall("```python\n(.*?)```", page, re.S)):
        script = tmp_path / f"script_{number}.py"
        script.write_text(code, encoding="utf-8")
        done = subprocess.run([sys.executable, script], cwd=tmp_path, env=env,
                              capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    loop, ask, embeddings, transformers = outputs
    assert float(loop.split()[-1]) < 0.1, "two rows are memorised"
    assert ask.splitlines()[:2] == ["a cat", "a dog"]
    assert sorted(ask.splitlines()[2:]) == ["0 a cat", "1 a dog"]
    assert embeddings == "(1, 36, 128)\n"
    assert transformers == "Idefics3ForConditionalGeneration\n"
