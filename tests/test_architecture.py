"""The architecture: who may import whom, file limits, plain model files, silent imports."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CONFIGS = ("config_tools", "configs", "configs_classify", "cli")
ARCHITECTURE = (
    "models.vision_transformer",
    "models.modality_projector",
    "models.language_model",
    "models.vision_language_model",
    "models.classifier",
)
MIXIN = "models.pretrained.mixin"
# A module, or all modules of a package -> what it may import. The longest name that fits counts.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "config_tools": (),
    "configs": ("config_tools",),
    "configs_classify": ("config_tools", "configs"),
    "cli": ("config_tools", "configs", "configs_classify"),
    "models.ops": ("configs", "models.ops"),
    MIXIN: (),
    **dict.fromkeys(ARCHITECTURE, ("configs", "models.ops", MIXIN, *ARCHITECTURE)),
    "models.inference": (*CONFIGS, "models.ops", "models.inference", *ARCHITECTURE),
    "models.inspect": (*CONFIGS, "models.ops", *ARCHITECTURE),
    "models.pretrained": (
        *CONFIGS,
        "models.ops",
        "models.pretrained",
        "models.inference.int8",
        *ARCHITECTURE,
    ),
    "models.pretrained.layouts": (
        *CONFIGS,
        "models.pretrained.layouts",
        "models.pretrained.mapping",
    ),
    "data": (*CONFIGS, "data"),
    "engine": (*CONFIGS, "models", "data", "engine"),
    "tasks": (*CONFIGS, "data", "engine"),
}
SCRIPTS_MAY_IMPORT = (*CONFIGS, "models", "data", "engine", "tasks")
# Imports inside functions that the table above does not allow.
AT_CALL_TIME = {
    (MIXIN, "models.pretrained.load"),
    (MIXIN, "models.pretrained.save"),
    (MIXIN, "models.pretrained.hub"),
    ("models.vision_language_model", "models.inference.generate"),
}
# Optional or slow packages: imported by the function that needs them.
LAZY = {"datasets", "huggingface_hub", "wandb", "gradio", "peft", "matplotlib", "torchao",
        "pycocoevalcap", "faiss", "onnx"}  # fmt: skip
DISTRIBUTED = {"engine.training.distributed", "engine.training.checkpoint"}
MAX_LINES = {
    "models.vision_transformer": 200,
    "models.language_model": 200,
    "models.vision_language_model": 170,
    "models.modality_projector": 45,
    "configs": 600,
}
MAX_LINES_OF_A_FILE, MAX_FILES_OF_A_FOLDER = 400, 9
MAX_LINES_OF_A_FUNCTION, MAX_LINES_OF_THE_LOOP = 60, 80
# What the plain architecture files leave to models/ops.
NOT_PLAIN = ("autograd.Function", "torch.cuda", "torch.__version__", "device.type", "torch.compile",
             "_dynamo", "sysconf", "is_compiling")  # fmt: skip
READING_PATH = (
    "docs/how_it_works.md",
    "models/modality_projector.py",
    "models/vision_language_model.py",
    "models/vision_transformer.py",
    "models/language_model.py",
    "data/text.py",
    "data/processor.py",
    "engine/training/loop.py",
    "train.py",
)


def modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file of every module of the project."""
    files = [*root.glob("*.py")]
    for package in ("models", "data", "engine", "tasks"):
        files += (root / package).rglob("*.py")
    names = {f: ".".join(f.relative_to(root).with_suffix("").parts) for f in files}
    return {name.removesuffix(".__init__"): f for f, name in names.items()}


def other_files(root: Path) -> dict[str, Path]:
    """Dotted name -> file of what no module imports: benchmarks, scripts of docs, tests."""
    files = [*(root / "benchmarks").rglob("*.py"), *(root / "docs").glob("*.py")]
    files += (root / "tests").rglob("*.py")
    return {".".join(f.relative_to(root).with_suffix("").parts): f for f in files}


def imports(tree: ast.Module) -> list[tuple[str, bool, int]]:
    """(dotted name, whether inside a function, line) of every import, `from a import b` as a.b.

    Imports for type checkers only do not count.
    """
    found = []

    def visit(node: ast.AST, inside: bool) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, inside, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (node.module or "")
            found.extend((f"{start}.{alias.name}", inside, node.lineno) for alias in node.names)
        inside = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(tree, False)
    return found


def is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def may_import(importer: str, imported: str) -> bool:
    fitting = [name for name in MAY_IMPORT if is_in(importer, name)]
    allowed = MAY_IMPORT[max(fitting, key=len)] if fitting else SCRIPTS_MAY_IMPORT
    return any(is_in(imported, name) for name in allowed)


