"""Rows of a merge's result, from the models as they are stored to the bytes that are written.

Blocks of entries that fit a core's cache are read as fp32, merged and rounded, one after the other;
nothing of a chunk's size is held in fp32.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from personae import kernels
from personae._memory import uninitialised
from personae.commands.merge_job import MergeJob
from personae.family.chunks import Chunk, parts_of
from personae.family.effects import PROBED, Effect, any_entry, differs, effect_of
from personae.family.finite import is_finite
from personae.methods import (
    BLOCK,
    INFINITY,
    ROUNDS_TO_INFINITY,
    DeltaBlocks,
    Entrywise,
    NotFinite,
    Statistics,
    Undecided,
    as_stored,
)
from personae.run.undecided import LeftOpen, UndecidedOfChunk


class Rows(NamedTuple):
    """Rows of the result.

    Attributes:
        value: In the dtype asked for, or in fp32 where they are still to be rounded.
        finite: Whether that is known to be finite.
        effect: What shows in them; + if it is not asked for.
    """

    value: Float[Tensor, "..."]
    finite: bool
    effect: Effect


_PARTS = 8
"""In how many parts a chunk that comes out as the base's is looked at again."""


class _Formed(NamedTuple):
    """The same, before their effect is known; holds the models.

    Attributes:
        changed: Tells whether any model differs from the base there, or the first model read.
    """

    value: Float[Tensor, "..."]
    finite: bool
    changed: Callable[[], bool]


def merge_rows(
    job: MergeJob,
    statistics: Statistics | None,
    chunk: Chunk,
    left_open: LeftOpen | None,
    asked: bool,
) -> Rows:
    """Rows of the result, with their effect if it is asked for.

    Raises:
        NotFinite: if a model holds values that are not.
    """
    told: list[UndecidedOfChunk] = []

    def tell(blocks: DeltaBlocks) -> Undecided:
        assert left_open is not None
        told.append(left_open.of(chunk, blocks, dtype))
        return told[-1]

    def in_fp32(part: Chunk) -> Tensor:
        if rows.value.dtype == torch.float32 and part == chunk:
            return rows.value
        again = None if left_open is None else lambda _: Undecided()
        return _form(job, statistics, part, torch.float32, again).value

    dtype = job.dtype_of(chunk.spec.name)
    rows = _form(job, statistics, chunk, dtype, None if left_open is None else tell)
    for one in told:
        one.done()
        asked = asked and not one.count  # what is decided late changes them
    changed = asked and rows.changed()
    rows = Rows(rows.value, rows.finite, "+")  # without the models
    if not rows.finite:
        rows = rows._replace(value=in_fp32(chunk))  # the writer says what does not fit
    if not asked:
        return rows
    return rows._replace(effect=_effect(job, chunk, rows.value, in_fp32) if changed else ".")


def _form(
    job: MergeJob,
    statistics: Statistics | None,
    chunk: Chunk,
    dtype: torch.dtype,
    tell: Callable[[DeltaBlocks], Undecided] | None,
) -> _Formed:
    """Rows in this dtype; in fp32 where loops do not know it, or the method is none of them.

    Raises:
        NotFinite: if a model holds values that are not.
    """
    stacks, name = job.stacks, chunk.spec.name
    method, site = job.method_of(name), stacks.site(chunk)
    if not isinstance(method, Entrywise):
        stack, reference = stacks.read(chunk, reuse=True)
        if not (is_finite(stack) and is_finite(reference)):
            raise NotFinite
        changed = any_entry(stack)  # before the method, which may work in place
        return _Formed(method.apply(stack, statistics, site) + reference, False, lambda: changed)
    value = uninitialised(chunk.shape, dtype if dtype in ROUNDS_TO_INFINITY else torch.float32)
    coefficients = method.coefficients(stacks.experts)
    models = None
    if coefficients is not None and job.is_narrow(name):
        models = stacks.summands(chunk, coefficients)
    if models is not None:
        largest = _combine(models, as_stored(value))
        if largest >= INFINITY:
            raise NotFinite
        changed = partial(_are_apart, [model for model, _ in models])
    else:
        blocks = stacks.blocks(chunk, method)
        told = None if tell is None else tell(blocks)
        merged = method.merge_blocks(blocks, statistics or {}, site, told)
        largest = _store(merged, blocks, as_stored(value))
        changed = partial(bool, blocks.changed)  # without the blocks, which hold models' values
    return _Formed(value, largest < ROUNDS_TO_INFINITY[value.dtype], changed)


def _effect(
    job: MergeJob, chunk: Chunk, value: Tensor, in_fp32: Callable[[Chunk], Tensor]
) -> Effect:
    """What shows in rows of the changes that there are: mostly told by a few entries of the base.

    What is lost is rare enough for all to be read again, a part at a time: do more than roundings
    differ?
    """
    stacks, dtype = job.stacks, job.dtype_of(chunk.spec.name)
    head = stacks.head(chunk, PROBED)
    few = value[: head.stop - head.start] if chunk.spec.shape else value
    if differs(few, stacks.reference(head), dtype):
        return "+"
    if differs(value, stacks.reference(chunk), dtype):
        return "+"
    seen: set[Effect] = set()
    for part in parts_of(chunk, _PARTS):
        reference = stacks.reference(part)
        changed = partial(stacks.changed, part, reference)
        seen.add(effect_of(in_fp32(part), reference, dtype, changed))
    told: tuple[Effect, ...] = ("+", "~", "0", ".")
    return next(effect for effect in told if effect in seen)


def _are_apart(models: Sequence[Tensor]) -> bool:
    """Whether models are not all the same."""
    first = models[0]
    return any(own.dtype != first.dtype or differs(own, first, first.dtype) for own in models[1:])


def _store(merged: Iterable[ndarray], blocks: DeltaBlocks, target: ndarray) -> int:
    """Add blocks to the reference's values, if any; returns the bits of the largest magnitude."""
    largest = 0
    for one in merged:
        place = target[blocks.start : blocks.start + one.size]
        if blocks.has_reference:
            largest = max(largest, kernels.store_sum(one, blocks.reference, place))
        else:
            largest = max(largest, kernels.store(one, place))
        del one  # not held beside the next
    return largest


def _combine(models: Sequence[tuple[Tensor, float]], target: ndarray) -> int:
    """Σ c_n θ_n; returns the bits of the largest magnitude, before it was rounded."""
    stored = [(as_stored(model), np.float32(coefficient)) for model, coefficient in models]
    largest = 0
    for start in range(0, target.size, BLOCK):
        block = slice(start, start + BLOCK)
        total = np.zeros(target[block].size, np.float32)
        for model, coefficient in stored:
            kernels.add_multiple(model[block], coefficient, total)
        largest = max(largest, kernels.store(total, target[block]))
        del total  # not held beside the next
    return largest
