"""Takes the passes of a merge method or codec: over a family, one expert, or one tensor."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import TypeVar

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from personae._safetensors import load_safetensors
from personae.errors import CheckpointError, Faults
from personae.family.chunks import Chunk, Item, parts_of
from personae.family.deltas import Deltas, Stacks
from personae.family.finite import converging, is_finite
from personae.methods import (
    Codec,
    Entrywise,
    MergeMethod,
    NotFinite,
    Pass,
    Statistics,
    statistics_of,
)
from personae.run.costs import coding_bytes
from personae.run.known import Known, cut_out, whole
from personae.run.scan import ExpertScan
from personae.run.work import Work
from personae.writers import atomic_file

MethodOf = Callable[[str], MergeMethod]
"""The method with its parameters for the tensor of this reference name."""

Place = TypeVar("Place")

_LEAST_SAMPLED = 1 << 20
"""Entries of one tensor that are sampled at least: of fewer a guess is wide, and takes a pass more
to narrow."""


def kept(path: Path, find: Callable[[], Statistics]) -> Statistics:
    """Statistics as an earlier run has left them, or found and left for a later one.

    Args:
        path: Where, in the unfinished output, which belongs to runs that would find the same.
        find: Takes the passes.
    """
    if path.exists():
        return load_safetensors(path)
    found = find()
    with atomic_file(path) as part:
        safetensors.torch.save_file({name: each.contiguous() for name, each in found.items()}, part)
    return found


def passes_over_family(
    method_of: MethodOf,
    stacks: Stacks,
    items: Sequence[Item],
    cost: Callable[[Item], int],
    work: Work,
    *,
    late: bool,
) -> Statistics:
    """A merge method's passes over a family; the first full one refuses what is not finite.

    Args:
        method_of: A method with passes.
        stacks: The task vectors.
        items: What is read, in a fixed order.
        cost: Peak bytes of one item.
        work: Workers, memory bound, progress.
        late: Takes no pass whose answer may be late.

    Raises:
        CheckpointError: naming every weight that is not finite.
    """
    numbers = count(1)

    def take(one: Pass) -> Tensor | dict[str, Tensor] | None:
        if one.late and late:
            return None
        terms = partial(_term_of_item, one, method_of, stacks)
        stage = f"pass {next(numbers)}: {one.name}"
        return _fold(one, items, terms, cost, stage, work, in_order=True)

    return statistics_of(method_of("").passes(stacks.experts), take)


def passes_over_tensor(
    method: MergeMethod, stacks: Stacks, chunks: Sequence[Chunk], *, late: bool
) -> Statistics:
    """The same over one tensor alone, given as its chunks, on the thread that asks.

    Raises:
        NotFinite: if it holds values that are not.
    """
    entries = sum(chunk.numel for chunk in chunks)

    def take(one: Pass) -> Tensor | None:
        if one.late and late:
            return None
        one = one._replace(sample=max(1, min(one.sample, entries // _LEAST_SAMPLED)))
        parts = (part for chunk in chunks for part in _parts(one, chunk))
        return _total(_term(one, method, stacks, part) for part in parts)

    return statistics_of(method.passes(stacks.experts), take)


def passes_over_expert(
    codec: Codec, deltas: Deltas, scan: ExpertScan, known: Known, work: Work
) -> Statistics:
    """A codec's passes over all deltas of one expert that are coded and not zero."""
    names = [
        name
        for name in deltas.alignment.shared
        if scan.tensors[name].changed and codec.treats(deltas.reference.specs[name]) == "code"
    ]
    if not names:
        return {}

    def terms(one: Pass, name: str) -> tuple[list[Tensor], list[str]]:
        delta, spec = deltas.read(name), deltas.reference.specs[name]
        blocks = codec.blocks(spec) or (whole(spec),)
        pairs = zip(blocks, known.of(spec, blocks), strict=True)
        parts = ((cut_out(delta, block), context) for block, context in pairs)
        with converging(name):
            return [one.term(part, context) for part, context in parts if part.any()], []

    def cost(name: str) -> int:
        return deltas.alignment.kept_bytes + coding_bytes([codec], deltas.reference.specs[name])

    def take(one: Pass) -> Tensor | dict[str, Tensor]:
        stage = f"pass over {known.task}: {one.name}"
        return _fold(one, names, partial(terms, one), cost, stage, work)

    return statistics_of(codec.passes(), take)


