"""Rows that did not change: left out before a decomposition, put back as exact zeros after it."""

from jaxtyping import Bool, Float
from torch import Tensor


def touched_rows(matrix: Float[Tensor, "out in"]) -> Bool[Tensor, " out"]:
    """Mark the rows that hold anything but zeros."""
    return matrix.any(dim=1)


def restore_rows(
    compact: Float[Tensor, "kept in"], touched: Bool[Tensor, " out"]
) -> Float[Tensor, "out in"]:
    """Undo `matrix[touched]`: exact zeros stand where a row was left out."""
    if len(compact) == len(touched):
        return compact
    matrix = compact.new_zeros(len(touched), compact.shape[1])
    matrix[touched] = compact
    return matrix
