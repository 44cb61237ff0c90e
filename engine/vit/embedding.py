"""Image embeddings: build a resumable index, search it, find near-duplicates.

An index is a folder with `index.jsonl` (a line per image), `embeddings.safetensors` (a unit
vector per image), `skipped.jsonl` and `about.json`. During a build, the vectors are in
`embeddings.part`.
Not here: the command line (embed.py).

Letters: N images, Q queries, D embedding dimension.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file
from tqdm import tqdm

from config_tools import InputError, import_optional, read_json
from data.classification.loader import normalise, open_and_resize
from models.pretrained.load import open_vit
from models.pretrained.safetensors_io import save_tensors
from models.vision_transformer import ViT

ROWS, PART, LINES = "embeddings.safetensors", "embeddings.part", "index.jsonl"
SKIPPED, ABOUT = "skipped.jsonl", "about.json"
MAX_SIMILARITIES = 1 << 24  # held in memory at once


@dataclass(frozen=True)
class Index:
    """Files and their embeddings."""

    folder: Path
    files: list[str]
    rows: np.ndarray  # [N, D] float32 unit vectors
    about: dict  # encoder and pooling


def open_encoder(name: str, pool: str) -> ViT:
    """Load the encoder `name` with pooling; auto: CLS if there is one, else the mean."""
    vit = open_vit(name, pool)
    if vit.cfg.vit_pooling == "none":
        vit = open_vit(name, "mean")
    return vit


def describe(vit: ViT, name: str) -> dict:
    """Encoder, pooling, image size and a hash of the weights."""
    digest = hashlib.sha256()
    for tensor in vit.state_dict().values():
        digest.update(tensor.cpu().contiguous().numpy())
    pool, size, weights = vit.cfg.vit_pooling, vit.cfg.vit_img_size, digest.hexdigest()[:16]
    return {"model": name, "pool": pool, "size": size, "weights": weights}


@torch.inference_mode()
def embed(vit: ViT, images: Sequence) -> tuple[np.ndarray, list[str]]:
    """Embed images: (unit vectors [N, D] of those that open, error of each; "" if none)."""
    views, problems = open_and_resize(images, vit.cfg)
    if not views:
        return np.zeros((0, vit.cfg.vit_hidden_dim), np.float32), problems
    device = vit.patch_embedding.conv.weight.device
    pooled = vit.pool(vit.forward_features(normalise(views, vit.cfg).to(device)))  # [N, D]
    return torch.nn.functional.normalize(pooled.float(), dim=-1).cpu().numpy(), problems


# --- Building -----------------------------------------------------------------------------------


def _lines(path: Path) -> list[dict]:
    """The JSON objects of a file; an incomplete last line is ignored."""
    if not path.is_file():
        return []
    *whole, _cut = path.read_text("utf-8", "replace").split("\n")  # names may hold U+2028
    try:
        lines = [json.loads(line) for line in whole]
        if all(isinstance(line["file"], str) for line in lines):
            return lines
    except (ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{path}: damaged; build the index again in another folder.")


def _append(path: Path, lines: list[dict]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)  # ASCII, as names may be bytes


def require_same(folder: Path, before: dict, now: dict) -> None:
    """Raise `InputError` unless an index's description `before` matches `now`."""
    changed = [f"{key}: was {before.get(key)!r}, now {value!r}" for key, value in now.items()
               if before.get(key) != value]  # fmt: skip
    if changed:
        reason = f"built with other settings ({'; '.join(changed)})"
        raise InputError(f"{folder}: {reason}; build the index in another folder.")


def file_signature(name: str) -> str:
    """Size and modification time of a file; empty if it does not exist."""
    try:
        found = Path(name).stat()
    except OSError:
        return ""
    return f"{found.st_size} {found.st_mtime_ns}"


