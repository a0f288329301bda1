"""Low rank in full precision: the parts that `svd` and `tsv_c` store of a matrix."""

import torch
from jaxtyping import Float
from torch import Tensor

from personae._types import SVD, Layout, Parts, PartSpec
from personae.ops.parts import cut, part


def encode_low_rank(svd: SVD, rank: int) -> Parts:
    """The leading triplets: `left` (U, row after row), `singular_values`, `right` (Vᵀ); fp32."""
    u, singular_values, vh = svd
    if rank == 0 or not singular_values.any():
        return {}
    return {
        "left": u[:, :rank].flatten().clone(),
        "singular_values": singular_values[:rank].clone(),
        "right": vh[:rank].flatten().clone(),
    }


def low_rank_layout(shape: tuple[int, ...], rank: int | None) -> Layout:
    """What `encode_low_rank` stores of a matrix of this shape; nothing of what is no matrix."""
    if len(shape) != 2:
        return {}
    kept, (rows, columns) = rank or 0, shape
    return {
        "left": PartSpec.of(torch.float32, rows * kept),
        "singular_values": PartSpec(torch.float32, 1, min(shape)),
        "right": PartSpec.of(torch.float32, kept * columns),
    }


def decode_low_rank(parts: Parts, shape: tuple[int, ...]) -> Float[Tensor, "..."]:
    """U diag(σ) Vᵀ; zero where there are no parts.

    Raises:
        PackError: if the parts do not fit the shape.
    """
    if not parts:
        return torch.zeros(shape)
    left, singular_values, right = _stored(parts, shape)
    return left @ (singular_values[:, None] * right)


def stored_triplets(parts: Parts, shape: tuple[int, ...]) -> SVD:
    """U, σ and Vᵀ as they are stored, copied.

    Raises:
        PackError: if the parts do not fit the shape.
    """
    left, singular_values, right = _stored(parts, shape)
    return SVD(left.clone(), singular_values, right.clone())


def _stored(parts: Parts, shape: tuple[int, ...]) -> SVD:
    """Views of them.

    Raises:
        PackError: if the parts do not fit the shape.
    """
    singular_values = part(parts, "singular_values")
    rank, (rows, columns) = len(singular_values), shape
    left = cut(parts, "left", [rows * rank])[0].reshape(rows, rank)
    right = cut(parts, "right", [rank * columns])[0].reshape(rank, columns)
    return SVD(left, singular_values, right)
