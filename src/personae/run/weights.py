"""One read through the weights of a family: finite? how long are the task vectors? which equal?"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import fsum
from operator import itemgetter

import torch

from personae._types import TensorSpec
from personae.family.chunks import Chunk, items
from personae.family.deltas import Stacks
from personae.family.opened import Family
from personae.ops.sums import squared_norm
from personae.run.work import Work

Pair = tuple[str, str]


@dataclass(frozen=True)
class Weights:
    """What the weights of a family tell, over the tensors that are merged.

    Attributes:
        deltas: Name of an expert to ‖θₙ − θ₀‖²; from the experts' average if there is no base.
        reference: ‖θ₀‖², or that of the average.
        equal: Pairs of experts that are the same in all of these tensors.
        faults: Each tensor that holds NaN or Inf, and whose.
        bytes_read: Bytes of the tensors, of all models.
    """

    deltas: Mapping[str, float]
    reference: float
    equal: Sequence[Pair]
    faults: Sequence[str]
    bytes_read: int


def look(family: Family, specs: Collection[TensorSpec], work: Work) -> Weights:
    """Read each of these tensors once, of every model.

    Args:
        family: Base and experts.
        specs: The tensors, as the reference has them; every expert has them, too.
        work: Workers, memory bound, progress.

    Raises:
        BudgetError: if the memory bound is below the largest block of rows.
    """
    stacks, names = Stacks(family), list(family.experts)
    apart = set[Pair]()  # told by whichever worker sees it first
    cut = items(specs, lambda _: False, together=False)
    results = work.map(
        cut,
        lambda item: [_see(chunk, stacks, names, apart) for chunk in item.chunks],
        cost=lambda item: (4 * stacks.experts + 24) * item.largest.numel,
        stage="reading weights",
        in_order=True,
    )
    ordered = sorted(((item.number, seen) for item, seen in results), key=itemgetter(0))
    seen = [one for _, chunks in ordered for one in chunks]
    taken = [family.base.specs[spec.name] for spec in specs] if family.has_base else []
    taken += [expert.spec(spec.name) for expert in family.experts.values() for spec in specs]
    return Weights(
        deltas={name: fsum(squares[n] for squares, _ in seen) for n, name in enumerate(names)},
        reference=fsum(squares[-1] for squares, _ in seen),
        equal=[pair for pair in combinations(names, 2) if pair not in apart],
        faults=list(dict.fromkeys(fault for _, faults in seen for fault in faults)),
        bytes_read=sum(spec.nbytes for spec in taken),
    )


def _see(
    chunk: Chunk, stacks: Stacks, names: Sequence[str], apart: set[Pair]
) -> tuple[list[float], list[str]]:
    """Squared norms of a chunk's deltas and last of the reference; what is not finite in it."""
    stack, reference = stacks.read(chunk, reuse=True)
    for (one, delta), (other, second) in combinations(zip(names, stack, strict=True), 2):
        if (one, other) not in apart and not torch.equal(delta, second):
            apart.add((one, other))
    faults = stacks.faults(stack, chunk, reference)
    return [squared_norm(values) for values in (*stack, reference)], faults
