"""Ranks of an adapter: as asked for, or the smallest or largest that keep a promise."""

import bisect
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from personae.errors import BudgetError
from personae.ops.factors import smallest_rank
from personae.run.extract import Measured

DEFAULT = 32
"""The rank where nothing is asked for and nothing is at hand."""


@dataclass(frozen=True)
class Asked:
    """How ranks are chosen; at most one of the first three is given.

    Attributes:
        rank: This one.
        energy: The smallest that keep this share of each delta's squared norm.
        budget_bytes: The largest with which the weights file has no more bytes.
        most: None above this.
        each_its_own: Whether ranks may differ; else all are as large as the largest.
    """

    rank: int | None = None
    energy: float | None = None
    budget_bytes: int | None = None
    most: int | None = None
    each_its_own: bool = False


def choose_ranks(
    asked: Asked,
    shapes: Mapping[str, tuple[int, int]],
    measured: Mapping[str, Measured],
    file_bytes: Callable[[Mapping[str, int]], int],
) -> dict[str, int]:
    """The rank of each tensor.

    Args:
        asked: What is asked for.
        shapes: Of the tensors that become factors.
        measured: What a look at them told.
        file_bytes: Bytes of the weights file at given ranks.

    Raises:
        BudgetError: if not even rank 1 fits.
    """

    def made(wanted: Mapping[str, int]) -> dict[str, int]:
        capped = {n: min(rank, asked.most or rank) for n, rank in wanted.items()}
        if not asked.each_its_own:
            return dict.fromkeys(capped, max(capped.values()))
        held = {n: measured[n].held or rank for n, rank in capped.items()}
        return {n: min(rank, held[n], *shapes[n]) for n, rank in capped.items()}

    if asked.budget_bytes is not None:
        largest = max(min(shape) for shape in shapes.values())
        ranks = range(1, min(largest, asked.most or largest) + 1)
        fits = bisect.bisect_right(
            ranks,
            asked.budget_bytes,
            key=lambda rank: file_bytes(made(dict.fromkeys(shapes, rank))),
        )
        if not fits:
            least = file_bytes(made(dict.fromkeys(shapes, 1)))
            raise BudgetError(
                f"The budget of {asked.budget_bytes:,} bytes cannot be met: an adapter of rank 1 "
                f"takes {least:,}. Give that much or more, or leave tensors out with --skip."
            )
        return made(dict.fromkeys(shapes, fits))
    return made({name: _wanted(asked, name, measured) for name in shapes})


def _wanted(asked: Asked, name: str, measured: Mapping[str, Measured]) -> int:
    if asked.rank is not None:
        return asked.rank
    energies = measured[name].energies
    if asked.energy is not None and energies is not None:
        return max(smallest_rank(energies, asked.energy), 1)
    held = measured[name].held
    return DEFAULT if held is None else max(held, 1)