def module_of(name: str, known: dict[str, Path]) -> str | None:
    """The project's module that an imported name belongs to."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        if ".".join(parts[:n]) in known:
            return ".".join(parts[:n])
    return name.rpartition(".")[0] if parts[0] in ("models", "data", "engine", "tasks") else None


@cache
def problems_of_file(name: str, text: str) -> tuple[str, ...]:
    """What is wrong with a file by itself; the same text is checked once."""
    tree, found = ast.parse(text, name), []
    limit = MAX_LINES.get(name, MAX_LINES_OF_A_FILE)
    if (n := len(text.splitlines())) > limit:
        found.append(f"{name}: {n} lines are more than {limit}")
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            is_loop = (name, node.name) == ("engine.training.loop", "train")
            limit = MAX_LINES_OF_THE_LOOP if is_loop else MAX_LINES_OF_A_FUNCTION
            if (n := node.end_lineno - node.lineno + 1) > limit:
                found.append(f"{name}.{node.name}: {n} lines are more than {limit}")
    if name in ARCHITECTURE:
        found += [f"{name}: {word} belongs in models/ops" for word in NOT_PLAIN if word in text]
    return tuple(found)


@cache
def problems_of_imports(name: str, text: str) -> tuple[tuple, tuple[str, ...]]:
    """(imports, problems that need no other file)."""
    tree = ast.parse(text, name)
    found = [
        f"{name} line {node.lineno}: torch.distributed"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "distributed"
        if ast.unparse(node) == "torch.distributed" and name not in DISTRIBUTED
    ]
    for imported, inside, line in imports(tree):
        top = imported.split(".")[0]
        if imported.startswith("."):
            found.append(f"{name} line {line}: relative import")
        if top in LAZY and not inside:
            found.append(f"{name} line {line}: {top} belongs inside a function")
        if is_in(imported, "torch.distributed") and name not in DISTRIBUTED:
            found.append(f"{name} line {line}: torch.distributed")
        if name in ARCHITECTURE and top in ("os", "sys", "pathlib", "json", "time"):
            found.append(f"{name} line {line}: {top} does not belong in the architecture")
    return tuple(imports(tree)), tuple(found)


def problems(root: Path) -> list[str]:
    """Everything in a tree that breaks the rules."""
    known, found, graph = modules(root), [], {}
    for name, path in (known | other_files(root)).items():
        found += problems_of_file(name, path.read_text(encoding="utf-8"))
    for name, path in known.items():
        imported_names, alone = problems_of_imports(name, path.read_text(encoding="utf-8"))
        found += alone
        graph[name] = set()
        for imported, inside, line in imported_names:
            target = module_of(imported, known)
            if target is None or target == name:
                continue
            if not inside:
                graph[name].add(target)
            if not may_import(name, target) and not (inside and (name, target) in AT_CALL_TIME):
                found.append(f"{name} line {line}: may not import {target}")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append(f"cycle: {' -> '.join(error.args[1])}")
    for package in ("models", "data", "engine"):
        for folder in (root / package, *(f for f in (root / package).rglob("*") if f.is_dir())):
            if (n := len(list(folder.glob("*.py")))) > MAX_FILES_OF_A_FOLDER:
                name = folder.relative_to(root)
                found.append(f"{name}: {n} files are more than {MAX_FILES_OF_A_FOLDER}")
    return found


def test_the_rules_hold():
    assert problems(ROOT) == []


# (file, a line that breaks a rule, what is said)
BREAKS = [
    ("models/ops/rope.py", "from models.language_model import RMSNorm",
     "may not import models.language_model"),
    ("models/vision_transformer.py", "from models.inference.sampling import Sampling",
     "may not import models.inference.sampling"),
    ("models/language_model.py", "x = torch.compile", "torch.compile belongs in models/ops"),
    ("models/vision_language_model.py", "import os", "os does not belong in the architecture"),
    ("models/vision_language_model.py", "from models.pretrained import load",
     "may not import models.pretrained.load"),
    ("models/vision_transformer.py", "#\n" * 20, "lines are more than 200"),
    ("models/inference/generate.py", "from data.types import IGNORE", "may not import data.types"),
    ("models/inspect/rollout.py", "import models.pretrained.hub", "may not import models.pretr"),
    ("data/batches/loader.py", "import models.ops.rope", "may not import models.ops.rope"),
    ("data/types.py", "from data.batches import loader", "cycle"),
    ("engine/evaluation/metrics.py", "from engine.evaluation import evaluate", "cycle"),
    ("engine/training/loop.py", "from tasks import world", "may not import tasks.world"),
    ("tasks/world.py", "import models.language_model", "may not import models.language_model"),
    ("generate.py", "import score", "may not import score"),
    ("configs.py", "import train", "may not import train"),
    ("config_tools.py", "from configs import ViTConfig", "may not import configs"),
    ("engine/training/loop.py", "import torch.distributed as d", "torch.distributed"),
    ("engine/training/optim.py", "from torch import distributed", "torch.distributed"),
    ("engine/training/loop.py", "x = torch.distributed.is_initialized()", "torch.distributed"),
    ("engine/training/logger.py", "import matplotlib.pyplot", "matplotlib belongs inside"),
    ("data/text.py", "from huggingface_hub import hf_hub_download", "huggingface_hub belongs"),
    ("engine/training/optim.py", "from .loop import train", "relative import"),
    ("engine/evaluation/metrics.py", "#\n" * 400, "lines are more than 400"),
    ("engine/evaluation/metrics.py", "def long():\n" + "    x = 1\n" * 60, "long: 61 lines"),
    ("benchmarks/speed/compare.py", "#\n" * 400, "benchmarks.speed.compare: "),
    ("docs/easy_vqa.py", "def long():\n" + "    x = 1\n" * 60, "docs.easy_vqa.long: 61 lines"),
    ("tests/data/test_text.py", "#\n" * 400, "tests.data.test_text: "),
    ("tests/forked.py", "async def long():\n" + "    x = 1\n" * 60, "tests.forked.long: 61"),
    ("models/ops/a.py", "", "models/ops: 10 files are more than 9"),
]  # fmt: skip


def test_the_checker_sees_every_kind_of_break(tmp_path):
    for path in (modules(ROOT) | other_files(ROOT)).values():
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    assert problems(tmp_path) == []
    for files, line, says in BREAKS:
        paths = [tmp_path / file for file in files.split()]
        before = [path.read_text() if path.exists() else None for path in paths]
        for path, text in zip(paths, before):
            path.write_text((text or "") + "\n" + line + "\n")
        found = problems(tmp_path)
        assert any(says in problem for problem in found), (files, line, found)
        for path, text in zip(paths, before):
            path.unlink() if text is None else path.write_text(text)


def test_the_reading_path_is_one_sitting():
    """The files a student reads, in the README's order, in under 1,500 lines."""
    lines = {name: len((ROOT / name).read_text().splitlines()) for name in READING_PATH}
    assert sum(lines.values()) < 1500, lines
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    path = readme[readme.index("## Reading path") :]
    places = [path.index(name) for name in READING_PATH]
    assert places == sorted(places)
    for name, n in lines.items():
        said = int(re.search(rf"\| \[`?{re.escape(name)}`?\]\([^)]*\) \| (\d+) \|", path)[1])
        assert abs(said - n) <= 10, (name, said, n)


