"""Who may import whom, how long a file may be, and what an import may do: nothing.

The floors are those of the house: a room imports from rooms that stand before it in its own list,
and from any room on a floor below.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PRETRAINED = [f"models.pretrained.{n}" for n in (
    "engine", "siglip", "clip", "vit", "dinov2", "llama", "idefics3", "nanovlm")]  # fmt: skip
# Each floor is a list of ladders; a room stands on one and sees the rungs below it.
FLOORS: list[list[list[str]]] = [
    [["configs_base", "configs", "configs_classify"]],
    [
        ["models.attention", "models.vision_transformer", "models.rollout",
         "models.classifier", "models.language_model",
         "models.modality_projector", "models.recorded", "models.compiled", "models.generation",
         "models.quantized",
         "models.attention_maps",
         "models.pretrained", *PRETRAINED],
        ["engine.distributed"], ["engine.optim"], ["engine.scoring"],
    ],
    [
        ["models.vision_language_model"],
        ["data.sample", "data.world", "data.text", "data.augment", "data.images", "data.tables",
         "data.readers", "data.schemas", "data.sources", "data.classes", "data.streams",
         "data.processor", "data.packing", "data.loader", "data.stream_loader", "data.preview",
         "data.views", "data.prepare"],
    ],
    [["models.hub", "models.checkpoint_files", "models.backbones",
      "engine.checkpoint", "engine.logger", "engine.chat", "engine.conversation", "engine.batch",
      "engine.look", "engine.evaluation", "engine.predictions", "engine.sheet", "engine.report",
      "engine.adapters", "engine.publish", "engine.classification", "engine.embedding",
      "engine.vit_card", "engine.vit_sheet", "engine.meter", "engine.loop", "engine.dry_run",
      *(f"tasks.{n}" for n in ("world", "rows", "mmstar", "pope", "scienceqa", "chartqa",
                               "textvqa", "docvqa", "coco_captions"))]],
]  # fmt: skip
SCRIPTS = len(FLOORS)
UP_STAIRS = {  # inside a function
    ("models.vision_language_model", "models.checkpoint_files"),
    ("models.vision_language_model", "models.hub"),
    ("models.vision_transformer", "models.backbones"),
    ("models.vision_transformer", "models.hub"),
    ("models.classifier", "models.hub"),
    ("models.language_model", "models.backbones"),
    ("models.language_model", "models.hub"),
    ("data.sources", "data.streams"),  # one door for every kind of source
}
ON_CALL = {
    "datasets",
    "huggingface_hub",
    "wandb",
    "gradio",
    "peft",
    "matplotlib",
    "torchao",
    "pycocoevalcap",
}
TALKS = {"engine.distributed", "engine.checkpoint"}  # to other processes
LONGEST_FILE, LONGEST_CONFIGS, LONGEST_FUNCTION, LONGEST_LOOP = 400, 600, 60, 80
PLACE = {
    room: (floor, ladder, rung)
    for floor, ladders in enumerate(FLOORS)
    for ladder, rooms in enumerate(ladders)
    for rung, room in enumerate(rooms)
}


def modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file of every module of the house."""
    files = [*root.glob("*.py")]
    for room in ("models", "data", "engine", "tasks"):
        files += (root / room).rglob("*.py")
    names = {f: ".".join(f.relative_to(root).with_suffix("").parts) for f in files}
    return {name.removesuffix(".__init__"): f for f, name in names.items()}


def others(root: Path) -> dict[str, Path]:
    """Dotted name -> file of what no room imports, which is read as much."""
    files = [*(root / "benchmarks").rglob("*.py"), *(root / "docs").glob("*.py")]
    files += (root / "tests").rglob("*.py")
    return {".".join(f.relative_to(root).with_suffix("").parts): f for f in files}


@cache
def read(name: str, text: str) -> tuple[tuple, tuple[str, ...]]:
    """(imports, problems of the file alone); the same text is read once."""
    tree = ast.parse(text, name)
    found = [
        f"{name} line {node.lineno}: torch.distributed"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "distributed"
        if ast.unparse(node) == "torch.distributed" and name not in TALKS
    ]
    return tuple(imports(tree)), (*found, *too_long(name, text))


def imports(tree: ast.Module) -> list[tuple[str, bool, int]]:
    """(dotted name, whether inside a function, line) of every import, `from a import b` as a.b."""
    found = []

    def visit(node: ast.AST, inside: bool) -> None:
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


def room_of(name: str, rooms: dict[str, Path]) -> str | None:
    """The module of the house that an imported name belongs to."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        if ".".join(parts[:n]) in rooms:
            return ".".join(parts[:n])
    return None


def may_import(importer: str, imported: str) -> bool:
    place = PLACE.get(importer, (SCRIPTS, 0, 0))
    target = PLACE.get(imported, (SCRIPTS, 0, 0))
    if {importer.split(".")[0], imported.split(".")[0]} == {"models", "data"}:
        return False
    if place[0] == target[0]:  # a neighbour must be on an earlier rung; scripts have no ladder
        return place[0] < SCRIPTS and place[1] == target[1] and target[2] < place[2]
    return target[0] < place[0]


def problems(root: Path) -> list[str]:
    """Everything in a tree that breaks the plan."""
    rooms, found, graph = modules(root), [], {}
    for name, path in others(root).items():
        found += too_long(name, path.read_text(encoding="utf-8"))
    for name, path in rooms.items():
        imported_names, alone = read(name, path.read_text(encoding="utf-8"))
        found += alone
        if "." in name and name not in PLACE:
            found.append(f"{name}: has no place in the floor plan")
        graph[name] = set()
        for imported, inside, line in imported_names:
            where = f"{name} line {line}"
            top = imported.split(".")[0]
            if imported.startswith("."):
                found.append(f"{where}: relative import")
            if top in ON_CALL and not inside:
                found.append(f"{where}: {top} belongs inside a function")
            if f"{imported}.".startswith("torch.distributed.") and name not in TALKS:
                found.append(f"{where}: torch.distributed")
            room = room_of(imported, rooms)
            if room is None and top in ("models", "data", "engine") and imported.count("."):
                room = room_of(top, rooms)  # a package has no file of its own
            if room is None or room == name:
                continue
            if not inside:
                graph[name].add(room)
            if not may_import(name, room) and not (inside and (name, room) in UP_STAIRS):
                found.append(f"{where}: may not import {room}")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append(f"cycle: {' -> '.join(error.args[1])}")
    return found


@cache
def too_long(name: str, text: str) -> tuple[str, ...]:
    found = []
    limit = LONGEST_CONFIGS if name == "configs" else LONGEST_FILE
    if (n := len(text.splitlines())) > limit:
        found.append(f"{name}: {n} lines are more than {limit}")
    for node in ast.walk(ast.parse(text, name)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            limit = LONGEST_LOOP if (name, node.name) == ("engine.loop", "train") \
                else LONGEST_FUNCTION  # fmt: skip
            if (n := node.end_lineno - node.lineno + 1) > limit:
                found.append(f"{name}.{node.name}: {n} lines are more than {limit}")
    return tuple(found)


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
ours = [x for x in opened if not str(x).endswith(".pyc")]
assert not ours, ours
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
def test_the_lower_floors_need_little(tmp_path, name, absent):
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
