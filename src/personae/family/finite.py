"""What is said where values are not finite, or a decomposition of them fails."""

import math
from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor

from personae.errors import MethodError


def not_finite(label: str, name: str, tensor: Tensor) -> list[str]:
    """A text if the tensor holds NaN or Inf, else none; `label` says whose it is."""
    return holds_bad(label, name, count_bad(tensor))


def count_bad(tensor: Tensor) -> int:
    """How many values are NaN or infinite."""
    if not tensor.is_floating_point() or not tensor.numel():
        return 0
    if tensor.itemsize == 1:
        tensor = tensor.float()
    if torch.stack(tensor.aminmax()).isfinite().all():  # NaN passes through both
        return 0
    return tensor.numel() - int(tensor.isfinite().count_nonzero())


def holds_bad(label: str, name: str, count: int) -> list[str]:
    """The text for a tensor with so many values that are NaN or infinite; none if there is none."""
    if not count:
        return []
    return [
        f"{label}: tensor '{name}' holds {count} value(s) that are NaN or infinite. "
        "Repair the checkpoint, or leave the tensor out with 'skip'."
    ]


def is_finite(tensor: Tensor) -> bool:
    """Whether every value is finite: a sum is only if every term is, and costs one reading."""
    return math.isfinite(float(tensor.sum())) or bool(tensor.isfinite().all())


def beyond_fp32(name: str) -> str:
    """The text for a tensor whose values are finite and whose differences are not."""
    return (
        f"Tensor '{name}' holds values whose difference from the base exceeds the range of "
        "float32, in which everything is computed. Was the expert fine-tuned from the base? To "
        "leave the tensor as in the base, add it to 'skip'."
    )


@contextmanager
def converging(name: str) -> Generator[None]:
    """Name the tensor whose decomposition fails.

    Raises:
        MethodError: if a decomposition does not converge.
    """
    try:
        yield
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
        raise MethodError(
            f"Tensor '{name}' cannot be decomposed: {error}. Leave it out with 'skip', or take a "
            "method that does not decompose."
        ) from error