def _fold(
    one: Pass,
    items: Sequence[Place],
    terms: Callable[[Place], tuple[list[Tensor], list[str]]],
    cost: Callable[[Place], int],
    stage: str,
    work: Work,
    *,
    in_order: bool = False,
) -> Tensor | dict[str, Tensor]:
    """The sum of a pass's terms over all items, or each of them by item and number.

    Integers are added as they come; floating terms wait, and are added in the items' order.

    Args:
        one: The pass.
        items: What it reads.
        terms: Terms of an item, and what is wrong with its weights.
        cost: Peak bytes of one item.
        stage: What progress calls it.
        work: Workers, memory bound, progress.
        in_order: Whether items are read in the order given.

    Raises:
        CheckpointError: naming every weight that is not finite.
    """
    faults = Faults()
    total: Tensor | None = None
    waiting: dict[int, list[Tensor]] = {}
    for (number, _), (found, wrong) in work.map(
        list(enumerate(items)),
        lambda numbered: terms(numbered[1]),
        cost=lambda numbered: cost(numbered[1]),
        stage=stage,
        in_order=in_order,
    ):
        for fault in wrong:
            faults.add(fault)
        if one.apart or any(term.is_floating_point() for term in found):
            waiting[number] = found
        else:
            total = _total(found, total)
        del found  # not held while the next is waited for
    faults.raise_if_any(CheckpointError)
    if one.apart:
        named = {
            f"{items[number]}/{place:06}": term
            for number, found in waiting.items()
            for place, term in enumerate(found)
        }
        return dict(sorted(named.items()))
    total = _total((term for _, found in sorted(waiting.items()) for term in found), total)
    return torch.zeros(()) if total is None else total


def _total(terms: Iterable[Tensor], total: Tensor | None = None) -> Tensor | None:
    """Terms added in order, in place, to a total or to the first of them, which nobody else holds.

    On one thread, as others are at work.
    """
    for term in terms:
        if total is None:
            total = term
        else:
            np.add(total.numpy(), term.numpy(), out=total.numpy())
        del term  # not held beside the next
    return total


def _term_of_item(
    one: Pass, method_of: MethodOf, stacks: Stacks, item: Item
) -> tuple[list[Tensor], list[str]]:
    total: Tensor | None = None
    faults: list[str] = []
    for chunk in item.chunks:
        method, site = method_of(chunk.spec.name), stacks.site(chunk)
        # Adapters consist of the tensors they train: the rest of the model fills no density.
        if stacks.untouched(chunk.spec.name) or not one.applies(method, site):
            continue
        try:
            for part in [chunk] if item.whole else _parts(one, chunk):
                total = _total([_term(one, method, stacks, part, item.whole)], total)
        except NotFinite as error:
            faults += error.faults or stacks.why_not_finite(chunk)
    return [] if total is None else [total], faults


def _term(
    one: Pass, method: MergeMethod, stacks: Stacks, chunk: Chunk, whole: bool = False
) -> Tensor:
    """The term of one chunk.

    Raises:
        NotFinite: if it holds values that are not.
    """
    is_row = method.whole_rows and len(chunk.spec.shape) == 1
    part = chunk if whole or is_row else _sampled(chunk, one.sample)
    if isinstance(method, Entrywise):
        return one.term(stacks.blocks(part, method), method, stacks.site(part))
    stack, place, *_ = stacks.given(method, part, whole)
    if not is_finite(stack):
        raise NotFinite
    with converging(chunk.spec.name):
        return one.term(stack, method, place)


def parts_counted(chunk: Chunk) -> list[Chunk]:
    """The parts of a chunk that are read one after the other where much is counted: its halves."""
    return parts_of(chunk, 2)


def _parts(one: Pass, chunk: Chunk) -> list[Chunk]:
    return parts_counted(chunk) if one.term_bytes and one.sample == 1 else [chunk]


def _sampled(chunk: Chunk, sample: int) -> Chunk:
    """One row in `sample` of a chunk, from its middle, and at least one."""
    rows = chunk.stop - chunk.start
    wanted = max(1, rows // sample)
    if wanted == rows or not chunk.spec.shape:
        return chunk
    start = chunk.start + (rows - wanted) // 2
    return Chunk(chunk.spec, start, start + wanted)
