"""What an expert, a checkpoint or a task of a pack, changed of a reference, tensor by tensor."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from personae._types import TensorSpec
from personae.checkpoints import Checkpoint
from personae.family.alignment import Alignment
from personae.family.deltas import Deltas
from personae.family.finite import beyond_fp32, not_finite
from personae.run.costs import delta_bytes
from personae.run.rebuilt import Rebuilt

Factors = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Changes:
    """An expert's tensors, by its own names.

    Attributes:
        specs: All of them.
        compared: Those that the reference has too, floating, with the shape in which both have it.
        private: Floating ones that the reference does not have, or in another shape.
        tied: Further names to those of the tensors they share.
        unchanged: Whether a tensor is known to be the reference's, without reading it.
        delta: Reads the difference of a compared one, fp32.
        factors: The same as two factors of which it is exactly the product, if they are at hand.
        value: Reads a tensor as it is.
        cost: Peak bytes of either.
        why_not_finite: What to tell of a compared one whose delta is not finite.
    """

    specs: Mapping[str, TensorSpec]
    compared: Mapping[str, TensorSpec]
    private: frozenset[str]
    tied: Mapping[str, str]
    unchanged: Callable[[str], bool]
    delta: Callable[[str], Tensor]
    factors: Callable[[str], Factors | None]
    value: Callable[[str], Tensor]
    cost: Callable[[str], int]
    why_not_finite: Callable[[str], list[str]]


def of_expert(alignment: Alignment, reference: Checkpoint) -> Changes:
    """Of a checkpoint or adapter that is aligned with its base."""
    deltas = Deltas(alignment, reference, from_base=True)
    rule, expert = alignment.renaming, alignment.checkpoint
    both = (*alignment.shared, *alignment.buffers)
    ref_names = {rule.expert_name(n): n for n in both if reference.specs[n].is_floating}
    files = {rule.expert_name(name): raw for name, raw in alignment.files.items()}
    files |= alignment.private_files
    skipped = {rule.expert_name(name) for name in alignment.skipped}
    specs = {name: expert.specs[raw] for name, raw in files.items() if name not in skipped}
    return Changes(
        specs=specs,
        compared={name: reference.specs[ref] for name, ref in ref_names.items()},
        private=frozenset(name for name in alignment.private if specs[name].is_floating),
        tied=alignment.tied,
        unchanged=lambda name: deltas.unchanged(ref_names[name]),
        delta=lambda name: deltas.read(ref_names[name]),
        factors=lambda name: deltas.factors(ref_names[name]),
        value=lambda name: expert.read(files[name]),
        cost=lambda name: (
            alignment.kept_bytes + delta_bytes(specs[name].numel) + 2 * specs[name].nbytes
        ),
        why_not_finite=lambda name: _why_not_finite(name, expert.read(files[name])),
    )


def of_task(rebuilt: Rebuilt) -> Changes:
    """Of a task of a pack, as its codes tell."""
    names = rebuilt.reference_names
    compared = {
        name: rebuilt.reference.specs[ref]
        for name, ref in names.items()
        if rebuilt.reference.specs[ref].is_floating
    }
    return Changes(
        specs=rebuilt.specs,
        compared=compared,
        private=frozenset(
            name for name, spec in rebuilt.specs.items() if name not in names and spec.is_floating
        ),
        tied=rebuilt.record.tied,
        unchanged=lambda name: names[name] not in rebuilt.record.tensors,
        delta=lambda name: rebuilt.delta(names[name]),
        factors=lambda name: rebuilt.factors(names[name]),
        value=rebuilt.read,
        cost=lambda name: rebuilt.cost(names.get(name, "")) + _factors_bytes(rebuilt, name),
        why_not_finite=lambda name: _why_not_finite(name, rebuilt.read(name)),
    )


def _why_not_finite(name: str, value: Tensor) -> list[str]:
    return not_finite("The model", name, value) or [beyond_fp32(name)]


def _factors_bytes(rebuilt: Rebuilt, name: str) -> int:
    """Peak memory of the factors of a decoded delta, and of their orthonormal bases in fp64."""
    record = rebuilt.record.tensors.get(rebuilt.reference_names.get(name, ""))
    if record is None:
        return 0
    return sum(block.rank or 0 for block in record.blocks) * 40 * sum(record.shape)