WATCH = """
import os, random, sys, threading
import numpy as np, torch
before = dict(os.environ), random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()
threads, opened = threading.active_count(), []
def hook(event, args):
    if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        opened.append(args[0])
    elif event in ("os.mkdir", "os.rename", "os.remove", "socket.connect", "subprocess.Popen"):
        opened.append((event, args))
sys.dont_write_bytecode = True
sys.addaudithook(hook)
for name in sys.argv[1:]:
    __import__(name)
assert threading.active_count() == threads, threading.enumerate()
written = [x for x in opened if not str(x).endswith(".pyc")]
assert not written, written
assert dict(os.environ) == before[0], set(os.environ.items()) ^ set(before[0].items())
assert random.getstate() == before[1], "random"
assert torch.equal(torch.get_rng_state(), before[2]), "torch"
assert (np.random.get_state()[1] == before[3]).all(), "numpy"
"""


def in_fresh_process(cwd: Path, *argv: str) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *argv], cwd=cwd, env=env, capture_output=True, text=True, timeout=120
    )


def test_an_import_does_nothing_else(tmp_path):
    done = in_fresh_process(tmp_path, "-c", WATCH, *sorted(modules(ROOT)))
    assert done.returncode == 0, done.stderr[-2000:]
    assert (done.stdout, list(tmp_path.iterdir())) == ("", [])


@pytest.mark.parametrize(
    ("name", "absent"),
    [
        ("configs", ["torch", "numpy", "tyro", "PIL"]),
        ("models.vision_language_model", ["transformers", "datasets", "PIL", "tokenizers", "data"]),
    ],
)
def test_lower_layers_import_little(tmp_path, name, absent):
    script = f"import sys, {name}; print(*[n for n in {absent} if n in sys.modules])"
    done = in_fresh_process(tmp_path, "-c", script)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr[-2000:]


def test_a_model_is_read_without_the_compiler(tmp_path, small_checkpoint):
    """torch imports it to fill tensors that have no storage: a second at every start."""
    script = (
        "import sys, torch\nfrom models.vision_language_model import VisionLanguageModel as V\n"
        f"model = V.from_pretrained({str(small_checkpoint)!r})\n"
        "model.generate(torch.ones(1, 5, dtype=torch.long))\nprint('torch._dynamo' in sys.modules)"
    )
    done = in_fresh_process(tmp_path, "-c", script)
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr
