"""Rows that did not change: left out before a decomposition, put back as exact zeros after it."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from personae._types import PartSpec
from personae.ops.bits import packed_size


def touched_rows(matrix: Float[Tensor, "out in"]) -> Bool[Tensor, " out"]:
    """Mark the rows that hold anything but zeros."""
    return matrix.any(dim=1)


def rows_spec(rows: int) -> PartSpec:
    """The part that marks the touched ones of so many rows, a bit each; absent if all are."""
    return PartSpec.of(torch.uint8, packed_size(rows, 1))._replace(optional=True)


def restore_rows(
    compact: Float[Tensor, "kept in"], touched: Bool[Tensor, " out"]
) -> Float[Tensor, "out in"]:
    """Undo `matrix[touched]`: exact zeros stand where a row was left out."""
    if len(compact) == len(touched):
        return compact
    matrix = compact.new_zeros(len(touched), compact.shape[1])
    matrix[touched] = compact
    return matrix