def _resume(folder: Path, about: dict, width: int) -> list[dict]:
    """Lines of an interrupted build; truncates both files to the images that both contain."""
    done = _lines(folder / LINES)
    (folder / SKIPPED).unlink(missing_ok=True)
    if (folder / ABOUT).is_file():
        require_same(folder, read_json(folder / ABOUT), about)
    part = folder / PART
    if done and not part.is_file():  # adding images to a finished index
        part.write_bytes(open_index(folder).rows.tobytes())
    n = min(len(done), part.stat().st_size // (4 * width)) if part.is_file() else 0
    (folder / LINES).unlink(missing_ok=True)
    _append(folder / LINES, done[:n])
    with open(part, "ab") as file:
        file.truncate(4 * width * n)
    return done[:n]


def build(vit: ViT, files: Sequence[str], folder: Path, about: dict, batch_size: int) -> Index:
    """Embed the images that the index in `folder` does not have yet; resumes if interrupted.

    Images that cannot be opened are listed in skipped.jsonl and tried again by the next build.
    Raises `InputError`, also if an indexed image has changed or is gone.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"out = {folder}: is a file; name a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    width = vit.cfg.vit_hidden_dim
    done = _resume(folder, about, width)
    for line in done:
        now = file_signature(line["file"])
        before = line.get("signature", line.get("stamp", now))  # earlier versions: stamp, or none
        if before != now:
            change = "has changed" if now else "is gone"
            reason = f"{line['file']} {change} since it was indexed"
            raise InputError(f"{folder}: {reason}; build the index again.")
    (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    known = {line["file"] for line in done}
    remaining = [name for name in files if name not in known]
    with tqdm(total=len(files), initial=len(files) - len(remaining), unit="image") as bar:
        for start in range(0, len(remaining), batch_size):
            part = remaining[start : start + batch_size]
            rows, errors = embed(vit, part)
            with open(folder / PART, "ab") as file:
                file.write(rows.tobytes())
            new = [name for name, error in zip(part, errors) if not error]
            _append(folder / LINES, [{"file": n, "signature": file_signature(n)} for n in new])
            skipped = [{"file": n, "reason": e} for n, e in zip(part, errors) if e]
            if skipped:
                _append(folder / SKIPPED, skipped)
            bar.update(len(part))
    rows = np.fromfile(folder / PART, np.float32).reshape(-1, width)  # [N, D]
    if len(rows) == 0:
        raise InputError(f"none of {len(files)} images can be opened; see {folder / SKIPPED}.")
    save_tensors({"embeddings": torch.from_numpy(rows)}, folder / ROWS)
    (folder / PART).unlink()
    return open_index(folder)


def open_index(folder: Path) -> Index:
    """Load a finished index; raises `InputError`."""
    if (folder / PART).is_file():
        raise InputError(f"{folder}: not finished; run the same `embed.py build` command again.")
    if not (folder / ROWS).is_file():
        raise InputError(f"{folder}: not an index; build one with `embed.py build`.")
    try:
        rows = load_file(folder / ROWS)["embeddings"]
    except (SafetensorError, KeyError, OSError) as error:
        raise InputError(f"{folder / ROWS}: damaged ({error}); build the index again.") from None
    files = [line["file"] for line in _lines(folder / LINES)]
    if len(files) != len(rows):
        raise InputError(f"{folder}: {len(files)} lines in {LINES}, {len(rows)} rows in {ROWS}.")
    about = read_json(folder / ABOUT)
    if not {"model", "pool"} <= about.keys():
        raise InputError(f"{folder / ABOUT}: 'model' or 'pool' is missing; build the index again.")
    return Index(folder, files, rows, about)


# --- Search -------------------------------------------------------------------------------------


def search_exact(queries: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The `k` most similar rows of each query [Q, D]: (indices, cosines), each [Q, k]."""
    k = min(k, len(rows))
    scores = queries @ rows.T  # [Q, N]
    best = np.argpartition(-scores, k - 1, axis=1)[:, :k]
    cosines = np.take_along_axis(scores, best, 1)
    order = np.argsort(-cosines, axis=1, kind="stable")
    return np.take_along_axis(best, order, 1), np.take_along_axis(cosines, order, 1)


def search_faiss(queries: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """`search_exact`, approximated by faiss (HNSW); raises `InputError` without faiss."""
    faiss = import_optional("faiss", "engine = 'faiss':", "faiss-cpu")
    index = faiss.IndexHNSWFlat(rows.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efSearch = max(64, 2 * k)
    index.add(rows)
    cosines, indices = index.search(queries, min(k, len(rows)))
    return indices, cosines


ENGINES = {"exact": search_exact, "faiss": search_faiss}


def similar_pairs(
    one: np.ndarray, other: np.ndarray | None, threshold: float
) -> Iterator[tuple[int, int, float]]:
    """Yield (i, j, cosine) of all pairs with at least `threshold`, in `one` or between both."""
    rows = one if other is None else other
    step = max(1, MAX_SIMILARITIES // len(rows))
    for start in range(0, len(one), step):
        scores = one[start : start + step] @ rows.T  # [step, N]
        for i, j in np.argwhere(scores >= threshold):
            if other is not None or start + i < j:
                yield start + int(i), int(j), float(scores[i, j])
