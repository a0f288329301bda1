"""The task vectors of a family, stacked chunk by chunk, as they stream through a merge."""

import math
import threading
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from personae.checkpoints import Checkpoint
from personae.checkpoints.vocabulary import has_vocabulary_axis
from personae.checkpoints.vocabulary_rows import settle
from personae.family.chunks import Chunk
from personae.family.deltas import Deltas
from personae.family.effects import Effect, differs
from personae.family.finite import beyond_fp32, is_finite, not_finite
from personae.family.opened import Family
from personae.methods import Factors, Given, MergeMethod, Site
from personae.ops.layout import transposed_weights


class Stacks:
    """The task vectors of a family (difference vectors where it has no base), chunk by chunk.

    Attributes:
        names: Reference names of the tensors that every expert has in full, sorted.
        statistics: Those of batch normalisation's running statistics, of which only means make
            sense.
        experts: Number of experts.
    """

    def __init__(self, family: Family) -> None:
        """Take the tensors every expert shares with the reference."""
        self._family = family
        self._reference = family.base
        self._deltas = [Deltas(e, family.base, family.has_base) for e in family.experts.values()]
        shared = [{*e.shared} - {*e.grown} for e in family.experts.values()]
        self.names: Sequence[str] = sorted(set[str].intersection(*shared))
        buffers = set[str].intersection(*({*e.buffers} for e in family.experts.values()))
        self.statistics: Sequence[str] = sorted(
            name for name in buffers if family.base.specs[name].is_floating
        )
        self.experts = len(self._deltas)
        self._finite = set[tuple[str, int, int]]()
        self._own = threading.local()
        self._transposed = transposed_weights(family.base.specs)

    def site(self, chunk: Chunk) -> Site:
        """Where a chunk is."""
        spec = chunk.spec
        shape = chunk.shape if chunk.is_matrix else spec.shape
        return Site(spec.name, shape, chunk.first_entry, spec.name in self._transposed)

    def read(
        self, chunk: Chunk, *, reuse: bool = False
    ) -> tuple[Float[Tensor, "expert ..."], Float[Tensor, "..."]]:
        """The stacked deltas of a chunk, and the reference's values; fp32.

        With `reuse` the stack is overwritten by this thread's next one: fresh memory costs as much
        as filling it.
        """
        stack = self._stack(chunk, reuse)
        rows = self._rows_present(chunk)
        if rows is not None:
            return self._read_settled(chunk, stack, *rows)
        if not self._family.has_base:
            for place, deltas in zip(stack, self._deltas, strict=True):
                place.copy_(self._expert(deltas, chunk))
            reference = stack.mean(dim=0)
            return stack.sub_(reference), reference
        reference = _rows(self._reference, chunk.spec.name, chunk).float()
        for place, deltas in zip(stack, self._deltas, strict=True):
            factors = deltas.factors(chunk.spec.name)
            if factors is not None:
                torch.mm(factors[0][chunk.start : chunk.stop], factors[1], out=place)
            elif deltas.unchanged(chunk.spec.name):
                place.zero_()
            else:
                place.copy_(self._expert(deltas, chunk)).sub_(reference)
        return stack, reference

    def models(
        self,
        method: MergeMethod,
        stack: Float[Tensor, "expert ..."],
        reference: Float[Tensor, "..."],
    ) -> Float[Tensor, "model ..."]:
        """The models that a method needs, of deltas (which are overwritten) and reference; fp32."""
        stack += reference
        if method.needs == "models" and self._family.has_base:
            return torch.cat([reference[None], stack])
        return stack

    def combined(
        self, chunk: Chunk, coefficients: Sequence[float], *, compare: bool = False
    ) -> tuple[Float[Tensor, "..."], bool] | None:
        """(1 - Σ c_n) θ₀ + Σ c_n θ_n of a chunk, fp32; the base is not read if that is 0.

        None where the experts' values are not simply stored in 16 bits, as of adapters, and for
        vocabularies that differ. Beside it, where they are to be compared, whether the models read
        are not all the same.
        """
        name, rest = chunk.spec.name, 1.0 - math.fsum(coefficients)
        needs_base = abs(rest) > 1e-12
        if needs_base and not self._family.has_base:
            return None
        if self._rows_present(chunk) is not None or not all(d.stored(name) for d in self._deltas):
            return None
        values = self._stack(chunk, reuse=True)[0]
        total = torch.zeros(chunk.shape)
        first, apart = None, False
        if needs_base:
            first = _rows(self._reference, name, chunk)
            total.add_(values.copy_(first), alpha=rest)
        for coefficient, deltas in zip(coefficients, self._deltas, strict=True):
            own = self._expert(deltas, chunk)
            total.add_(values.copy_(own), alpha=coefficient)
            if compare and not apart:
                first = own if first is None else first
                apart = own.dtype != first.dtype or differs(own, first, first.dtype)
        return total, apart

    def head(self, chunk: Chunk, entries: int) -> Chunk:
        """The first rows of a chunk: at least one, and so many entries at least if it has them."""
        if not chunk.spec.shape:
            return chunk
        rows = -(-entries * (chunk.stop - chunk.start) // max(chunk.numel, 1))
        return replace(chunk, stop=min(chunk.start + max(rows, 1), chunk.stop))

    def left_alone(self, chunk: Chunk) -> Effect:
        """What is not merged of a chunk: whether an expert has it otherwise, and is not skipped."""
        reference: Tensor | None = None
        for deltas in self._deltas:
            found, name = deltas.alignment, chunk.spec.name
            if name not in found.files or name in found.skipped or deltas.unchanged(name):
                continue
            if found.spec(name).shape != chunk.spec.shape:
                continue
            own = self._expert(deltas, chunk)
            reference = _rows(self._reference, name, chunk) if reference is None else reference
            if differs(own, reference, own.dtype):
                return "b" if name in found.buffers else "-"
        return "."

    def changed(self, chunk: Chunk, reference: Float[Tensor, "..."]) -> bool:
        """Whether an expert has other values than the reference's, rounded to its own dtype."""
        for deltas in self._deltas:
            if not deltas.unchanged(chunk.spec.name):
                own = self._expert(deltas, chunk)
                if differs(own, reference, own.dtype):
                    return True
        return False

    def given(self, method: MergeMethod, chunk: Chunk, undivided: bool) -> Given:
        """What a method is given of a chunk, and what makes a task vector of its answer.

        For most that is the stack as it is. Matrices of adapters enter as small as the method's
        symmetry allows (`MergeMethod.in_bases`). Stacks of rows are reused, as `read` says.
        """
        factors = self.factors(chunk.spec.name) if undivided else None
        if factors is None:
            stack, _ = self.read(chunk, reuse=not undivided)
            return Given(stack, self.site(chunk), lambda merged: merged)
        return method.in_bases(factors, self.site(chunk))

    def untouched(self, name: str) -> bool:
        """Whether every expert is an adapter that leaves this tensor alone, known from headers."""
        return all(deltas.unchanged(name) for deltas in self._deltas)

    def factors(self, name: str) -> list[Factors] | None:
        """The task vectors of a matrix as exact factors, if every expert is an adapter there.

        An adapter that leaves the matrix alone has factors of rank 0.
        """
        spec = self._reference.specs[name]
        if len(spec.shape) != 2:
            return None
        found: list[Factors] = []
        for deltas in self._deltas:
            factors = deltas.factors(name)
            if factors is None and deltas.unchanged(name):
                factors = torch.zeros(spec.shape[0], 0), torch.zeros(0, spec.shape[1])
            if factors is None:
                return None
            found.append(factors)
        return found if any(left.shape[1] for left, _ in found) else None

    def reference(self, chunk: Chunk) -> Tensor:
        """The reference's own values, of its own dtype; experts' means for rows it lacks."""
        rows = self._rows_present(chunk)
        if rows is not None and not rows[1].all():
            return self.read(chunk)[1]
        return _rows(self._reference, chunk.spec.name, chunk)

    def faults(
        self,
        stack: Float[Tensor, "..."],
        chunk: Chunk,
        reference: Float[Tensor, "..."] | None = None,
    ) -> list[str]:
        """What is not finite in a chunk, told of base and experts; usually nothing.

        Args:
            stack: Its deltas, or what is made of them; what was finite once is not asked again.
            chunk: Which.
            reference: The reference's values, if these are asked too: no delta of an adapter
                tells of them.
        """
        key = chunk.spec.name, chunk.start, chunk.stop
        # One reduction tells: a sum is finite only if every term is.
        finite = key in self._finite or math.isfinite(float(stack.sum()))
        if finite:
            self._finite.add(key)
        if finite and (reference is None or math.isfinite(float(reference.sum()))):
            return []
        name, found = chunk.spec.name, list[str]()
        if self._family.has_base:
            found += not_finite("The base", name, self._reference.read(name))
        for deltas in self._deltas:
            raw = deltas.alignment.files[name]
            tensor = deltas.alignment.checkpoint.read(raw)
            found += not_finite(f"Expert '{deltas.alignment.name}'", raw, tensor)
        if found or is_finite(stack):
            return found
        return [beyond_fp32(name)]

    def _stack(self, chunk: Chunk, reuse: bool) -> Float[Tensor, "expert ..."]:
        shape = (self.experts, *chunk.shape)
        if not reuse:
            return torch.empty(shape)
        held = getattr(self._own, "stack", None)
        if held is None or held.numel() < math.prod(shape):
            self._own.stack = held = torch.empty(math.prod(shape))
        return held[: math.prod(shape)].view(shape)

    def _rows_present(
        self, chunk: Chunk
    ) -> tuple[Bool[Tensor, "expert row"], Bool[Tensor, " row"]] | None:
        """Which rows of a vocabulary the experts and the base have; None if all have all."""
        vocabulary = self._family.vocabulary
        if vocabulary is None or not has_vocabulary_axis(chunk.spec, vocabulary.size):
            return None
        span = chunk.start, chunk.stop
        present = torch.stack([rows.present(*span) for rows in vocabulary.experts.values()])
        base = vocabulary.base
        in_base = torch.zeros(present.shape[1:], dtype=torch.bool)
        if base is not None:
            in_base = base.present(*span)
        return None if present.all() and (base is None or in_base.all()) else (present, in_base)

    def _read_settled(
        self,
        chunk: Chunk,
        stack: Float[Tensor, "expert row *rest"],
        present: Bool[Tensor, "expert row"],
        in_base: Bool[Tensor, " row"],
    ) -> tuple[Float[Tensor, "expert row *rest"], Float[Tensor, "row *rest"]]:
        """As `read`, for rows of a vocabulary that some models lack."""
        for place, deltas in zip(stack, self._deltas, strict=True):
            place.copy_(self._expert(deltas, chunk))
        reference = torch.zeros(chunk.shape)
        if self._family.has_base:
            reference.copy_(_rows(self._reference, chunk.spec.name, chunk))
        settle(stack, reference, present, in_base)
        return stack, reference

    def _expert(self, deltas: Deltas, chunk: Chunk) -> Tensor:
        alignment = deltas.alignment
        return _rows(alignment.checkpoint, alignment.files[chunk.spec.name], chunk)


def _rows(checkpoint: Checkpoint, name: str, chunk: Chunk) -> Tensor:
    if chunk.is_whole:
        return checkpoint.read(name)
    rows = checkpoint.read_rows(name, chunk.start, chunk.stop)
    return rows[0] if chunk.is_matrix else rows
