"""Low-rank factors of what an expert changed: measured, then written, a tensor at a time."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from personae.errors import CheckpointError, Faults
from personae.family.carried import Carried
from personae.family.finite import converging, is_finite
from personae.methods import decompose_touched
from personae.ops.factors import (
    balanced,
    energies,
    energies_bytes,
    product_energies,
    truncated_product,
)
from personae.ops.sums import squared_norm
from personae.ops.svd import svd_bytes
from personae.run.changes import Changes, Factors
from personae.run.work import Work
from personae.writers.adapter import AdapterWriter


@dataclass(frozen=True)
class Measured:
    """What a look at one delta tells.

    Attributes:
        energy: Its squared norm.
        held: The rank of factors that are at hand; None if there are none.
        energies: σ², descending, where asked for.
    """

    energy: float
    held: int | None = None
    energies: Tensor | None = None


def measure(
    changes: Changes, linear: Sequence[str], *, spectra: bool, work: Work
) -> dict[str, Measured]:
    """Look at every delta once.

    Args:
        changes: The expert.
        linear: Names of the tensors that may become factors.
        spectra: Whether their singular values are wanted.
        work: Workers, memory bound, progress.

    Returns:
        Name to what was found, of those that are not known to be unchanged.

    Raises:
        CheckpointError: naming every tensor with values that are not finite.
    """
    names = [name for name in changes.compared if not changes.unchanged(name)]
    of_interest, faults = frozenset(linear), Faults()

    def look(name: str) -> Measured | list[str]:
        delta = changes.delta(name)
        if not is_finite(delta):
            return changes.why_not_finite(name)
        energy = squared_norm(delta)
        if not energy or name not in of_interest:
            return Measured(energy)
        delta = delta.flatten(1)
        factors = _thin(changes.factors(name))
        held = None if factors is None else factors[0].shape[1]
        if not spectra:
            return Measured(energy, held)
        return Measured(energy, held, product_energies(*factors) if factors else energies(delta))

    def cost(name: str) -> int:
        wanted = spectra and name in of_interest
        own = energies_bytes(as_matrix(changes.compared[name].shape)) if wanted else 0
        return changes.cost(name) + own

    found: dict[str, Measured] = {}
    for name, seen in work.map(names, look, cost=cost, stage="measuring"):
        if isinstance(seen, Measured):
            found[name] = seen
        else:
            for fault in seen:
                faults.add(fault)
    faults.raise_if_any(CheckpointError)
    return {name: found[name] for name in sorted(found)}


def write_adapter(
    changes: Changes,
    carried: Carried,
    ranks: Mapping[str, int],
    transposed: frozenset[str],
    dtype: torch.dtype,
    writer: AdapterWriter,
    work: Work,
) -> dict[str, float]:
    """Decompose what is carried as factors, and write all that is carried.

    Args:
        changes: The expert.
        carried: How its tensors are carried.
        ranks: Rank of each tensor's factors, at most.
        transposed: Tensors that are stored (in, out).
        dtype: What factors are stored in.
        writer: Where to.
        work: Workers, memory bound, device of the decompositions, progress.

    Returns:
        Tensor to the squared norm of what its factors, as stored, miss.
    """

    def factors(name: str) -> float:
        delta = changes.delta(name).flatten(1)
        with converging(name):
            found = _factors(delta, changes.factors(name), ranks[name], work.torch_device)
        left, right = (one.to(dtype) for one in found)
        module = carried.factors[name]
        if name in transposed:
            writer.write_factors(module, right.T, left.T)
        else:
            writer.write_factors(module, left, right)
        return squared_norm(delta.sub_(left.float() @ right.float()))

    def whole(name: str) -> float:
        writer.write_whole(name, changes.value(carried.whole[name]))
        return 0.0

    def cost(job: tuple[Callable[[str], float], str]) -> int:
        do, name = job
        if do is whole:
            return 2 * changes.cost(carried.whole[name])
        return changes.cost(name) + extracting_bytes(changes.compared[name].shape, ranks[name])

    jobs = [*((factors, name) for name in carried.factors), *((whole, n) for n in carried.whole)]
    results = work.map(jobs, lambda job: job[0](job[1]), cost=cost, stage="extracting")
    return {name: missed for (do, name), missed in results if do is factors}


def extracting_bytes(shape: tuple[int, ...], rank: int) -> int:
    """Peak memory of decomposing a delta and forming the product, the delta itself left out."""
    rows, columns = as_matrix(shape)
    found = 16 * rank * (rows + columns)
    return max(svd_bytes((rows, columns), rank), 4 * rows * columns) + found


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a weight as a matrix: the kernel of a convolution lies in its rows."""
    return shape[0], math.prod(shape[1:])


def _factors(delta: Tensor, exact: Factors | None, rank: int, device: torch.device) -> Factors:
    """Balanced factors of at most this rank; those at hand as they are, where they fit."""
    exact = _thin(exact)
    if exact is not None and exact[0].shape[1] <= rank:
        return exact
    if exact is not None:
        return truncated_product(*exact, rank)
    left, right = balanced(decompose_touched(delta.to(device), rank))
    return left.cpu(), right.cpu()


def _thin(factors: Factors | None) -> Factors | None:
    """Factors that are cheaper than the matrix; else it is as good to decompose that."""
    if factors is None or factors[0].shape[1] >= min(len(factors[0]), factors[1].shape[1]):
        return None
    return factors
