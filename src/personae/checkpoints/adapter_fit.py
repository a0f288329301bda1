"""How an adapter fits its base: which names are meant, and which way round a weight is stored."""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
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
    (`transformer.h.0…` and `h.0…`). Where none does, names of other versions are tried.

    Args:
        wanted: Names of adapted weights, as the adapter has them.
        known: Names of the base.
        where: The adapter, for texts.
        faults: Where names that no prefix explains are noted.
        published: What transformers knows of the names of versions; asked last, as it is slow.
    """
    if all(name in known for name in wanted):
        return lambda name: name
    dots = {name[: at.end()] for name in wanted for at in re.finditer(r"\.", name)}
    adds = {k.removesuffix(name) for name in wanted for k in known if k.endswith(f".{name}")}
    renames: list[Callable[[str], str]] = [lambda name: name]
    renames += [lambda name, p=p: name.removeprefix(p) for p in sorted(dots)]
    renames += [lambda name, p=p: p + name for p in sorted(adds)]
    matched = [sum(rename(name) in known for name in wanted) for rename in renames]
    best = max(matched)
    if matched.count(len(wanted)) > 1:
        faults.add(f"{where} matches several parts of its base. Pass the model it was trained on.")
    elif best < len(wanted):
        for version in chain((canonical,), published):
            here = by_canonical(known, version)
            if all(version(name) in here for name in wanted):
                return lambda name: name if name in known else here.get(version(name), name)
        rename = renames[matched.index(best)]
        lost = sorted(n.removesuffix(".weight") for n in wanted if rename(n) not in known)
        more = f" and {len(lost) - 10} more" if len(lost) > 10 else ""
        faults.add(
            f"{where} adapts modules whose weight the base does not have: "
            f"{', '.join(lost[:10])}{more} (the base has, for example, "
            f"'{min(known, default='')}'). {NAMES_DIFFER} If the base ties its output layer to "
            "its embedding, its config.json must say so."
        )
    return renames[matched.index(best)]


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
