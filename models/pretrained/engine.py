"""Reads a table in both directions, and says what does not fit.

Not here: any layout's names (siglip.py, llama.py, idefics3.py), files (models/checkpoint_files.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from configs import InputError

Table = list[tuple[str, str]]


def prefixed(table: Table, ours: str, theirs: str) -> Table:
    """The same names one level deeper, as a part within a whole."""
    return [(ours + a, theirs + b) for a, b in table]


def expand(table: Table, n_layers: Mapping[str, int]) -> dict[str, str]:
    """Our name -> their name, `{i}` counted through; `n_layers`: how many, by prefix of ours."""
    names = {}
    for ours, theirs in table:
        if "{i}" not in ours:
            names[ours] = theirs
            continue
        n = next(n for prefix, n in n_layers.items() if ours.startswith(prefix))
        names |= {ours.format(i=i): theirs.format(i=i) for i in range(n)}
    return names


def to_theirs(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Our tensors under their names. Raises KeyError on one the table does not know."""
    return {names[name]: tensor for name, tensor in tensors.items()}


def to_ours(
    found: Mapping[str, Tensor],
    names: Mapping[str, str],
    wanted: Mapping[str, Tensor],
    ignore: Iterable[str],
    where: str,
) -> dict[str, Tensor]:
    """Their tensors under our names: exactly those `wanted`, in shape too.

    Names that end in one of `ignore` carry no weights. Raises `InputError` listing everything left
    over, missing or misshapen.
    """
    theirs = {names[name]: name for name in wanted}
    extra = [n for n in found if n not in theirs and not n.endswith(tuple(ignore))]
    missing = [n for n in theirs if n not in found]
    misshapen = [
        f"{n} is {list(found[n].shape)}, the config says {list(wanted[ours].shape)}"
        for n, ours in theirs.items()
        if n in found and found[n].shape != wanted[ours].shape
    ]
    problems = [
        f"{label} {_few(names_)}"
        for label, names_ in (
            ("left over:", extra),
            ("missing:", missing),
            ("misshapen:", misshapen),
        )
        if names_
    ]
    if problems:
        raise InputError(
            f"{where}: the weights do not fit its config.json ({'; '.join(problems)})."
        )
    return {ours: found[n] for n, ours in theirs.items()}


def _few(names: list[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
