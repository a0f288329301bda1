"""A first pass over every weight: is it finite, did it change, which zeros, whose model is it?

Each tensor of the reference is read once, a block of rows at a time, and with it that of every
expert.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from personae.checkpoints import Checkpoint
from personae.checkpoints.tied import as_stored
from personae.errors import CheckpointError, Faults
from personae.family.chunks import Chunk, rows_of
from personae.family.deltas import Deltas, read_chunk
from personae.family.finite import beyond_fp32, count_bad, holds_bad, is_finite, not_finite
from personae.family.opened import Family
from personae.methods import has_matrices
from personae.packs.fingerprint import Digest, combine, tensor_digest
from personae.run.costs import checking_bytes, comparing_bytes, scanning_bytes
from personae.run.work import Work


@dataclass(frozen=True)
class TensorScan:
    """What a first pass finds in one delta.

    Attributes:
        changed: Whether any entry is not zero.
        zero_rows: Rows that are exactly zero (of a matrix, or all of a stack), else 0.
        zero_columns: Columns that are exactly zero (likewise), else 0.
        zeros: Entries that are exactly zero (of anything but a matrix), else 0.
    """

    changed: bool
    zero_rows: int = 0
    zero_columns: int = 0
    zeros: int = 0


@dataclass(frozen=True)
class ExpertScan:
    """What a first pass finds in all deltas of one expert.

    Attributes:
        tensors: By reference name, for every shared tensor.
        differing_buffers: Buffers (reference names) the expert has with other values.
        fingerprint: Of the expert's own weights.
    """

    tensors: dict[str, TensorScan]
    differing_buffers: tuple[str, ...]
    fingerprint: str


@dataclass
class _Seen:
    scan: TensorScan | None = None
    differs: bool = False
    digest: str = ""
    faults: list[str] = field(default_factory=list[str])


class _Place(NamedTuple):
    """A tensor that is looked at: of the reference, or of one expert alone by its own name.

    Attributes:
        expert: Whose it is; None for the reference.
        name: Its name there.
    """

    expert: str | None
    name: str


def _noted(seen: Mapping[str, _Seen], faults: Faults) -> dict[str, str]:
    """The digests of one model's tensors; their faults are added in the order of names."""
    for _, one in sorted(seen.items()):
        for fault in one.faults:
            faults.add(fault)
    return {name: one.digest for name, one in sorted(seen.items())}


def _scan(deltas: Deltas, seen: Mapping[str, _Seen], faults: Faults) -> ExpertScan:
    """What was seen of one expert, by its own names; faults are added, as that it is the base."""
    alignment, digests = deltas.alignment, _noted(seen, faults)
    named = [(name, seen[raw]) for raw, name in sorted(alignment.taken.items()) if name is not None]
    tensors = {name: one.scan for name, one in named if one.scan is not None}
    differing = [name for name, one in named if one.differs]
    digests |= _copied(alignment.checkpoint, digests)
    of_its_own = alignment.private or alignment.grown or differing
    if not of_its_own and not any(scan.changed for scan in tensors.values()):
        faults.add(_says_equal(deltas, len(tensors)))
    return ExpertScan(tensors, tuple(sorted(differing)), combine(digests))


def _says_equal(deltas: Deltas, count: int) -> str:
    name = deltas.alignment.name
    if deltas.from_base:
        return (
            f"Expert '{name}' equals the base: all {count} shared tensors are the same. "
            "Give the fine-tuned checkpoint."
        )
    return (
        f"Expert '{name}' equals the merged reference (a single expert equals its own average): "
        f"all {count} shared tensors are the same. Pack it with task vectors (vector 'task')."
    )


@dataclass(frozen=True)
class _Looks:
    """What a first pass over a family reads.

    Attributes:
        base: The reference.
        experts: The deltas, by expert.
        beside: Tensors of the reference, each with the experts that are read beside it.
        alone: Tensors of experts that are not, and the reference names of those that have one.
    """

    base: Checkpoint
    experts: Mapping[str, Deltas]
    beside: Mapping[str, Sequence[Deltas]]
    alone: Mapping[_Place, str | None]

    @classmethod
    def of(cls, family: Family, from_base: bool) -> "_Looks":
        base = family.base
        experts = {name: Deltas(expert, base, from_base) for name, expert in family.experts.items()}
        beside: dict[str, list[Deltas]] = {name: [] for name in base.specs}
        alone: dict[_Place, str | None] = {}
        for expert, deltas in experts.items():
            shared = set(deltas.alignment.shared) if deltas.is_stored else set[str]()
            for raw, name in deltas.alignment.taken.items():
                if name in shared:
                    beside[name].append(deltas)
                else:
                    alone[_Place(expert, raw)] = name
        return cls(base, experts, beside, alone)

    @property
    def places(self) -> list[_Place]:
        return [*(_Place(None, name) for name in self.beside), *self.alone]

    def cost(self, place: _Place) -> int:
        if place.expert is None:
            own = [deltas.alignment.spec(place.name) for deltas in self.beside[place.name]]
            return comparing_bytes(self.base.specs[place.name], own)
        alignment = self.experts[place.expert].alignment
        return alignment.kept_bytes + scanning_bytes(alignment.checkpoint.specs[place.name])


