"""Reads a table in both directions, and says what does not fit.

Not here: any layout's names (siglip.py, llama.py, idefics3.py ...), files
(models/pretrained/load.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from config_tools import InputError, require

Table = list[tuple]  # (ours or a tuple of ours, theirs) or (ours, theirs, op)
Fields = list[tuple[str, str, object]]  # (our field, their key, their class's default)


@dataclass(frozen=True)
class Op:
    """How one of their tensors holds one or several of ours, and back."""

    apart: Callable[[Tensor], Sequence[Tensor]]
    together: Callable[[Sequence[Tensor]], Tensor]


SAME = Op(lambda t: (t,), lambda ts: ts[0])
FUSED = Op(lambda t: t.chunk(3), lambda ts: torch.cat(tuple(ts)))  # q, k, v along the rows
ONE_MORE = Op(lambda t: (t[0],), lambda ts: ts[0][None])  # they keep an axis of length one
TWO_MORE = Op(lambda t: (t[0, 0],), lambda ts: ts[0][None, None])


@dataclass(frozen=True)
class Pair:
    """One of their tensors and the names of ours that it holds."""

    ours: tuple[str, ...]
    theirs: str
    op: Op


@dataclass(frozen=True)
class Family:
    """A foreign layout of a backbone: its names, its config.json, both read both ways."""

    model_types: tuple[str, ...]
    table: Table
    top: Table  # names that never carry a prefix
    prefixes: tuple[str, ...]  # the first is the one we write
    ignore: tuple[str, ...]  # patterns of names that a backbone has no use for
    read: Callable[[dict, str], dict]  # config.json, where -> our fields; raises InputError
    write: Callable[[object], dict]  # our config -> config.json
    misfit: Callable[[object], str]  # why our config has no place in this family; "" if it has


def prefixed(table: Table, ours: str, theirs: str) -> Table:
    """The same names one level deeper, as a part within a whole."""
    return [
        (_each(names, lambda name: ours + name), theirs + other, *op) for names, other, *op in table
    ]


def _each(names: str | tuple[str, ...], change: Callable[[str], str]):
    return tuple(map(change, names)) if isinstance(names, tuple) else change(names)


def expand(table: Table, n_layers: Mapping[str, int]) -> list[Pair]:
    """Every row with `{i}` counted through; `n_layers`: how many, by prefix of ours."""
    pairs = []
    for names, theirs, *op in table:
        ours = names if isinstance(names, tuple) else (names,)
        n = 1
        if "{i}" in theirs:
            n = next(n for prefix, n in n_layers.items() if ours[0].startswith(prefix))
        for i in range(n):
            filled = tuple(name.replace("{i}", str(i)) for name in ours)
            pairs.append(Pair(filled, theirs.replace("{i}", str(i)), *op or [SAME]))
    return pairs


def pairs_of(family: Family, n_layers: int, prefix: str) -> list[Pair]:
    """A backbone's pairs where its names start with `prefix`."""
    return expand(prefixed(family.table, "", prefix) + family.top, {"": n_layers})


def prefix_of(found: Iterable[str], family: Family) -> str:
    """The prefix these names carry: that of the first row; the usual one where it is missing."""
    first = family.table[0][1]
    return next((p for p in family.prefixes if p + first in found), family.prefixes[0])


def to_theirs(tensors: Mapping[str, Tensor], pairs: Iterable[Pair]) -> dict[str, Tensor]:
    """Our tensors under their names. Raises KeyError on one the table does not know."""
    used = [pair for pair in pairs if pair.ours[0] in tensors]
    unknown = set(tensors) - {name for pair in used for name in pair.ours}
    if unknown:
        raise KeyError(*sorted(unknown))
    return {p.theirs: p.op.together([tensors[name] for name in p.ours]) for p in used}


