"""Deltas of one expert against the reference, and what must be known of them before coding."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from personae.checkpoints import Checkpoint
from personae.checkpoints.family import Alignment
from personae.errors import Faults
from personae.execute import pool
from personae.packs.fingerprint import combine, tensor_digest

BYTES_PER_ELEMENT = 32
"""Working memory of one coded element: two reads, the delta, its decomposition, its decoding."""


@dataclass(frozen=True)
class Deltas:
    """The deltas of one expert, read one tensor at a time.

    Attributes:
        alignment: The expert, matched with the reference.
        reference: What is subtracted.
        from_base: Whether the reference is the base the expert's adapter was opened on, so that
            its factors are the delta.
    """

    alignment: Alignment
    reference: Checkpoint
    from_base: bool

    def read(self, name: str) -> Float[Tensor, "..."]:
        """The delta of one shared tensor, fp32; rows the reference lacks are left out."""
        factors = self.factors(name)
        if factors is not None:
            return factors[0] @ factors[1]
        expert = self.alignment.checkpoint.read(self.alignment.files[name])
        reference = self.reference.read(name)
        if name in self.alignment.grown:
            expert = expert[: reference.shape[0]]
        return expert.float() - reference.float()

    def factors(
        self, name: str
    ) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]] | None:
        """The delta as exact factors, if it is that of an adapter and the tensor a matrix."""
        if not self.from_base:
            return None
        return self.alignment.checkpoint.factors(self.alignment.files[name])

    def unchanged(self, name: str) -> bool:
        """Whether the delta is known to be zero without reading it."""
        return self.from_base and self.alignment.checkpoint.same_as_base(self.alignment.files[name])

    def cost(self, name: str) -> int:
        """Peak bytes of working on one tensor."""
        return self.alignment.spec(name).numel * BYTES_PER_ELEMENT


@dataclass(frozen=True)
class TensorFacts:
    """What a first look at one delta tells.

    Attributes:
        changed: Whether any entry is not zero.
        zero_rows: Rows that are exactly zero (of a matrix), else 0.
        zero_columns: Columns that are exactly zero (of a matrix), else 0.
        zeros: Entries that are exactly zero (of anything but a matrix), else 0.
    """

    changed: bool
    zero_rows: int = 0
    zero_columns: int = 0
    zeros: int = 0


@dataclass(frozen=True)
class Facts:
    """What a first look at all deltas of one expert tells.

    Attributes:
        tensors: By reference name, for every shared tensor.
        differing_buffers: Integer tensors (reference names) the expert has with other values.
        fingerprint: Of the expert's own weights.
    """

    tensors: dict[str, TensorFacts]
    differing_buffers: tuple[str, ...]
    fingerprint: str


@dataclass
class _Look:
    facts: TensorFacts | None = None
    differs: bool = False
    digest: str = ""
    faults: list[str] = field(default_factory=list[str])


def scan(deltas: Deltas, *, workers: int, memory: int | None, faults: Faults) -> Facts:
    """Look at every tensor of one expert once: finite? changed? which zeros? which weights?

    Faults (NaN or Inf in a weight, an expert equal to the reference) are added to `faults`.
    """
    alignment = deltas.alignment
    tensors: dict[str, TensorFacts] = {}
    digests: dict[str, str] = {}
    differing: list[str] = []
    work = partial(_look, deltas)
    for name, seen in pool.run(
        alignment.taken, work, cost=deltas.cost, workers=workers, memory=memory
    ):
        digests[alignment.files[name]] = seen.digest
        for fault in seen.faults:
            faults.add(fault)
        if seen.facts is not None:
            tensors[name] = seen.facts
        if seen.differs:
            differing.append(name)
    if not alignment.private and not any(seen.changed for seen in tensors.values()):
        faults.add(
            f"Expert '{alignment.name}' is the base: all {len(tensors)} shared tensors are equal. "
            "Give the fine-tuned checkpoint."
        )
    return Facts(tensors, tuple(sorted(differing)), combine(digests))


def _look(deltas: Deltas, name: str) -> _Look:
    alignment = deltas.alignment
    raw = alignment.checkpoint.read(alignment.files[name])
    seen = _Look(digest=tensor_digest(raw))
    if name in alignment.buffers:
        reference = deltas.reference.read(name)
        seen.differs = raw.dtype != reference.dtype or not torch.equal(raw, reference)
        return seen
    if name not in alignment.shared:
        seen.faults = _not_finite(f"Expert '{alignment.name}'", alignment.files[name], raw)
        return seen
    if deltas.unchanged(name):
        seen.facts = TensorFacts(changed=False)
        return seen
    seen.faults = _not_finite(f"Expert '{alignment.name}'", alignment.files[name], raw)
    delta = deltas.read(name)
    if delta.ndim == 2:
        rows, columns = delta.any(dim=1), delta.any(dim=0)
        seen.facts = TensorFacts(
            changed=bool(rows.any()),
            zero_rows=int((~rows).sum()),
            zero_columns=int((~columns).sum()),
        )
    else:
        zeros = delta.numel() - int(torch.count_nonzero(delta))
        seen.facts = TensorFacts(zeros < delta.numel(), zeros=zeros)
    return seen


def fingerprint(
    checkpoint: Checkpoint,
    *,
    workers: int,
    faults: Faults,
    label: str,
    names: Sequence[str] | None = None,
) -> str:
    """Fingerprint of a checkpoint's weights, or of those of these names.

    NaN and Inf in them are added to `faults`.
    """

    def look(name: str) -> tuple[str, list[str]]:
        tensor = checkpoint.read(name)
        return tensor_digest(tensor), _not_finite(label, name, tensor)

    digests: dict[str, str] = {}
    for name, (digest, found) in pool.run(
        names or list(checkpoint.specs),
        look,
        cost=lambda n: checkpoint.specs[n].nbytes,
        workers=workers,
    ):
        digests[name] = digest
        for fault in found:
            faults.add(fault)
    return combine(digests)


def _not_finite(label: str, name: str, tensor: Tensor) -> list[str]:
    if not tensor.is_floating_point() or not tensor.numel():
        return []
    # One reduction tells: a sum is finite only if every term is (fp64 keeps sums from overflowing).
    if torch.isfinite(tensor.sum(dtype=torch.float64)):
        return []
    bad = int((~torch.isfinite(tensor)).sum())
    if not bad:
        return []
    return [
        f"{label}: tensor '{name}' holds {bad} value(s) that are NaN or infinite. "
        "Repair the checkpoint, or leave the tensor out with 'skip'."
    ]
