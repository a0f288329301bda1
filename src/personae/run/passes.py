"""Takes a method's looks at a whole family, or at one tensor of it, before it merges."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import count

import numpy as np
import torch
from torch import Tensor

from personae.errors import CheckpointError, Faults
from personae.family.chunks import Chunk
from personae.family.finite import converging, is_finite
from personae.family.stacks import Stacks
from personae.methods import (
    Entrywise,
    Measure,
    MergeMethod,
    NotFinite,
    Statistics,
    gathered,
)
from personae.run import pool
from personae.run.items import Item
from personae.run.work import Work

MethodOf = Callable[[str], MergeMethod]
"""The method with its parameters for the tensor of this reference name."""


def gather_model(
    method_of: MethodOf,
    stacks: Stacks,
    items: Sequence[Item],
    cost: Callable[[Item], int],
    work: Work,
    *,
    late: bool,
) -> Statistics:
    """Look at the whole family; what is not finite is refused by the first full look.

    Args:
        method_of: A method with looks.
        stacks: The task vectors.
        items: What to look at, in a fixed order.
        cost: Peak bytes of one item.
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
        return _look(measure, method_of, stacks, items, cost, work, stage)

    return gathered(method_of("").gather(stacks.experts), answer)


def gather_tensor(
    method: MergeMethod,
    stacks: Stacks,
    chunks: Sequence[Chunk],
    *,
    late: bool,
) -> Statistics:
    """Look at one tensor alone, given as its chunks; `late` as for `gather_model`.

    Raises:
        NotFinite: if it holds values that are not.
    """

    def answer(measure: Measure) -> Tensor | None:
        if measure.late and late:
            return None
        total = _share(measure, method, stacks, chunks[0]).clone()
        for chunk in chunks[1:]:
            total = _added(total, _share(measure, method, stacks, chunk))
        return total

    return gathered(method.gather(stacks.experts), answer)


def _look(
    measure: Measure,
    method_of: MethodOf,
    stacks: Stacks,
    items: Sequence[Item],
    cost: Callable[[Item], int],
    work: Work,
    stage: str,
) -> Tensor:
    """The sum of one measure over all items; floating shares are summed in the items' order."""
    faults = Faults()
    total: Tensor | None = None
    waiting: dict[int, Tensor] = {}
    work.progress(stage, 0, len(items))
    results = pool.run(
        items,
        partial(_share_of_item, measure, method_of, stacks),
        cost=cost,
        workers=work.threads,
        memory=work.memory,
        in_order=True,
    )
    for done, (item, (share, found)) in enumerate(results, 1):
        for fault in found:
            faults.add(fault)
        if share is not None and share.is_floating_point():
            waiting[item.number] = share
        elif share is not None:
            total = share if total is None else _added(total, share)
        work.progress(stage, done, len(items))
    faults.raise_if_any(CheckpointError)
    for _, share in sorted(waiting.items()):
        total = share if total is None else total + share
    return torch.zeros(()) if total is None else total


def _added(total: Tensor, share: Tensor) -> Tensor:
    """Add to a total, in place; on one thread, as others are at work."""
    np.add(total.numpy(), share.numpy(), out=total.numpy())
    return total


def _share_of_item(
    measure: Measure,
    method_of: MethodOf,
    stacks: Stacks,
    item: Item,
) -> tuple[Tensor | None, list[str]]:
    total: Tensor | None = None
    faults: list[str] = []
    for chunk in item.chunks:
        method, site = method_of(chunk.spec.name), stacks.site(chunk)
        # Adapters consist of the tensors they train: the rest of the model fills no density.
        if stacks.untouched(chunk.spec.name) or not measure.applies(method, site):
            continue
        try:
            share = _share(measure, method, stacks, chunk, item.whole)
        except NotFinite:
            faults += stacks.why_not_finite(chunk)
        else:
            total = share.clone() if total is None else _added(total, share)
    return total, faults


def _share(
    measure: Measure, method: MergeMethod, stacks: Stacks, chunk: Chunk, whole: bool = False
) -> Tensor:
    """The share of one chunk.

    Raises:
        NotFinite: if it holds values that are not.
    """
    is_row = method.whole_rows and len(chunk.spec.shape) == 1
    part = chunk if whole or is_row else _sampled(chunk, measure.sample)
    if isinstance(method, Entrywise) and not method.of_models():
        place = stacks.site(part)
        blocks = stacks.blocks(part).in_rows(method.row_entries(place))
        return measure.tally(blocks, method, place)
    if method.of_models():
        stack, reference = stacks.read(part, reuse=True)
        finite, place = is_finite(stack), stacks.site(part)
        stack = stacks.models(method, stack, reference)
    else:
        stack, place, *_ = stacks.given(method, part, whole)
        finite = is_finite(stack)
    if not finite:
        raise NotFinite
    with converging(chunk.spec.name):
        return measure.tally(stack, method, place)


def _sampled(chunk: Chunk, sample: int) -> Chunk:
    """One row in `sample` of a chunk, from its middle, and at least one."""
    rows = chunk.stop - chunk.start
    wanted = max(1, rows // sample)
    if wanted == rows or not chunk.spec.shape:
        return chunk
    start = chunk.start + (rows - wanted) // 2
    return Chunk(chunk.spec, start, start + wanted)
