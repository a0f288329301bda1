"""Rows that did not change: left out before a decomposition, put back as exact zeros after it."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from personae._types import PartSpec
from personae.ops.bits import packed_size
from personae.ops.chunks import CHUNK


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


def product_in_rows(
    left: Float[Tensor, "kept rank"],
    right: Float[Tensor, "rank in"],
    touched: Bool[Tensor, " out"] | None,
) -> Float[Tensor, "out in"]:
    """`restore_rows(left @ right, touched)`, in one place; None: no row was left out."""
    if touched is None or len(left) == len(touched):
        return left @ right
    matrix = left.new_empty(len(touched), right.shape[1])
    torch.mm(left, right, out=matrix[: len(left)])
    return spread_rows(matrix, touched)


def spread_rows(
    matrix: Float[Tensor, "out in"], touched: Bool[Tensor, " out"]
) -> Float[Tensor, "out in"]:
    """Move the first rows to where rows were touched, in place; the others become exact zeros."""
    places = touched.nonzero()[:, 0]
    at_once = max(1, CHUNK // max(matrix.shape[1], 1))
    for start in reversed(range(0, len(places), at_once)):  # no row moves up: the last ones first
        stop = min(start + at_once, len(places))
        matrix[places[start:stop]] = matrix[start:stop].clone()
    matrix[~touched] = 0
    return matrix
