"""Taking stored parts apart, with a refusal that says what does not fit."""

from collections.abc import Sequence

from torch import Tensor

from personae._types import Parts
from personae.errors import PackError


def part(parts: Parts, name: str) -> Tensor:
    """The part of this name.

    Raises:
        PackError: if it is missing.
    """
    if name not in parts:
        raise PackError(
            f"Part '{name}' is missing; found: {', '.join(sorted(parts))}. The task file is "
            "damaged or was coded by another method: fetch or write it again."
        )
    return parts[name]


def cut(parts: Parts, name: str, sizes: Sequence[int]) -> Sequence[Tensor]:
    """Cut a part into pieces of these lengths.

    Raises:
        PackError: if it is missing or not as long as the pieces together.
    """
    whole = part(parts, name)
    if whole.numel() != sum(sizes):
        raise PackError(
            f"Part '{name}' has {whole.numel()} elements, expected {sum(sizes)}. The task file is "
            "damaged or was coded with other parameters: fetch or write it again."
        )
    return whole.split(list(sizes))
