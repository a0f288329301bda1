"""Greedy low rank in few levels: each triplet is the best one of what those before it left.

A matrix R loses one triplet s · p qᵀ after the other, p and q vectors of small integers. p is the
leading left singular vector of R, quantised; q the least-squares fit of R against it, quantised;
p is fitted to q and quantised anew, and s is what the two fit best. So every triplet corrects the
coding errors of those before (cf. the semi-discrete decomposition, O'Leary and Peleg 1983).

Vectors are quantised on a trellis, finer the larger the triplet is (see `methods._trellis`). Their
scale does not matter, since s takes it up.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from personae.methods._trellis import MODELS, quantise
from personae.ops.svd import largest_magnitude

_AT_ONCE = 4
"""Triplets found with one look at what is left."""
_FOLLOWED = 16
"""Directions that the subspace iteration follows."""
_FIRST_STEPS = 3
"""Its steps before the first triplets; one before all others."""


class Triplet(NamedTuple):
    """One term s · p qᵀ of a matrix.

    Attributes:
        model: Of both vectors, its place in `MODELS`.
        left: p.
        value: s, a bfloat16 number.
        right: q.
        gain: By how much it lowers the squared norm of what is left.
        nbytes: Bytes of both vectors, or a little more.
    """

    model: int
    left: Int8[Tensor, " out"]
    value: float
    right: Int8[Tensor, " in"]
    gain: float
    nbytes: float


def greedy_triplets(
    matrix: Float[Tensor, "out in"], price: float, overhead: int, *, overwrite: bool = False
) -> Iterator[Triplet]:
    """Triplets of a matrix without end, or until nothing is left.

    Which model a triplet has depends on the price alone, and not on how many are taken.

    Args:
        matrix: fp32.
        price: Squared norm that a byte has to be worth: it decides how fine a step pays.
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

    def model_for(energy: float) -> int:
        rate = (rows + columns) / 8
        net = [m.kept**2 * energy - price * (m.rate * rate + overhead) for m in MODELS]
        return max(range(len(net)), key=net.__getitem__)

    generator = torch.Generator().manual_seed(0)  # of the CPU: one start for every device
    width = min(_FOLLOWED, rows, columns)
    basis = torch.randn(columns, width, generator=generator).to(matrix.device)
    for _ in range(_FIRST_STEPS - 1):
        basis = _iterated(left_over, basis)[2]
    while True:
        leading, values, basis = _iterated(left_over, basis)
        energies = values[:_AT_ONCE].square().tolist()
        models = [model_for(energy) for energy in energies]
        worths = [
            MODELS[model].kept * energy for model, energy in zip(models, energies, strict=True)
        ]
        start = _quantised(leading[:, : len(models)], models, worths, price)[0]
        right, right_bytes = _quantised(left_over.T @ start, models, worths, price)
        images = left_over @ right
        left, left_bytes = _quantised(images, models, worths, price)
        scales: list[float] = []
        crossed = ((left.T @ left) * (right.T @ right)).double()
        products = (left * images).sum(dim=0).double()
        for place, (model, norm) in enumerate(
            zip(models, crossed.diagonal().tolist(), strict=True)
        ):
            # What those found at the same time take away of it.
            taken = sum(s * float(crossed[place, before]) for before, s in enumerate(scales))
            product = float(products[place]) - taken
            gain = product**2 / norm if norm else 0.0
            if not gain > 0:
                return
            sign = -1 if product < 0 else 1
            value = _bfloat16(abs(product / norm) * unit)
            scales.append(sign * value / unit)
            p, q = (sign * left[:, place]).to(torch.int8), right[:, place].to(torch.int8)
            nbytes = left_bytes[place] + right_bytes[place]
            yield Triplet(model, p, value, q, gain * unit**2, nbytes)
        left_over.addmm_(left * torch.tensor(scales, device=left.device), right.T, alpha=-1)


def _iterated(
    matrix: Float[Tensor, "out in"], basis: Float[Tensor, "in width"]
) -> tuple[Float[Tensor, "out width"], Float[Tensor, " width"], Float[Tensor, "in width"]]:
    """One step of subspace iteration: approximate singular vectors and values."""
    left = torch.linalg.qr(matrix @ basis)[0]
    right, values, turn = torch.linalg.svd(matrix.T @ left, full_matrices=False)
    return left @ turn.T, values, right


def _quantised(
    vectors: Float[Tensor, "length vector"],
    models: Sequence[int],
    worths: Sequence[float],
    price: float,
) -> tuple[Float[Tensor, "length vector"], list[float]]:
    """The integers of each vector, and their bytes."""
    found = [
        quantise(vector, model, worth, price)
        for vector, model, worth in zip(vectors.T.cpu(), models, worths, strict=True)
    ]
    integers = torch.stack([path for path, _ in found], dim=1)
    return integers.to(vectors), [nbytes for _, nbytes in found]


def _bfloat16(value: float) -> float:
    return float(torch.tensor(value).bfloat16())