def costs_of_scanning(family: Family, *, from_base: bool) -> list[int]:
    """Peak bytes of each item of `Scanned.of`."""
    looks = _Looks.of(family, from_base)
    return [looks.cost(place) for place in looks.places]


class _Look:
    """What is seen of one tensor of an expert, whose rows come beside the reference's."""

    def __init__(self, deltas: Deltas, name: str) -> None:
        """Nothing has been read."""
        spec = deltas.alignment.spec(name)
        self.deltas, self.name, self.raw = deltas, name, deltas.alignment.files[name]
        self._is_matrix = has_matrices(name, deltas.reference.specs[name].shape)
        self._digest = Digest(spec.dtype, spec.shape)
        self._bad = self._zero_rows = self._zero_columns = self._zeros = 0
        self._columns: Tensor | None = None
        self._changed, self._fits = False, True

    def take(self, rows: Chunk, reference: Tensor) -> None:
        """Read rows that the reference has too, whose values are given in fp32."""
        own = self._read(rows)
        delta = own.float() - reference
        self._fits = self._fits and is_finite(delta)
        if not self._is_matrix:
            changed = int(torch.count_nonzero(delta))
            self._zeros += delta.numel() - changed
            self._changed = self._changed or changed > 0
            return
        kept, columns = delta.any(dim=-1), delta.any(dim=-2)
        self._changed = self._changed or bool(kept.any())
        self._zero_rows += int((~kept).sum())
        if delta.ndim == 2:  # its columns go on in the next rows
            self._columns = columns if self._columns is None else self._columns | columns
        else:
            self._zero_columns += int((~columns).sum())

    def seen(self, *, reference_is_finite: bool) -> _Seen:
        """What all its rows come to; those that the reference lacks are read now."""
        alignment, shape = self.deltas.alignment, self.deltas.reference.specs[self.name].shape
        for rows in rows_of(alignment.spec(self.name)):
            if shape and rows.stop > shape[0]:
                self._read(Chunk(rows.spec, max(rows.start, shape[0]), rows.stop))
        faults = holds_bad(f"Expert '{alignment.name}'", self.raw, self._bad)
        if not (faults or self._fits) and reference_is_finite:
            faults = [f"Expert '{alignment.name}': {beyond_fp32(self.name)}"]
        if self._columns is not None:
            self._zero_columns += int((~self._columns).sum())
        scan = TensorScan(self._changed, self._zero_rows, self._zero_columns, self._zeros)
        return _Seen(scan, digest=self._digest.text(), faults=faults)

    def _read(self, rows: Chunk) -> Tensor:
        checkpoint = self.deltas.alignment.checkpoint
        is_all = not rows.spec.shape or rows.shape == checkpoint.specs[self.raw].shape
        own = (
            checkpoint.read(self.raw)
            if is_all
            else checkpoint.read_rows(self.raw, rows.start, rows.stop)
        )
        self._digest.update(own)
        self._bad += count_bad(own)
        return own


def _compare(
    reference: Checkpoint, name: str, experts: Sequence[Deltas], *, is_checked: bool
) -> Iterator[tuple[_Place, _Seen]]:
    """See one tensor of the reference and of all experts that store it: each is read once."""
    spec = reference.specs[name]
    digest, bad = Digest(spec.dtype, spec.shape), 0
    looks = [_Look(deltas, name) for deltas in experts]
    for rows in rows_of(spec):
        values = read_chunk(reference, name, rows)
        digest.update(values)
        bad += count_bad(values) if is_checked or looks else 0
        if looks:
            values = values.float()
        for look in looks:
            look.take(rows, values)
    faults = holds_bad("The base", name, bad) if is_checked else []
    yield _Place(None, name), _Seen(digest=digest.text(), faults=faults)
    for look in looks:
        place = _Place(look.deltas.alignment.name, look.raw)
        yield place, look.seen(reference_is_finite=not bad)


