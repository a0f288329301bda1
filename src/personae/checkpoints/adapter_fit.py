"""How an adapter fits its base: which names are meant, and which way round a weight is stored."""

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain

from personae._types import TensorSpec
from personae.checkpoints.published_renames import Renames
from personae.checkpoints.renames import by_canonical, canonical
from personae.errors import Faults
from personae.ops.layout import stored_in_out

NAMES_DIFFER = (
    "If this is the model it was trained on, the names differ by the version of transformers: "
    "load and save both with the same one."
)


def find_rename(
    wanted: Collection[str],
    known: Mapping[str, object],
    where: str,
    faults: Faults,
    published: Iterable[Renames] = (),
) -> Renames:
    """Find the one prefix that, taken off or put on every wanted name, makes all of them known.

    A model with a head and its backbone alone name the same tensors with and without a prefix
    (`transformer.h.0…` and `h.0…`). Where none does, it is sought among the names of other
    versions, of which those of the backbone may differ, too.

    Args:
        wanted: Names of adapted weights, as the adapter has them.
        known: Names of the base.
        where: The adapter, for texts.
        faults: Where names that no prefix explains are noted.
        published: What transformers knows of the names of versions; asked last, as it is slow.
    """
    for version in chain((_as_it_is, canonical), published):
        here = by_canonical(known, version)
        fitting = _fitting([version(name) for name in wanted], here)
        if len(fitting) > 1:
            several = f"{where} matches several parts of its base."
            faults.add(f"{several} Pass the model it was trained on.")
        if fitting:
            return _read_as(version, fitting[0], here, () if version is _as_it_is else known)
    closest = max(_prefixes(wanted, known), key=lambda put: sum(put(n) in known for n in wanted))
    lost = sorted(n.removesuffix(".weight") for n in wanted if closest(n) not in known)
    more = f" and {len(lost) - 10} more" if len(lost) > 10 else ""
    faults.add(
        f"{where} adapts modules whose weight the base does not have: "
        f"{', '.join(lost[:10])}{more} (the base has, for example, "
        f"'{min(known, default='')}'). {NAMES_DIFFER} If the base ties its output layer to "
        "its embedding, its config.json must say so."
    )
    return closest


def _as_it_is(name: str) -> str:
    return name


def _prefixes(names: Collection[str], known: Collection[str]) -> list[Renames]:
    """Prefixes that may be taken off these names, or put on them; none is the first."""
    off = {name[: at.end()] for name in names for at in re.finditer(r"\.", name)}
    on = {k.removesuffix(name) for name in names for k in known if k.endswith(f".{name}")}
    renames: list[Renames] = [_as_it_is]
    renames += [lambda name, p=p: name.removeprefix(p) for p in sorted(off)]
    renames += [lambda name, p=p: p + name for p in sorted(on)]
    return renames


def _fitting(wanted: Sequence[str], known: Collection[str]) -> list[Renames]:
    """The prefixes that make all wanted names known; no other where none is needed."""
    if all(name in known for name in wanted):
        return [_as_it_is]
    prefixes = _prefixes(wanted[:1], known)  # what fits all fits the first
    return [prefix for prefix in prefixes if all(prefix(name) in known for name in wanted)]


def _read_as(
    version: Renames, prefix: Renames, here: Mapping[str, str], same: Collection[str]
) -> Renames:
    """Names of the base for an adapter's, by a version and a prefix; `same` are in both."""

    def read(name: str) -> str:
        return name if name in same else here.get(prefix(version(name)), prefix(name))

    return read


def is_transposed(
    name: str,
    specs: Mapping[str, TensorSpec],
    a: tuple[int, ...],
    b: tuple[int, ...],
    *,
    embedding: bool,
    fan_in_fan_out: bool,
) -> bool | None:
    """Whether a weight is stored as (in, out); None if A and B do not fit it at all.

    The shape tells, except for a square weight of a linear layer: PEFT's `fan_in_fan_out` is one
    flag for layers of both layouts, and keeps the value of whichever came last.

    Args:
        name: The adapted weight.
        specs: The base's, by name.
        a: Shape of A, (rank, in, ...).
        b: Shape of B, (out, rank, ...).
        embedding: Whether it is an embedding, which is always (in, out).
        fan_in_fan_out: The adapter's flag, the last resort.
    """
    shape = specs[name].shape
    if len(a) != len(shape) or len(b) != len(shape) or a[0] != b[1] or math.prod(b[2:]) != 1:
        return None
    plain, transposed = (b[0], *a[1:]) == shape, (a[1], b[0]) == shape
    if embedding:
        return True if transposed else None
    if plain and transposed:
        return stored_in_out(name, specs, fan_in_fan_out)
    return transposed if plain or transposed else None
