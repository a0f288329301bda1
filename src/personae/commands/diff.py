"""What differs between two models: tensors, by how much and in how many directions; configuration.

`B` is compared with `A` as a new version with the old one: ‖B − A‖, and that over ‖A‖. Names of
renamed modules and tied copies meet as those of an expert and its base do.
"""

from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from math import fsum, inf, isfinite, sqrt
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from personae._types import TensorSpec
from personae.checkpoints import Checkpoint
from personae.family.align import reference_name
from personae.family.alignment import Alignment
from personae.family.configurations import changed_keys
from personae.family.deltas import Deltas
from personae.family.finite import is_finite
from personae.family.opened import open_pair
from personae.ops.sums import squared_norm
from personae.ops.svd import (
    effective_rank,
    numerical_rank,
    singular_values,
    singular_values_bytes,
)
from personae.run.costs import delta_bytes
from personae.run.work import Work

Ranks = Literal["small", "all", "none"]
SMALL_SIDE = 1024
"""Smaller side of a matrix up to which all its singular values take less than a second or so."""


@dataclass(frozen=True)
class Change:
    """How one tensor differs.

    Attributes:
        shape: As in A.
        norm: ‖B − A‖; None if a difference is not finite.
        relative: ‖B − A‖ / ‖A‖; None where A is zero, or a difference is not finite.
        changed: Share of entries that differ.
        rank: Singular values of a matrix B − A above max(out, in) · 1.2e-7 · σ₁; None if not asked.
        effective_rank: exp of the entropy of σᵢ / Σσ (Roy, Vetterli 2007); None likewise.
    """

    shape: tuple[int, ...]
    norm: float | None
    relative: float | None
    changed: float
    rank: int | None = None
    effective_rank: float | None = None


@dataclass(frozen=True)
class Diff:
    """What differs between two models, by A's names.

    Attributes:
        a: Where A came from.
        b: Where B came from.
        compared: Number of tensors that both have; of more rows in B, the rows that A has, too.
        norm: ‖B − A‖ over those of them that hold numbers; None if a difference is not finite.
        relative: The same over ‖A‖; None where that is zero.
        changed: Share of their entries that differ.
        tensors: Those that differ, the largest ‖B − A‖ first.
        dtypes: Those stored in another dtype, with both.
        shapes: Those that differ in shape, with both.
        only_in_a: Names that B has in no form.
        only_in_b: Names, as B has them, that A has in no form.
        config: Keys of config.json that differ, with both values.
        notes: How names were matched.
    """

    a: str
    b: str
    compared: int
    norm: float | None
    relative: float | None
    changed: float
    tensors: Mapping[str, Change]
    dtypes: Mapping[str, tuple[str, str]]
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    config: Mapping[str, tuple[Any, Any]]
    notes: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        found = self.tensors, self.dtypes, self.shapes, self.only_in_a, self.only_in_b, self.config
        return not any(found)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {"equal": self.equal} | asdict(self)


class _Measured(NamedTuple):
    """One tensor: Σ (b − a)², Σ a², entries that differ, all of them; and how it differs, if so."""

    square: float
    size: float
    differing: int
    entries: int
    change: Change | None


def diff(a: Any, b: Any, *, ranks: Ranks = "small", work: Work | None = None) -> Diff:
    """Compare two models.

    Args:
        a: Path, hub id, module or mapping of the old model; `MODEL+ADAPTER` for an adapter.
        b: Those of the new one; or an adapter, taken on top of `a`.
        ranks: Of which matrices singular values are computed, exactly: of those whose smaller side
            is at most 1024, of all, or of none.
        work: Workers, memory bound, progress.

    Raises:
        CheckpointError: if one of them cannot be read.
        BudgetError: if the memory bound is below the largest tensor.
    """
    work = work or Work()
    reference, found = open_pair(a, b, "B")
    with closing(reference), closing(found.checkpoint):
        deltas = Deltas(found, reference, from_base=True)
        names = [*found.shared, *found.buffers]
        measured = work.map(
            names,
            lambda name: _measure(name, deltas, ranks),
            cost=lambda name: _bytes(reference.specs[name], ranks),
            stage="comparing",
        )
        return _told(reference, found, dict(sorted(measured, key=itemgetter(0))))


