"""Takes a method's looks at a whole family, or at one tensor of it, before it merges."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import count

import torch
from torch import Tensor

from personae.errors import CheckpointError, Faults
from personae.execute import pool
from personae.execute.pieces import Piece, Unit
from personae.execute.scan import converging
from personae.execute.stream import Stacks
from personae.execute.work import Work
from personae.methods import Measure, MergeMethod, Statistics, gathered

MethodOf = Callable[[str], MergeMethod]
"""The method with its parameters for the tensor of this reference name."""


class NotFinite(Exception):
    """A look at one tensor met values that are not finite.

    Attributes:
        faults: Which, of base and experts.
    """

    def __init__(self, faults: list[str]) -> None:
        """Keep what is wrong."""
        super().__init__(*faults)
        self.faults = faults


def gather_model(
    method_of: MethodOf,
    stacks: Stacks,
    units: Sequence[Unit],
    cost: Callable[[Unit], int],
    work: Work,
    *,
    late: bool,
) -> Statistics:
    """Look at the whole family; what is not finite is refused by the first full look.

    Args:
        method_of: A method with looks.
        stacks: The task vectors.
        units: What to look at, in a fixed order.
        cost: Peak bytes of one unit.
        work: Workers, memory bound, progress.
        late: Takes no look whose answer may be late.

    Raises:
        CheckpointError: naming every weight that is not finite.
    """
    numbers = count(1)

    def answer(measure: Measure) -> Tensor | None:
        if measure.late and late:
            return None
        stage = f"measuring {measure.name}, look {next(numbers)}"
        return _look(measure, method_of, stacks, units, cost, work, stage)

    return gathered(method_of("").gather(stacks.experts), answer)


def gather_tensor(
    method: MergeMethod,
    stacks: Stacks,
    pieces: Sequence[Piece],
    *,
    late: bool,
) -> Statistics:
    """Look at one tensor alone, given as its pieces; `late` as for `gather_model`.

    Raises:
        NotFinite: if it holds values that are not.
    """

    def answer(measure: Measure) -> Tensor | None:
        if measure.late and late:
            return None
        total = _share(measure, method, stacks, pieces[0]).clone()
        for piece in pieces[1:]:
            total.add_(_share(measure, method, stacks, piece))
        return total

    return gathered(method.gather(stacks.experts), answer)


def _look(
    measure: Measure,
    method_of: MethodOf,
    stacks: Stacks,
    units: Sequence[Unit],
    cost: Callable[[Unit], int],
    work: Work,
    stage: str,
) -> Tensor:
    """The sum of one measure over all units; floating shares are summed in the units' order."""
    faults = Faults()
    total: Tensor | None = None
    waiting: dict[int, Tensor] = {}
    work.progress(stage, 0, len(units))
    results = pool.run(
        units,
        partial(_share_of_unit, measure, method_of, stacks),
        cost=cost,
        workers=work.threads,
        memory=work.memory,
        in_order=True,
    )
    for done, (unit, (share, found)) in enumerate(results, 1):
        for fault in found:
            faults.add(fault)
        if share is not None and share.is_floating_point():
            waiting[unit.number] = share
        elif share is not None:
            total = share if total is None else total.add_(share)
        work.progress(stage, done, len(units))
    faults.raise_if_any(CheckpointError)
    for _, share in sorted(waiting.items()):
        total = share if total is None else total + share
    return torch.zeros(()) if total is None else total


def _share_of_unit(
    measure: Measure,
    method_of: MethodOf,
    stacks: Stacks,
    unit: Unit,
) -> tuple[Tensor | None, list[str]]:
    total: Tensor | None = None
    faults: list[str] = []
    for piece in unit.pieces:
        method, site = method_of(piece.spec.name), stacks.site(piece)
        # Adapters consist of the tensors they train: the rest of the model fills no density.
        if stacks.untouched(piece.spec.name) or not measure.applies(method, site):
            continue
        part = piece if unit.whole else _sampled(piece, measure.sample)
        stack, place, _ = stacks.given(method, part, unit.whole)
        faults += stacks.faults(stack, part)
        if not faults:
            with converging(piece.spec.name):
                share = measure.tally(stack, method, place)
            total = share.clone() if total is None else total.add_(share)
    return total, faults


def _share(measure: Measure, method: MergeMethod, stacks: Stacks, piece: Piece) -> Tensor:
    part = _sampled(piece, measure.sample)
    stack, _ = stacks.read(part, reuse=True)
    faults = stacks.faults(stack, part)
    if faults:
        raise NotFinite(faults)
    return measure.tally(stack, method, stacks.site(part))


def _sampled(piece: Piece, sample: int) -> Piece:
    """One row in `sample` of a piece, from its middle, and at least one."""
    rows = piece.stop - piece.start
    wanted = max(1, rows // sample)
    if wanted == rows or not piece.spec.shape:
        return piece
    start = piece.start + (rows - wanted) // 2
    return Piece(piece.spec, start, start + wanted)