def _see(deltas: Deltas, raw_name: str, name: str | None) -> _Seen:
    """See a tensor that is an expert's own, a buffer, or an adapter's sum with its base."""
    alignment = deltas.alignment
    raw = alignment.checkpoint.read(raw_name)
    seen = _Seen(digest=tensor_digest(raw))
    if name is None:
        seen.faults = not_finite(f"Expert '{alignment.name}'", raw_name, raw)
        return seen
    if name in alignment.buffers:
        reference = deltas.reference.read(name)
        seen.differs = raw.dtype != reference.dtype or not torch.equal(raw, reference)
        seen.faults = not_finite(f"Expert '{alignment.name}'", raw_name, raw)
        return seen
    if deltas.unchanged(name):
        seen.scan = TensorScan(changed=False)
        return seen
    seen.faults = not_finite(f"Expert '{alignment.name}'", raw_name, raw)
    del raw  # the delta takes its place
    delta = deltas.read(name)
    if not (seen.faults or is_finite(delta) or not_finite("", name, deltas.reference.read(name))):
        seen.faults = [f"Expert '{alignment.name}': {beyond_fp32(name)}"]
    if has_matrices(name, tuple(delta.shape)):
        rows, columns = delta.any(dim=-1), delta.any(dim=-2)
        seen.scan = TensorScan(
            changed=bool(rows.any()),
            zero_rows=int((~rows).sum()),
            zero_columns=int((~columns).sum()),
        )
    else:
        zeros = delta.numel() - int(torch.count_nonzero(delta))
        seen.scan = TensorScan(zeros < delta.numel(), zeros=zeros)
    return seen


def fingerprint(
    checkpoint: Checkpoint,
    label: str,
    work: Work,
    faults: Faults,
    *,
    names: Sequence[str] | None = None,
    unchecked: Collection[str] = (),
) -> str:
    """Fingerprint of a checkpoint's weights, or of those of these names.

    NaN and Inf in them are added to `faults`, but for the tensors named in `unchecked`.
    """

    def see(name: str) -> tuple[str, list[str]]:
        tensor = checkpoint.read(name)
        found = [] if name in unchecked else not_finite(label, name, tensor)
        return tensor_digest(tensor), found

    digests: dict[str, str] = {}
    results = work.map(
        names or list(checkpoint.specs),
        see,
        cost=lambda n: checking_bytes(checkpoint.specs[n]),
    )
    for name, (digest, found) in sorted(results, key=itemgetter(0)):
        digests[name] = digest
        for fault in found:
            faults.add(fault)
    return combine(digests | _copied(checkpoint, digests))


def _copied(checkpoint: Checkpoint, digests: Mapping[str, str]) -> dict[str, str]:
    """Digests of stored copies, which are those of their tensors where the dtype is the same."""
    tied, stored = checkpoint.tied, as_stored(checkpoint)
    found = {name: digests[tied[name]] for name in checkpoint.copies if tied[name] in digests}
    for name in found.keys() & stored.specs.keys():
        if checkpoint.copies[name] != checkpoint.specs[tied[name]].dtype:
            found[name] = tensor_digest(stored.read(name))
    return found


def uncoded(family: Family) -> set[str]:
    """Tensors of the reference that no expert is coded against: they need not be finite."""
    coded = {name for expert in family.experts.values() for name in expert.shared}
    return set(family.base.specs) - coded


@dataclass(frozen=True)
class Scanned:
    """The reference's fingerprint, and what a first pass over each expert found."""

    reference: str
    experts: dict[str, ExpertScan]

    @classmethod
    def of(cls, family: Family, work: Work, from_base: bool = True) -> "Scanned":
        """Read every weight once; `from_base` as in `Deltas`.

        Raises:
            CheckpointError: naming every weight that is not finite, and experts equal to the base.
        """
        plan, unchecked = _Looks.of(family, from_base), uncoded(family)

        def look(place: _Place) -> list[tuple[_Place, _Seen]]:
            if place.expert is not None:
                return [(place, _see(plan.experts[place.expert], place.name, plan.alone[place]))]
            having, is_checked = plan.beside[place.name], place.name not in unchecked
            return list(_compare(family.base, place.name, having, is_checked=is_checked))

        seen: dict[str | None, dict[str, _Seen]] = {name: {} for name in (None, *plan.experts)}
        for _, found in work.map(plan.places, look, cost=plan.cost, stage="reading the family"):
            for place, one in found:
                seen[place.expert][place.name] = one
        faults = Faults()
        digests = _noted(seen[None], faults)
        scans = {name: _scan(deltas, seen[name], faults) for name, deltas in plan.experts.items()}
        for expert in family.experts.values():
            expert.checkpoint.close()
        faults.raise_if_any(CheckpointError)
        return cls(combine(digests | _copied(family.base, digests)), scans)

    @classmethod
    def of_weights(cls, family: Family, work: Work) -> "Scanned":
        """Read the experts alone, where there is no base to compare them with yet.

        Raises:
            CheckpointError: naming every weight that is not finite.
        """
        faults = Faults()
        scans: dict[str, ExpertScan] = {}
        for done, (name, expert) in enumerate(family.experts.items(), 1):
            names = list(expert.taken)
            found = fingerprint(expert.checkpoint, f"Expert '{name}'", work, faults, names=names)
            scans[name] = ExpertScan({}, (), found)
            work.progress("reading the family", done, len(family.experts))
        faults.raise_if_any(CheckpointError)
        return cls("", scans)
