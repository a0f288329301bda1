"""How large the ranks of an adapter are to be, as recipes, commands and Python say it."""

from dataclasses import dataclass

from personae.recipe._faults import Fault
from personae.recipe._sizes import parse_size


@dataclass(frozen=True)
class Ranks:
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


def ranks_asked(
    rank: int | None,
    energy: float | None,
    budget: str | int | None,
    max_rank: int | None,
    rank_pattern: bool,
) -> tuple[Ranks, list[Fault]]:
    """What is asked for, and what is wrong with it, by the names that these have here."""
    faults: list[Fault] = []
    given = {"rank": rank, "energy": energy, "budget": budget}
    said = [name for name, value in given.items() if value is not None]
    if len(said) > 1:
        text = f"Give one of {', '.join(said)}: each says how large ranks are."
        faults.append(Fault((said[-1],), text))
    if rank is not None and max_rank is not None:
        text = "max_rank bounds ranks that are chosen: leave it out beside a rank."
        faults.append(Fault(("max_rank",), text))
    for name, value in (("rank", rank), ("max_rank", max_rank)):
        if value is not None and value < 1:
            faults.append(Fault((name,), f"{name} is {value}. Give 1 or more."))
    if energy is not None and not 0 < energy <= 1:
        text = f"energy is {energy:g}. Give a share above 0 and up to 1, such as 0.95."
        faults.append(Fault(("energy",), text))
    budget_bytes = None if isinstance(budget, str) else budget
    if isinstance(budget, str):
        try:
            budget_bytes = int(parse_size(budget))
        except ValueError as error:
            faults.append(Fault(("budget",), f"budget: {error}"))
    return Ranks(rank, energy, budget_bytes, max_rank, rank_pattern), faults