def _measure(name: str, deltas: Deltas, ranks: Ranks) -> _Measured:
    """Compare one tensor."""
    spec, size = deltas.reference.specs[name], 0.0
    if spec.is_floating:
        delta, size = deltas.read(name), squared_norm(deltas.reference.read(name))
    else:
        delta = _own(name, deltas).double() - deltas.reference.read(name).double()
    if not is_finite(delta):
        delta = torch.where(_same(name, deltas), 0.0, delta)
    differing, square = int(delta.count_nonzero()), squared_norm(delta)
    if not differing:
        return _Measured(0.0, size, 0, spec.numel, None)
    change = Change(
        shape=spec.shape,
        norm=sqrt(square) if isfinite(square) else None,
        relative=_ratio(square, size),
        changed=differing / spec.numel,
    )
    if _has_rank(spec.shape, ranks) and isfinite(square):
        values = singular_values(delta)
        rank = numerical_rank(values, (spec.shape[0], spec.shape[1]))
        change = replace(change, rank=rank, effective_rank=effective_rank(values[:rank]))
    return _Measured(square, size, differing, spec.numel, change)


def _own(name: str, deltas: Deltas) -> Tensor:
    """B's values, of the rows that A has."""
    found, shape = deltas.alignment, deltas.reference.specs[name].shape
    values = found.checkpoint.read(found.files[name])
    return values[: shape[0]] if shape else values


def _same(name: str, deltas: Deltas) -> Tensor:
    """Where both hold the same, be it NaN or Inf."""
    own, other = _own(name, deltas).float(), deltas.reference.read(name).float()
    return (own == other) | (own.isnan() & other.isnan())


def _ratio(square: float, size: float) -> float | None:
    return sqrt(square / size) if isfinite(square) and isfinite(size) and size else None


def _told(reference: Checkpoint, found: Alignment, measured: Mapping[str, _Measured]) -> Diff:
    """Everything that differs."""
    specs, both = reference.specs, {name: found.spec(name) for name in measured}
    only_in_b: list[str] = []
    for own in found.private:
        if known := reference_name(own, found, reference):
            both[known] = found.private_spec(own)
        else:
            only_in_b.append(own)
    numbers = [one for name, one in measured.items() if specs[name].is_floating]
    square, size = fsum(one.square for one in numbers), fsum(one.size for one in numbers)
    entries = sum(one.entries for one in numbers)
    changes = {name: one.change for name, one in measured.items() if one.change is not None}

    def length(name: str) -> float:
        norm = changes[name].norm
        return -inf if norm is None else -norm

    return Diff(
        a=reference.source,
        b=found.checkpoint.source,
        compared=len(measured),
        norm=sqrt(square) if isfinite(square) else None,
        relative=_ratio(square, size),
        changed=sum(one.differing for one in numbers) / entries if entries else 0.0,
        tensors={name: changes[name] for name in sorted(changes, key=length)},
        dtypes={
            name: (specs[name].dtype_name, spec.dtype_name)
            for name, spec in sorted(both.items())
            if specs[name].dtype != spec.dtype
        },
        shapes={
            name: (specs[name].shape, spec.shape)
            for name, spec in sorted(both.items())
            if specs[name].shape != spec.shape
        },
        only_in_a=found.absent,
        only_in_b=tuple(only_in_b),
        config=changed_keys(reference, found.checkpoint),
        notes=tuple(found.naming_notes),
    )


def _has_rank(shape: tuple[int, ...], ranks: Ranks) -> bool:
    return len(shape) == 2 and (ranks == "all" or (ranks == "small" and min(shape) <= SMALL_SIDE))


def _bytes(spec: TensorSpec, ranks: Ranks) -> int:
    """Peak memory of comparing a tensor: both models' values, the difference, its spectrum."""
    if not spec.is_floating:
        return 2 * spec.nbytes + 24 * spec.numel
    spectrum = 0
    if _has_rank(spec.shape, ranks):
        spectrum = singular_values_bytes((spec.shape[0], spec.shape[1]))
    return 2 * spec.nbytes + max(delta_bytes(spec.numel), 4 * spec.numel + spectrum)
