"""Apply a layout's tables in either direction, and report every tensor that does not match.

A layout is another library's checkpoint format. Its table pairs picoVLM's parameter names with the
keys of a safetensors file; `{i}` is the block number. Not here: any layout's names (layouts/),
files (load.py, save.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from config_tools import InputError, require

Table = list[tuple]  # (parameter name or a tuple of them, key) or (names, key, op)
Fields = list[tuple[str, str, object]]  # (our config field, config.json key, default)


@dataclass(frozen=True)
class Op:
    """How one tensor of a file stores one or several parameters."""

    split: Callable[[Tensor], Sequence[Tensor]]
    merge: Callable[[Sequence[Tensor]], Tensor]


SAME = Op(lambda t: (t,), lambda ts: ts[0])
FUSED_QKV = Op(lambda t: t.chunk(3), lambda ts: torch.cat(tuple(ts)))  # along the rows
UNSQUEEZED = Op(lambda t: (t[0],), lambda ts: ts[0][None])  # the file has a leading axis of 1
UNSQUEEZED_TWICE = Op(lambda t: (t[0, 0],), lambda ts: ts[0][None, None])


@dataclass(frozen=True)
class Pair:
    """A tensor's key in a file, and the parameters it stores."""

    params: tuple[str, ...]
    key: str
    op: Op


@dataclass(frozen=True)
class Layout:
    """How transformers stores a backbone: tensor names and config.json, in both directions."""

    model_types: tuple[str, ...]
    table: Table
    unprefixed: Table  # keys that never have a prefix
    prefixes: tuple[str, ...]  # of the other keys; the first one is written
    ignore: tuple[str, ...]  # patterns of keys that a backbone does not use
    read: Callable[[dict, str], dict]  # config.json, where -> our fields; raises InputError
    write: Callable[[Any], dict]  # our config -> config.json
    unsupported_reason: Callable[[Any], str]  # "field = value" that it does not support, or ""


def weight_and_bias(modules: Iterable[tuple[str, str]], param: str = "", key: str = "") -> Table:
    """Rows for the weight and the bias of each (our module, its key), with prefixes."""
    return [
        (f"{param}{module}.{kind}", f"{key}{other}.{kind}")
        for module, other in modules
        for kind in ("weight", "bias")
    ]


def prefixed(table: Table, param: str, key: str) -> Table:
    """The table with prefixes, for a part of a whole model."""
    return [
        (_each(names, lambda name: param + name), key + other, *op) for names, other, *op in table
    ]


def _each(names: str | tuple[str, ...], change: Callable[[str], str]) -> str | tuple[str, ...]:
    return tuple(map(change, names)) if isinstance(names, tuple) else change(names)


def expand(table: Table, n_blocks: Mapping[str, int]) -> list[Pair]:
    """One pair per row and block; `n_blocks` maps a prefix of parameter names to their number."""
    pairs = []
    for names, key, *op in table:
        params = names if isinstance(names, tuple) else (names,)
        n = 1
        if "{i}" in key:
            n = next(n for prefix, n in n_blocks.items() if params[0].startswith(prefix))
        for i in range(n):
            numbered = tuple(name.replace("{i}", str(i)) for name in params)
            pairs.append(Pair(numbered, key.replace("{i}", str(i)), *op or [SAME]))
    return pairs


def layout_pairs(layout: Layout, n_blocks: int, prefix: str) -> list[Pair]:
    """A backbone's pairs, for keys that start with `prefix`."""
    return expand(prefixed(layout.table, "", prefix) + layout.unprefixed, {"": n_blocks})


def prefix_of(found: Iterable[str], layout: Layout) -> str:
    """The prefix of the first row's key in `found`; the usual prefix where that key is missing."""
    first = layout.table[0][1]
    return next((p for p in layout.prefixes if p + first in found), layout.prefixes[0])


def export_tensors(tensors: Mapping[str, Tensor], pairs: Iterable[Pair]) -> dict[str, Tensor]:
    """Parameters -> tensors by file key. Raises KeyError on a parameter that `pairs` lacks."""
    used = [pair for pair in pairs if pair.params[0] in tensors]
    unknown = set(tensors) - {name for pair in used for name in pair.params}
    if unknown:
        raise KeyError(*sorted(unknown))
    return {p.key: p.op.merge([tensors[name] for name in p.params]) for p in used}


