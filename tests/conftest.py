"""Every test runs offline, from the repository root, on random weights of tiny shapes."""

import gc
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

from cli import command
from config_tools import to_dict
from configs import DataConfig, RunConfig, TrainConfig, VLMConfig
from data import processor as processors
from models.vision_language_model import VisionLanguageModel

SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("../shared/data is absent")
    return SHARED


@pytest.fixture(scope="session")
def tiny_processor() -> processors.Processor:
    return processors.build(VLMConfig())


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Randomize norms, biases and positions: ones and zeros would hide a mapping error."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1 or "position" in name:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model.eval()


@pytest.fixture
def tiny_model() -> VisionLanguageModel:
    torch.manual_seed(0)
    return randomise(VisionLanguageModel(VLMConfig()))


@pytest.fixture(name="randomise")
def randomise_fixture():
    return randomise


def small_config(**changes) -> VLMConfig:
    """Different sizes wherever possible, so that swapped dimensions raise an error."""
    sizes = dict(
        vit_img_size=16,
        vit_patch_size=4,
        vit_hidden_dim=32,
        vit_inter_dim=56,
        vit_n_heads=2,
        vit_n_blocks=2,
        lm_hidden_dim=48,
        lm_inter_dim=72,
        lm_n_heads=4,
        lm_n_kv_heads=2,
        lm_n_blocks=3,
        lm_vocab_size=101,
        lm_max_position_embeddings=128,
        max_img_size=16,
    )
    return VLMConfig(**(sizes | changes))


@pytest.fixture(name="small_config")
def small_config_fixture():
    return small_config


@pytest.fixture
def small_model():
    """Random weights of `small_config(**changes)`, in eval mode."""

    def build(**changes) -> VisionLanguageModel:
        torch.manual_seed(0)
        return randomise(VisionLanguageModel(small_config(**changes)))

    return build


@pytest.fixture
def make_sample():
    """Return (ids [T], images [n_tiles, 3, H, W]); a word precedes each tile's placeholders."""

    def make(cfg: VLMConfig, n_tiles: int, n_words: int, seed: int):
        g = torch.Generator().manual_seed(seed)
        words = torch.randint(4, cfg.lm_vocab_size, (n_words + n_tiles,), generator=g)
        tile = torch.full((cfg.tokens_per_tile,), cfg.vlm_image_token_id)
        parts = [part for i in range(n_tiles) for part in (words[i : i + 1], tile)]
        size = cfg.vit_img_size
        images = torch.randn(n_tiles, 3, size, size, generator=g)
        return torch.cat([*parts, words[n_tiles:]]), images

    return make


@pytest.fixture
def some_rows():
    """`some_rows(cfg, seed, packed)`: random arguments of a training step.

    Two rows of 40 to 59 tokens with 1 or 2 tiles; with `packed`, several samples per row.
    """

    def build(cfg, seed: int, packed: bool) -> dict:
        g = torch.Generator().manual_seed(seed)
        T, n_tiles = int(torch.randint(40, 60, (), generator=g)), 1 + seed % 2
        ids = torch.randint(4, cfg.lm_vocab_size, (2, T), generator=g)
        ids[0, : n_tiles * cfg.tokens_per_tile] = cfg.vlm_image_token_id
        size = cfg.vit_img_size
        images = torch.randn(n_tiles, 3, size, size, generator=g)
        positions, segments = torch.arange(T).expand(2, T), None
        if packed:
            starts = torch.randint(0, 2, (2, T), generator=g) * (positions >= 34)
            segments = 1 + starts.cumsum(1)
            positions = positions - (positions * starts).cummax(1).values
        return dict(input_ids=ids, images=images, targets=ids.roll(-1, 1), positions=positions,
                    segments=segments)  # fmt: skip

    return build


@pytest.fixture
def pad_rows():
    """Pad samples to (ids [B, T], images of all samples, attention_mask [B, T]) on `side`."""

    def pad(cfg: VLMConfig, samples: list, side: str):
        T = max(len(ids) for ids, _ in samples)
        rows = torch.full((len(samples), T), cfg.vlm_pad_token_id)
        mask = torch.zeros_like(rows)
        for row, (ids, _) in enumerate(samples):
            where = slice(0, len(ids)) if side == "right" else slice(T - len(ids), T)
            rows[row, where], mask[row, where] = ids, 1
        return rows, torch.cat([images for _, images in samples]), mask

    return pad


