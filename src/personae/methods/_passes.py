"""Passes: what a merge method or codec asks of a whole family, or of a tensor, before it runs.

A method's `passes` is a generator: it yields a `Pass`, is sent what that came to, may yield the
next, and returns the statistics. Whoever holds the tensors takes them (`run.passes`, or in memory
`MergeMethod.statistics` and `Codec.statistics`).
"""

from collections.abc import Callable, Generator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from personae.methods._site import Site

Statistics = Mapping[str, Tensor]
"""What a method has to know beyond the entries it is given, by name."""


def _everywhere(_: Any, __: Site) -> bool:
    return True


class Pass(NamedTuple):
    """A fold over tensors: the sum of what each of them, or each cut of one, adds.

    Attributes:
        name: What it finds, for progress.
        term: What the values given add: int64, or floating (then summed in the order of tensors
            and rows). Of a merge method `term(task_vectors, method, site)`, with the method as it
            is for that tensor; entry-wise ones take the task vectors by `delta_blocks`, for they
            may be `DeltaBlocks`. Of a codec `term(delta, context)`, for each block that is coded
            and not zero.
        applies: `applies(method, site)`: whether a merge method's pass reads a tensor.
        sample: Reads about one row in so many, spread over all tensors: enough for a guess.
        late: Whether it may be answered by None: the method merges all the same, telling in an
            `Undecided` what of its result depends on it.
        apart: Whether terms are not summed, but sent one by one: name to term, in order.
    """

    name: str
    term: Callable[..., Tensor]
    applies: Callable[[Any, Site], bool] = _everywhere
    sample: int = 1
    late: bool = False
    apart: bool = False


Passes = Generator[Pass, Any, Statistics]
"""Yields passes, is sent what each came to, returns the statistics."""


def statistics_of(passes: Passes, take: Callable[[Pass], Any]) -> Statistics:
    """The statistics, once `take` has told what each pass came to."""
    found: Any = None
    while True:
        try:
            one = passes.send(found)
        except StopIteration as done:  # of the passes alone: one of `take` would be a fault
            return done.value
        found = take(one)


def scalars(numbers: Mapping[str, float]) -> Statistics:
    """Numbers as statistics, to the bit."""
    return {name: torch.tensor(number, dtype=torch.float64) for name, number in numbers.items()}


def numbers(statistics: Statistics | None) -> dict[str, float]:
    """Statistics that are scalars, as numbers."""
    return {name: float(scalar) for name, scalar in (statistics or {}).items()}