def import_tensors(
    found: Mapping[str, Tensor],
    pairs: Iterable[Pair],
    wanted: Mapping[str, Tensor],
    ignore: Iterable[str],
    where: str,
) -> dict[str, Tensor]:
    """Tensors by file key -> parameters: exactly the names and shapes of `wanted`.

    Keys that match a pattern of `ignore` are skipped. Raises `InputError` listing every tensor that
    is left over, missing, misshapen or not finite.
    """
    used = [pair for pair in pairs if pair.params[0] in wanted]
    shapes = {p.key: list(p.op.merge([wanted[n] for n in p.params]).shape) for p in used}
    ignored = [n for n in found if any(fnmatchcase(n, pattern) for pattern in ignore)]
    extra = [n for n in found if n not in shapes and n not in ignored]
    missing = [n for n in shapes if n not in found]
    missing += sorted(set(wanted) - {name for pair in used for name in pair.params})
    misshapen = [
        f"{n} is {list(found[n].shape)}, expected {shape}"
        for n, shape in shapes.items()
        if n in found and list(found[n].shape) != shape
    ]
    kinds = {"left over:": extra, "missing:": missing, "misshapen:": misshapen}
    problems = [f"{label} {_shorten(names)}" for label, names in kinds.items() if names]
    if problems:
        raise InputError(f"{where}: the weights do not match config.json ({'; '.join(problems)}).")
    # A NaN or Inf makes the sum non-finite; isfinite() of the tensor would need a mask as large.
    broken = [n for n in shapes if not found[n].sum(dtype=torch.float32).isfinite()]
    if broken:
        names = _shorten(broken)
        raise InputError(f"{where}: NaN or infinite weights in {names}; use another checkpoint.")
    return {name: t for p in used for name, t in zip(p.params, p.op.split(found[p.key]))}


def _shorten(names: list[str], maximum: int = 6) -> str:
    more = f" and {len(names) - maximum} more" if len(names) > maximum else ""
    return ", ".join(names[:maximum]) + more


def first_unsupported(cfg: object, allowed: Mapping[str, object]) -> str:
    """The first field with an unsupported value, as "field = value"; "" if there is none.

    `allowed` holds a field's only value, or a list of its values.
    """
    for name, values in allowed.items():
        value = getattr(cfg, name)
        if value not in (values if isinstance(values, list) else [values]):
            return f"{name} = {value!r}"
    return ""


def read_fields(fields: Fields, config: Mapping) -> dict:
    """config.json -> our fields, with the defaults of `fields` where a key is absent."""
    return {field: config.get(key, default) for field, key, default in fields}


def write_fields(fields: Fields, cfg: object) -> dict:
    """Our config -> keys of config.json."""
    return {key: getattr(cfg, field) for field, key, _ in fields}


def refuse_unless(config: Mapping, supported: Mapping[str, object], where: str) -> None:
    """Raise `InputError` if a key of config.json has another value than the supported one."""
    for key, value in supported.items():
        found = config.get(key, value)
        fix = f"is not supported; expected {value!r}"
        require(found == value or found is None, f"{where}: {key}", found, fix)


ACTIVATIONS = {  # vit_hidden_act -> hidden_act of transformers
    "gelu_tanh": "gelu_pytorch_tanh",
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}


def read_activation(name: str, where: str) -> str:
    """hidden_act of a config.json -> our name."""
    known = {key: act for act, key in ACTIVATIONS.items()} | {"gelu_new": "gelu_tanh"}
    require(name in known, f"{where}: hidden_act", name, f"must be one of {', '.join(known)}")
    return known[name]


# --- Resizing weights ---------------------------------------------------------------------------


def resample_positions(table: Tensor, n_prefix: int, grid: int, antialias: bool) -> Tensor:
    """Position embeddings [n_prefix + P, D] of a square grid -> [n_prefix + grid^2, D], bicubic.

    Equal to transformers' interpolate_pos_encoding, which uses `antialias` for DINOv2 with
    registers. The prefix (CLS) is copied. Raises `InputError` unless P is a square.
    """
    prefix, patches = table[:n_prefix], table[n_prefix:]
    side = round(len(patches) ** 0.5)
    require(side * side == len(patches), "patch positions", len(patches), "must form a square grid")
    square = patches.float().T.reshape(1, -1, side, side)  # [1, D, side, side]
    square = torch.nn.functional.interpolate(
        square, size=(grid, grid), mode="bicubic", antialias=antialias
    )  # [1, D, grid, grid]
    return torch.cat((prefix, square.flatten(2)[0].T.to(table.dtype)))  # [n_prefix + grid^2, D]


def extend_rows(table: Tensor, n: int) -> Tensor:
    """A table [V, D] -> [n, D]; new rows are the mean of the old ones (Hewitt 2021)."""
    new = table.float().mean(0, keepdim=True).to(table.dtype).expand(n - len(table), -1)
    return torch.cat((table, new))
