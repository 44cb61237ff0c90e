"""Pictures as vectors of length one: build an index that can be resumed, find what is alike.

An index is a folder: `index.jsonl` (a line a picture), `embeddings.safetensors` (a row a picture),
`skipped.jsonl` and `about.json`. While it grows, the rows stand in `embeddings.part`. Search is one
matrix product; with many pictures faiss does it. Not here: the command line (embed.py).

Letters: N pictures, Q queries, D width.
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

from config_tools import InputError, read_json
from data.classification.loader import normalise, whole_views
from models.pretrained.load import open_vit
from models.pretrained.safetensors_io import save_tensors
from models.vision_transformer import ViT

ROWS, PART, LINES, SKIPPED, ABOUT = (
    "embeddings.safetensors", "embeddings.part", "index.jsonl", "skipped.jsonl", "about.json",
)  # fmt: skip
AT_ONCE = 1 << 24  # similarities held in memory together


@dataclass(frozen=True)
class Index:
    folder: Path
    files: list[str]
    rows: np.ndarray  # [N, D] float32, each of length one
    about: dict  # which encoder, which pool


def open_encoder(name: str, pool: str) -> ViT:
    """The encoder `name`, pooled into one vector: by `pool`, auto means CLS, else the mean."""
    vit = open_vit(name, pool)
    if vit.cfg.vit_pooling == "none":
        vit = open_vit(name, "mean")
    return vit


def describe(vit: ViT, name: str) -> dict:
    """What an index is made by; `weights` tells two states of one run folder apart."""
    digest = hashlib.sha256()
    for tensor in vit.state_dict().values():
        digest.update(tensor.cpu().contiguous().numpy())
    return {"model": name, "pool": vit.cfg.vit_pooling, "size": vit.cfg.vit_img_size,
            "weights": digest.hexdigest()[:16]}  # fmt: skip


@torch.inference_mode()
def embed(vit: ViT, pictures: Sequence) -> tuple[np.ndarray, list[str]]:
    """Pictures -> (vectors [N, D] of those that open, what is wrong with each; "" if nothing)."""
    views, problems = whole_views(pictures, vit.cfg)
    if not views:
        return np.zeros((0, vit.cfg.vit_hidden_dim), np.float32), problems
    device = vit.patch_embedding.conv.weight.device
    pooled = vit.pool(vit.forward_features(normalise(views, vit.cfg).to(device)))  # [N, D]
    return torch.nn.functional.normalize(pooled.float(), dim=-1).cpu().numpy(), problems


# --- Building -----------------------------------------------------------------------------------


def _lines(path: Path) -> list[dict]:
    """A JSON object a line; a last line that was cut off counts for nothing."""
    if not path.is_file():
        return []
    *whole, _cut = path.read_text("utf-8", "replace").split("\n")  # names may hold U+2028
    try:
        lines = [json.loads(line) for line in whole]
        if all(isinstance(line["file"], str) for line in lines):
            return lines
    except (ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{path}: not the lines of an index; build it anew in another folder.")


def _append(path: Path, lines: list[dict]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)  # ASCII: names may be no text


def require_same(folder: Path, before: dict, now: dict) -> None:
    """Raise `InputError` unless an index that was made by `before` fits what `now` makes."""
    changed = [f"{key}: {before.get(key)!r} then, {value!r} now" for key, value in now.items()
               if before.get(key) != value]  # fmt: skip
    if changed:
        raise InputError(f"{folder} was made otherwise ({'; '.join(changed)}); build a new one.")


def stamp(name: str) -> str:
    """Size and time of a file, which change with it; empty where it is gone."""
    try:
        found = Path(name).stat()
    except OSError:
        return ""
    return f"{found.st_size} {found.st_mtime_ns}"


def _resume(folder: Path, about: dict, width: int) -> list[dict]:
    """What an earlier start has done, both files cut to what is whole in both."""
    done = _lines(folder / LINES)
    (folder / SKIPPED).unlink(missing_ok=True)
    if (folder / ABOUT).is_file():
        require_same(folder, read_json(folder / ABOUT), about)
    part = folder / PART
    if done and not part.is_file():  # a whole index that grows
        part.write_bytes(open_index(folder).rows.tobytes())
    n = min(len(done), part.stat().st_size // (4 * width)) if part.is_file() else 0
    (folder / LINES).unlink(missing_ok=True)
    _append(folder / LINES, done[:n])
    with open(part, "ab") as file:
        file.truncate(4 * width * n)
    return done[:n]


def build(vit: ViT, files: Sequence[str], folder: Path, about: dict, batch_size: int) -> Index:
    """Add the pictures that `folder` lacks, batch by batch; raises `InputError`.

    Stopped, it goes on where it was. Pictures that cannot be opened are listed and passed over, and
    tried again by the next build. One that was changed since is refused: its row is of the old one.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"out = {folder}: is a file; name a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    width = vit.cfg.vit_hidden_dim
    done = _resume(folder, about, width)
    for line in done:
        now = stamp(line["file"])
        if line.get("stamp", now) != now:  # indexes of earlier versions have none
            what = "was changed" if now else "is no longer there"
            raise InputError(
                f"{folder}: {line['file']} {what} since it was read; build the index anew."
            )
    (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    known = {line["file"] for line in done}
    left = [name for name in files if name not in known]
    with tqdm(total=len(files), initial=len(files) - len(left), unit="picture") as bar:
        for start in range(0, len(left), batch_size):
            part = left[start : start + batch_size]
            rows, problems = embed(vit, part)
            found = list(zip(part, problems))
            with open(folder / PART, "ab") as file:
                file.write(rows.tobytes())
            lines = [{"file": n, "stamp": stamp(n)} for n, problem in found if not problem]
            _append(folder / LINES, lines)
            if any(problems):
                _append(folder / SKIPPED, [{"file": n, "reason": p} for n, p in found if p])
            bar.update(len(part))
    rows = np.fromfile(folder / PART, np.float32).reshape(-1, width)  # [N, D]
    if len(rows) == 0:
        raise InputError(f"none of {len(files)} pictures can be opened; see {folder / SKIPPED}.")
    save_tensors({"embeddings": torch.from_numpy(rows)}, folder / ROWS)
    (folder / PART).unlink()
    return open_index(folder)


def open_index(folder: Path) -> Index:
    """An index as `build` left it; raises `InputError`."""
    if (folder / PART).is_file():
        raise InputError(f"{folder}: not finished; run the same `embed.py build` again.")
    if not (folder / ROWS).is_file():
        raise InputError(f"{folder}: no index; make one with `embed.py build`.")
    try:
        rows = load_file(folder / ROWS)["embeddings"]
    except (SafetensorError, KeyError, OSError) as error:
        raise InputError(f"{folder / ROWS}: not a whole index ({error}).") from None
    files = [line["file"] for line in _lines(folder / LINES)]
    if len(files) != len(rows):
        raise InputError(f"{folder}: {len(files)} lines in {LINES}, {len(rows)} rows in {ROWS}.")
    about = read_json(folder / ABOUT)
    if not {"model", "pool"} <= about.keys():
        raise InputError(f"{folder / ABOUT}: does not say which encoder and pool made it.")
    return Index(folder, files, rows, about)


# --- Finding ------------------------------------------------------------------------------------


def nearest(queries: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """For each query [Q, D] its `k` most similar rows: (numbers, cosines), each [Q, k]."""
    k = min(k, len(rows))
    scores = queries @ rows.T  # [Q, N]
    best = np.argpartition(-scores, k - 1, axis=1)[:, :k]
    cosines = np.take_along_axis(scores, best, 1)
    order = np.argsort(-cosines, axis=1, kind="stable")
    return np.take_along_axis(best, order, 1), np.take_along_axis(cosines, order, 1)


def nearest_by_faiss(queries: np.ndarray, rows: np.ndarray, k: int):
    """The same from faiss, by a graph of neighbours: nearly always the same, sooner."""
    try:
        import faiss
    except ImportError:
        raise InputError("engine = 'faiss': needs it, so run `pip install faiss-cpu`.") from None
    index = faiss.IndexHNSWFlat(rows.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efSearch = max(64, 2 * k)
    index.add(rows)
    cosines, numbers = index.search(queries, min(k, len(rows)))
    return numbers, cosines


ENGINES = {"exact": nearest, "faiss": nearest_by_faiss}


def alike(
    one: np.ndarray, other: np.ndarray | None, threshold: float
) -> Iterator[tuple[int, int, float]]:
    """(i, j, cosine) of all pairs at least `threshold` alike, within `one` or between two."""
    rows = one if other is None else other
    step = max(1, AT_ONCE // len(rows))
    for start in range(0, len(one), step):
        scores = one[start : start + step] @ rows.T  # [step, N]
        for i, j in np.argwhere(scores >= threshold):
            if other is not None or start + i < j:
                yield start + int(i), int(j), float(scores[i, j])