def to_ours(
    found: Mapping[str, Tensor],
    pairs: Iterable[Pair],
    wanted: Mapping[str, Tensor],
    ignore: Iterable[str],
    where: str,
) -> dict[str, Tensor]:
    """Their tensors under our names: exactly those `wanted`, in shape too.

    Names that match a pattern of `ignore` are passed over. Raises `InputError` listing everything
    left over, missing or misshapen, or all that is not finite.
    """
    used = [pair for pair in pairs if pair.ours[0] in wanted]
    shapes = {p.theirs: list(p.op.together([wanted[n] for n in p.ours]).shape) for p in used}
    passed_over = [n for n in found if any(fnmatchcase(n, pattern) for pattern in ignore)]
    extra = [n for n in found if n not in shapes and n not in passed_over]
    missing = [n for n in shapes if n not in found]
    missing += sorted(set(wanted) - {name for pair in used for name in pair.ours})
    misshapen = [
        f"{n} is {list(found[n].shape)}, the config says {shape}"
        for n, shape in shapes.items()
        if n in found and list(found[n].shape) != shape
    ]
    kinds = {"left over:": extra, "missing:": missing, "misshapen:": misshapen}
    problems = [f"{label} {_few(names)}" for label, names in kinds.items() if names]
    if problems:
        raise InputError(
            f"{where}: the weights do not fit its config.json ({'; '.join(problems)})."
        )
    # A sum holds the memory of one number, where asking each takes as much again as a table.
    broken = [n for n in shapes if not found[n].sum(dtype=torch.float32).isfinite()]
    if broken:
        raise InputError(f"{where}: NaN or infinite weights in {_few(broken)}; take another copy.")
    return {name: t for p in used for name, t in zip(p.ours, p.op.apart(found[p.theirs]))}


def first_of(reasons: Mapping[str, object]) -> str:
    """The first reason that holds; "" when none does."""
    return next((words for words, holds in reasons.items() if holds), "")


def _few(names: list[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def read_fields(fields: Fields, config: Mapping) -> dict:
    """Their config.json -> our fields, their class's defaults where a key is absent."""
    return {ours: config.get(theirs, default) for ours, theirs, default in fields}


def write_fields(fields: Fields, cfg: object) -> dict:
    """Our config -> their keys."""
    return {theirs: getattr(cfg, ours) for ours, theirs, _ in fields}


def refuse_unless(config: Mapping, only: Mapping[str, object], where: str) -> None:
    """Raise `InputError` where a setting has another value than the one our code computes."""
    for key, value in only.items():
        found = config.get(key, value)
        fix = f"is not supported, only {value!r} is"
        require(found == value or found is None, f"{where}: {key}", found, fix)


ACTIVATIONS = {
    "gelu_tanh": "gelu_pytorch_tanh",
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}


def read_activation(name: str, where: str) -> str:
    """Their name of an activation -> ours."""
    ours = {theirs: ours for ours, theirs in ACTIVATIONS.items()} | {"gelu_new": "gelu_tanh"}
    require(name in ours, f"{where}: hidden_act", name, f"must be one of {', '.join(ours)}")
    return ours[name]


# --- Weights that must fit another size ---------------------------------------------------------


def resample_positions(table: Tensor, n_prefix: int, grid: int, antialias: bool) -> Tensor:
    """Positions [n_prefix + P, D] of a square grid -> [n_prefix + grid^2, D], bicubic.

    As transformers' interpolate_pos_encoding does, with `antialias` that of DINOv2 with registers;
    those of CLS stay. Raises `InputError` unless P is a square.
    """
    prefix, patches = table[:n_prefix], table[n_prefix:]
    side = round(len(patches) ** 0.5)
    require(side * side == len(patches), "position table", len(patches), "must be a square grid")
    square = patches.float().T.reshape(1, -1, side, side)  # [1, D, side, side]
    square = torch.nn.functional.interpolate(
        square, size=(grid, grid), mode="bicubic", antialias=antialias
    )  # [1, D, grid, grid]
    return torch.cat((prefix, square.flatten(2)[0].T.to(table.dtype)))  # [n_prefix + grid^2, D]


def extend_rows(table: Tensor, n: int) -> Tensor:
    """A table [V, D] -> [n, D]: new rows stand at the mean of the old ones (Hewitt 2021)."""
    new = table.float().mean(0, keepdim=True).to(table.dtype).expand(n - len(table), -1)
    return torch.cat((table, new))