def lively(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Large weights, so that images and text change the answer; a fresh model ignores them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in randomise(model, seed).named_parameters():
            if p.ndim > 1:
                scale = 1.0 if "embedding" in name else 2 * p[0].numel() ** -0.5
                p.copy_(scale * torch.randn(p.shape, generator=generator))
    return model.eval()


@pytest.fixture(name="lively", scope="session")
def lively_fixture():
    return lively


# A model so small that a training step takes milliseconds; it has the world's tokenizer.
MINUTE = dict(
    vit_img_size=16,
    vit_patch_size=4,
    vit_hidden_dim=16,
    vit_inter_dim=32,
    vit_n_heads=2,
    vit_n_blocks=1,
    lm_hidden_dim=32,
    lm_inter_dim=48,
    lm_n_heads=2,
    lm_n_kv_heads=1,
    lm_n_blocks=2,
    max_img_size=16,
)


@pytest.fixture(name="minute_config", scope="session")
def minute_config_fixture():
    return lambda **changes: VLMConfig(**(MINUTE | changes))


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory) -> Path:
    """24 rows, each with a different image; answers are 1 to 5 words long."""
    folder = tmp_path_factory.mktemp("rows")
    rows = []
    for i in range(24):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 16 + i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        row = {"image": f"{i}.png", "question": f"What is {i}?", "answer": "red " * (1 + i % 5)}
        rows.append(json.dumps(row))
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
    return folder / "rows.jsonl"


@pytest.fixture
def run_file(tmp_path, rows_file, monkeypatch, tiny_processor, minute_config):
    """`run_file(out="a", model={...}, data={...}, **train)` -> config of a tiny run in `out`."""
    # The tokenizer only depends on the vocabulary: train it once per session, not once per run.
    monkeypatch.setattr(processors, "build", lambda cfg: replace(tiny_processor, cfg=cfg))

    def write(
        out: str = "run", model: dict | None = None, data: dict | None = None, **train
    ) -> Path:
        rows = dict(source=str(rows_file), batch_size=1, max_length=256, workers=0)
        rows |= dict(val_fraction=0.0, packing=False) | (data or {})
        train = dict(steps=6, log_every=1, save_every=0, eval_every=0, warmup=2) | train
        cfg = RunConfig(
            model=minute_config(**(model or {})),
            data=DataConfig(**rows),
            train=TrainConfig(out=str(tmp_path / out), precision="fp32", **train),
        )
        path = tmp_path / f"{out}.json"
        path.write_text(json.dumps(to_dict(cfg)))
        return path

    return write


@pytest.fixture
def refused(capsys):
    """`refused(main, *argv)`: the error line of a command that exits with code 2."""

    def refused(main: Callable, *argv: object) -> str:
        with pytest.raises(SystemExit) as stop:
            command(main, [str(a) for a in argv])
        out, err = capsys.readouterr()
        lines = [x for x in err.splitlines() if x and "step/s" not in x and "question/s" not in x]
        assert stop.value.code == 2 and len(lines) == 1, err
        assert lines[0].startswith("error: ") and out == ""
        return lines[0]

    return refused


@pytest.fixture(scope="session")
def python(tmp_path_factory) -> Iterator[Callable]:
    """`python(argv, cwd=ROOT, **env)`: like `subprocess.run`, but forked, which saves seconds."""
    folder = tmp_path_factory.mktemp("python")
    with subprocess.Popen(
        [sys.executable, ROOT / "tests" / "forked.py"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as server:  # fmt: skip

        def run(argv: list[str], cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
            env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | env
            files = {name: folder / name for name in ("out", "err")}
            for path in files.values():
                path.unlink(missing_ok=True)
            request = {"argv": [str(a) for a in argv], "cwd": str(cwd), "env": env}
            server.stdin.write(json.dumps(request | {k: str(v) for k, v in files.items()}) + "\n")
            server.stdin.flush()
            code = int(server.stdout.readline())
            out, err = (path.read_text(encoding="utf-8") for path in files.values())
            return subprocess.CompletedProcess(argv, code, out, err)

        yield run


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory, tiny_processor, minute_config) -> Path:
    """A checkpoint of `minute_config` with large random weights (`lively`) and its processor."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    cfg = minute_config(lm_max_position_embeddings=256, lm_tie_weights=False)
    model = lively(VisionLanguageModel(cfg))
    model.save_pretrained(folder, replace(tiny_processor, cfg=cfg))
    return folder


def _as_process(argv: list[str], rank: int, world: int, port: int, out: Path, before) -> None:
    """Run `train.py argv` as process `rank` of `world`, in a child forked from this process."""
    import train

    sys.stdout = sys.stderr = open(out, "a", buffering=1)  # noqa: SIM115
    os.dup2(sys.stdout.fileno(), 1), os.dup2(sys.stdout.fileno(), 2)
    torch.set_num_threads(1)  # a thread pool does not survive a fork
    gc.freeze()  # collecting loaders of the parent process would raise here
    # Forked processes share tqdm's lock: a process killed while holding it would block the others.
    tqdm.set_lock(threading.RLock())
    if world > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    before(rank)
    command(train.main, argv)


@pytest.fixture
def launch(tmp_path):
    """`launch(argv, world, before)` starts `train.py` as `world` processes and returns them.

    Each process first calls `before(rank)`. They are forked, so that none imports torch again.
    """
    import multiprocessing
    import socket

    started = []

    def start(argv: list[str], world: int = 1, before=lambda rank: None) -> list:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context, out = multiprocessing.get_context("fork"), tmp_path / "output.txt"
        processes = [
            context.Process(target=_as_process, args=(argv, rank, world, port, out, before))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        started.extend(processes)
        return processes

    yield start
    for process in started:
        if process.is_alive():
            process.kill()
        process.join()
