"""Greedy low rank in few levels: each triplet is the best one of what those before it left.

A matrix R loses one triplet s · p qᵀ after the other, p and q vectors of small integers. p is the
leading left singular vector of R, quantised; q the least-squares fit of R against it, quantised;
p is fitted to q and quantised anew, and s is what the two fit best. So every triplet corrects the
coding errors of those before (cf. the semi-discrete decomposition, O'Leary and Peleg 1983).

An integer of L levels is one of 1 - L, 3 - L, … L - 1. The scale of a vector does not matter, since
s takes it up: the step of its quantiser is the one of a few whose integers have the least angle.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from personae.ops.digits import digits_size
from personae.ops.svd import largest_magnitude

LEVELS = (2, 3, 4, 6, 16)
"""Levels that a triplet may have: 8, 5, 4, 3 and 2 integers a byte."""
_STEPS = {2: 1.6, 3: 1.224, 4: 0.996, 6: 0.733, 16: 0.335}
"""Step of the best uniform quantiser of a Gaussian, in its standard deviations."""
_KEPT = {2: 0.637, 3: 0.810, 4: 0.881, 6: 0.942, 16: 0.9885}
"""Share of a Gaussian's squared norm that it keeps: 1 - D."""
_STRETCHES = (0.8, 1.0, 1.25, 1.6, 2.1, 2.8)
"""Steps tried over those: tails heavier than a Gaussian's want longer ones."""
_AT_ONCE = 4
"""Triplets found with one look at what is left."""
_FOLLOWED = 16
"""Directions that the subspace iteration follows."""
_FIRST_STEPS = 3
"""Its steps before the first triplets; one before all others."""


class Triplet(NamedTuple):
    """One term s · p qᵀ of a matrix.

    Attributes:
        levels: Levels of the integers of both vectors.
        left: p.
        value: s.
        right: q.
        gain: By how much it lowers the squared norm of what is left.
        nbytes: Bytes of both vectors as digits.
    """

    levels: int
    left: Int8[Tensor, " out"]
    value: float
    right: Int8[Tensor, " in"]
    gain: float
    nbytes: int


def greedy_triplets(
    matrix: Float[Tensor, "out in"], price: float, overhead: int, *, overwrite: bool = False
) -> Iterator[Triplet]:
    """Triplets of a matrix without end, or until nothing is left.

    Which levels a triplet has depends on the price alone, and not on how many are taken.

    Args:
        matrix: fp32.
        price: Squared norm that a byte has to be worth: it decides how many levels pay.
        overhead: Bytes of a triplet beside its vectors.
        overwrite: Whether the matrix may be worked on in place; else it is not modified.
    """
    rows, columns = matrix.shape
    # Squares of very small or large deltas would leave the range of fp32.
    unit = largest_magnitude(matrix)
    if unit == 0:
        return
    left_over = matrix.div_(unit) if overwrite else matrix / unit
    price /= unit**2
    sizes = {n: digits_size(rows, n) + digits_size(columns, n) for n in LEVELS}

    def levels_for(energy: float) -> int:
        return max(LEVELS, key=lambda n: _KEPT[n] ** 2 * energy - price * (sizes[n] + overhead))

    generator = torch.Generator().manual_seed(0)  # of the CPU: one start for every device
    width = min(_FOLLOWED, rows, columns)
    basis = torch.randn(columns, width, generator=generator).to(matrix.device)
    for _ in range(_FIRST_STEPS - 1):
        basis = _iterated(left_over, basis)[2]
    while True:
        leading, values, basis = _iterated(left_over, basis)
        levels = [levels_for(energy) for energy in values[:_AT_ONCE].square().tolist()]
        right = _quantised(left_over.T @ _quantised(leading[:, : len(levels)], levels), levels)
        images = left_over @ right
        left = _quantised(images, levels)
        scales: list[float] = []
        crossed = ((left.T @ left) * (right.T @ right)).double()
        products = (left * images).sum(dim=0).double()
        for place, (count, norm) in enumerate(
            zip(levels, crossed.diagonal().tolist(), strict=True)
        ):
            # What those found at the same time take away of it.
            taken = sum(s * float(crossed[place, before]) for before, s in enumerate(scales))
            product = float(products[place]) - taken
            gain = product**2 / norm if norm else 0.0
            if not gain > 0:
                return
            scales.append(product / norm)
            sign = -1 if product < 0 else 1
            p, q = (sign * left[:, place]).to(torch.int8), right[:, place].to(torch.int8)
            yield Triplet(count, p, abs(scales[-1]) * unit, q, gain * unit**2, sizes[count])
        left_over.addmm_(left * torch.tensor(scales, device=left.device), right.T, alpha=-1)


def _iterated(
    matrix: Float[Tensor, "out in"], basis: Float[Tensor, "in width"]
) -> tuple[Float[Tensor, "out width"], Float[Tensor, " width"], Float[Tensor, "in width"]]:
    """One step of subspace iteration: approximate singular vectors and values."""
    left = torch.linalg.qr(matrix @ basis)[0]
    right, values, turn = torch.linalg.svd(matrix.T @ left, full_matrices=False)
    return left @ turn.T, values, right


def _quantised(
    vectors: Float[Tensor, "length vector"], levels: Sequence[int]
) -> Float[Tensor, "length vector"]:
    """The integers of each vector, of so many levels, at the least angle to it."""
    tops = torch.tensor([count - 1.0 for count in levels], device=vectors.device)
    steps = torch.tensor([_STEPS[count] for count in levels], device=vectors.device)
    steps = steps * vectors.square().mean(dim=0).sqrt()
    best, found = torch.zeros_like(steps) - 1, torch.zeros_like(vectors)
    for stretch in _STRETCHES:
        scaled = vectors / (stretch * steps)
        integers = scaled.add_((tops + 1) / 2).floor_().clamp_(min=0)
        integers = torch.minimum(integers, tops, out=integers).mul_(2).sub_(tops)
        cosines = (integers * vectors).sum(dim=0).square() / integers.square().sum(dim=0)
        found = torch.where(cosines > best, integers, found)
        best = torch.maximum(cosines.nan_to_num(0.0), best)
    return found
