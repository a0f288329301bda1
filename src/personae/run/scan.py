"""A first pass over every weight: is it finite, did it change, which zeros, whose model is it?"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter

import torch

from personae.checkpoints import Checkpoint
from personae.checkpoints.tied import as_stored
from personae.errors import CheckpointError, Faults
from personae.family.deltas import Deltas
from personae.family.finite import beyond_fp32, is_finite, not_finite
from personae.family.opened import Family
from personae.methods import has_matrices
from personae.packs.fingerprint import combine, tensor_digest
from personae.run.costs import checking_bytes, scanning_bytes
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


def scan(deltas: Deltas, work: Work, faults: Faults) -> ExpertScan:
    """Read every tensor of one expert once: finite? changed? which zeros? which weights?

    Faults (NaN or Inf in a weight, an expert equal to the reference) are added to `faults`.
    """
    alignment = deltas.alignment
    tensors: dict[str, TensorScan] = {}
    digests: dict[str, str] = {}
    differing: list[str] = []
    taken = alignment.taken
    results = work.map(
        list(taken),
        partial(_see, deltas, taken),
        cost=lambda raw: alignment.kept_bytes + scanning_bytes(alignment.checkpoint.specs[raw]),
    )
    for raw, seen in sorted(results, key=itemgetter(0)):  # faults in an order of their own
        digests[raw] = seen.digest
        for fault in seen.faults:
            faults.add(fault)
        name = taken[raw]
        if name is not None and seen.scan is not None:
            tensors[name] = seen.scan
        if name is not None and seen.differs:
            differing.append(name)
    digests |= _copied(alignment.checkpoint, digests)
    of_its_own = alignment.private or alignment.grown or differing
    if not of_its_own and not any(seen.changed for seen in tensors.values()):
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


def _see(deltas: Deltas, taken: Mapping[str, str | None], raw_name: str) -> _Seen:
    alignment, name = deltas.alignment, taken[raw_name]
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
        faults = Faults()
        found = fingerprint(family.base, "The base", work, faults, unchecked=uncoded(family))
        scans: dict[str, ExpertScan] = {}
        for done, (name, expert) in enumerate(family.experts.items(), 1):
            scans[name] = scan(Deltas(expert, family.base, from_base), work, faults)
            expert.checkpoint.close()
            work.progress("reading the family", done, len(family.experts))
        faults.raise_if_any(CheckpointError)
        return cls(found, scans)

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
