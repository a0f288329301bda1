"""Ranks of an adapter: as asked for, or the smallest or largest that keep a promise."""

import bisect
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from personae.errors import BudgetError, RecipeError
from personae.ops.factors import smallest_rank
from personae.recipe import Ranks

DEFAULT = 32
"""The rank where nothing is asked for and nothing is at hand."""


def check_rank(asked: Ranks, shapes: Iterable[tuple[int, int]]) -> None:
    """Refuse a rank that no matrix of an adapter has.

    Raises:
        RecipeError: if it is above the smaller side of each.
    """
    widest = max(min(shape) for shape in shapes)
    if asked.rank is not None and asked.rank > widest:
        raise RecipeError(
            f"rank is {asked.rank:,}, and no matrix has more than {widest:,} directions, its "
            "smaller side. Give that or less."
        )


def choose_ranks(
    asked: Ranks,
    defaults: Mapping[str, int],
    most: Mapping[str, int],
    file_bytes: Callable[[Mapping[str, int]], int],
    energies: Mapping[str, Tensor | None] | None = None,
) -> dict[str, int]:
    """The rank of each tensor.

    Args:
        asked: What is asked for.
        defaults: The rank of each where nothing is.
        most: The rank of each above which nothing is gained.
        file_bytes: Bytes of the weights file at given ranks.
        energies: σ² of each, descending, where they are asked for.

    Raises:
        BudgetError: if not even rank 1 fits.
    """

    def made(wanted: Mapping[str, int]) -> dict[str, int]:
        capped = {n: min(rank, asked.most or rank) for n, rank in wanted.items()}
        if not asked.each_its_own:
            return dict.fromkeys(capped, max(capped.values()))
        return {n: min(rank, most[n]) for n, rank in capped.items()}

    if asked.budget_bytes is not None:
        largest = max(most.values())
        ranks = range(1, min(largest, asked.most or largest) + 1)
        fits = bisect.bisect_right(
            ranks,
            asked.budget_bytes,
            key=lambda rank: file_bytes(made(dict.fromkeys(defaults, rank))),
        )
        if not fits:
            least = file_bytes(made(dict.fromkeys(defaults, 1)))
            raise BudgetError(
                f"The budget of {asked.budget_bytes:,} bytes cannot be met: an adapter of rank 1 "
                f"takes {least:,}. Give that much or more, or leave tensors out with skip."
            )
        return made(dict.fromkeys(defaults, fits))
    known = energies or {}
    return made({n: _wanted(asked, rank, known.get(n)) for n, rank in defaults.items()})


def _wanted(asked: Ranks, default: int, energies: Tensor | None) -> int:
    if asked.rank is not None:
        return asked.rank
    if asked.energy is not None and energies is not None:
        return max(smallest_rank(energies, asked.energy), 1)
    return default
