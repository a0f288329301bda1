"""Deltas against the reference: of one expert a tensor at a time, or stacked over all experts."""

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from personae._memory import uninitialised
from personae.checkpoints import Checkpoint
from personae.checkpoints.adapter import adapter_of
from personae.checkpoints.vocabulary import has_vocabulary_axis
from personae.checkpoints.vocabulary_rows import settle
from personae.family.alignment import Alignment
from personae.family.chunks import Chunk, rows_of
from personae.family.effects import Effect, differs
from personae.family.finite import beyond_fp32, is_finite, not_finite
from personae.family.opened import Family
from personae.methods import (
    BLOCK,
    DeltaBlocks,
    Entrywise,
    Factors,
    Given,
    MergeMethod,
    NotFinite,
    Site,
    stored_bytes,
)
from personae.ops.layout import transposed_weights


@dataclass(frozen=True)
class Deltas:
    """The deltas of one expert, read one tensor at a time.

    Attributes:
        alignment: The expert, matched with the reference.
        reference: What is subtracted.
        from_base: Whether the reference is the base the expert's adapter was opened on, so that
            its factors are the delta.
    """

    alignment: Alignment
    reference: Checkpoint
    from_base: bool

    def read(self, name: str) -> Float[Tensor, "..."]:
        """The delta of one shared tensor, fp32; rows the reference lacks are left out."""
        factors = self.factors(name)
        if factors is not None:
            return factors[0] @ factors[1]
        spec, checkpoint = self.reference.specs[name], self.alignment.checkpoint
        raw = self.alignment.files[name]
        if not spec.shape:
            return checkpoint.read(raw).float() - self.reference.read(name).float()
        delta = uninitialised(spec.shape)
        for rows in rows_of(spec):  # neither model is held whole beside it
            part = delta[rows.start : rows.stop]
            part.copy_(checkpoint.read_rows(raw, rows.start, rows.stop))
            part.sub_(self.reference.read_rows(name, rows.start, rows.stop).float())
        return delta

    def factors(
        self, name: str
    ) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]] | None:
        """The delta as exact factors, if it is that of an adapter and the tensor a matrix."""
        if not self.from_base:
            return None
        return self.alignment.checkpoint.factors(self.alignment.files[name])

    @cached_property
    def is_stored(self) -> bool:
        """Whether the expert's values lie in its file as they are: it is no adapter."""
        return adapter_of(self.alignment.checkpoint) is None

    def read_dtype(self, name: str) -> torch.dtype:
        """What the expert's values are read in: the dtype stored, or an adapter's sums in fp32."""
        if self.factors(name) is not None:
            return torch.float32
        return self.alignment.spec(name).dtype

    def unchanged(self, name: str) -> bool:
        """Whether the delta is known to be zero without reading it."""
        return self.from_base and self.alignment.checkpoint.same_as_base(self.alignment.files[name])


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
        reference = read_chunk(self._reference, chunk.spec.name, chunk).float()
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
    ) -> list[Float[Tensor, "..."]]:
        """The models that a method needs, of deltas (which are overwritten) and reference; fp32."""
        models = list(stack.add_(reference))
        return [reference, *models] if self._needs_base(method) else models

    def blocks(self, chunk: Chunk, method: Entrywise) -> DeltaBlocks:
        """What a method is given of a chunk, and the reference's values, a block at a time.

        Straight from the models' own values, where these are stored and all have them: their
        deltas, or the models themselves where it needs these. Iterating raises `NotFinite` where
        one is not finite.

        Raises:
            NotFinite: if one is that of an adapter or has no base.
        """
        blocks = self._models(chunk, method) if self.needs_models(method) else self._blocks(chunk)
        return blocks.in_rows(method.row_entries(self.site(chunk)))

    def _blocks(self, chunk: Chunk) -> DeltaBlocks:
        if not self.are_stored(chunk):
            stack, reference = self._read_finite(chunk)
            return DeltaBlocks(stack, reference, are_deltas=True)
        models = (self._expert(deltas, chunk) for deltas in self._deltas)
        return DeltaBlocks(models, read_chunk(self._reference, chunk.spec.name, chunk))

    def _models(self, chunk: Chunk, method: MergeMethod) -> DeltaBlocks:
        if not self._models_are_stored(chunk):
            return DeltaBlocks(self.models(method, *self._read_finite(chunk)))
        models = [self._expert(deltas, chunk) for deltas in self._deltas]
        if self._needs_base(method):
            models.insert(0, read_chunk(self._reference, chunk.spec.name, chunk))
        return DeltaBlocks(models)

    def _read_finite(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        stack, reference = self.read(chunk, reuse=True)
        if not (is_finite(stack) and is_finite(reference)):
            raise NotFinite
        return stack, reference

    def needs_models(self, method: MergeMethod) -> bool:
        """Whether a method is given models; with a base, some of these take task vectors."""
        return method.of_models() and not (method.needs == "either" and self._family.has_base)

    def _needs_base(self, method: MergeMethod) -> bool:
        """Whether it is given the base's values beside the experts'."""
        return method.needs == "models" and self._family.has_base

    def blocks_bytes(self, chunk: Chunk, method: Entrywise) -> int:
        """Memory of `blocks`, and of one of them while it is merged or counted."""
        are_models = self.needs_models(method)
        given = self.experts + (are_models and self._needs_base(method))
        block = method.block_bytes(
            self.site(chunk), chunk.numel, given, has_reference=not are_models
        )
        return self._held_bytes(chunk, of_base=given > self.experts or not are_models) + block

    def summands_bytes(self, chunk: Chunk, coefficients: Sequence[float]) -> int:
        """Memory of `summands`, and of a block of their sum, with a hole that another one left."""
        block = 8 * min(chunk.numel, BLOCK)
        return self._held_bytes(chunk, of_base=bool(_of_base(coefficients))) + block

    def _held_bytes(self, chunk: Chunk, *, of_base: bool) -> int:
        """Memory of models' values, as `blocks` and `summands` hold them."""
        name = chunk.spec.name
        base, dtypes = self._reference.specs[name].dtype, [d.read_dtype(name) for d in self._deltas]
        if of_base:
            dtypes.append(base)
        converted = [dtype.itemsize for dtype in dtypes if stored_bytes(dtype) != dtype.itemsize]
        if self._models_are_stored(chunk) and (self._family.has_base or not of_base):
            own = sum(map(stored_bytes, dtypes)) + max(converted, default=0)
        else:
            own = 4 * self.experts + 8 + max(dtype.itemsize for dtype in dtypes)
        return own * chunk.numel

    def summands(
        self, chunk: Chunk, coefficients: Sequence[float]
    ) -> list[tuple[Shaped[Tensor, "..."], float]] | None:
        """Models of which (1 - Σ c_n) θ₀ + Σ c_n θ_n consists, as stored, each with its factor.

        The base is not read if its is 0. None where the experts' values are not simply stored in
        16 bits, as of adapters, and for vocabularies that differ.
        """
        if not self.is_sum(chunk, coefficients):
            return None
        own = (self._expert(deltas, chunk) for deltas in self._deltas)
        found = list(zip(own, coefficients, strict=True))
        rest = _of_base(coefficients)
        return (
            [(read_chunk(self._reference, chunk.spec.name, chunk), rest), *found] if rest else found
        )

    def is_sum(self, chunk: Chunk, coefficients: Sequence[float]) -> bool:
        """Whether there are `summands`, known from headers."""
        name = chunk.spec.name
        narrow = all(d.is_stored and d.read_dtype(name).itemsize <= 2 for d in self._deltas)
        given = self._family.has_base or not _of_base(coefficients)
        return narrow and given and self._rows_present(chunk) is None

    def are_stored(self, chunk: Chunk) -> bool:
        """Whether all deltas are those of values stored in full, known from headers."""
        return self._family.has_base and self._models_are_stored(chunk)

    def _models_are_stored(self, chunk: Chunk) -> bool:
        stored = all(deltas.is_stored for deltas in self._deltas)
        return stored and self._rows_present(chunk) is None

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
            reference = read_chunk(self._reference, name, chunk) if reference is None else reference
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

        Raises:
            NotFinite: if factors are not, of which no basis can be found.
        """
        factors = self.factors(chunk.spec.name) if undivided else None
        if factors is None:
            stack, reference = self.read(chunk, reuse=not undivided)
            return Given(stack, self.site(chunk), lambda merged: merged, reference)
        if not all(is_finite(factor) for pair in factors for factor in pair):
            raise NotFinite
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
        return read_chunk(self._reference, chunk.spec.name, chunk)

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
        found = self._named(chunk)
        return found if is_finite(stack) else found or [beyond_fp32(chunk.spec.name)]

    def why_not_finite(self, chunk: Chunk) -> list[str]:
        """The same of a chunk of which it is known that something is not finite."""
        return self._named(chunk) or [beyond_fp32(chunk.spec.name)]

    def _named(self, chunk: Chunk) -> list[str]:
        name = chunk.spec.name
        models = [("The base", self._reference, name)] if self._family.has_base else []
        for deltas in self._deltas:
            expert = deltas.alignment
            models.append((f"Expert '{expert.name}'", expert.checkpoint, expert.files[name]))
        found: list[str] = []
        for label, model, raw in models:
            try:
                found += not_finite(label, raw, model.read(raw))
            except NotFinite as error:
                found += error.faults
        return found

    def _stack(self, chunk: Chunk, reuse: bool) -> Float[Tensor, "expert ..."]:
        shape = (self.experts, *chunk.shape)
        if not reuse:
            return uninitialised(shape)
        held = getattr(self._own, "stack", None)
        if held is None or held.numel() < math.prod(shape):
            self._own.stack = held = uninitialised([math.prod(shape)])
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
            reference.copy_(read_chunk(self._reference, chunk.spec.name, chunk))
        settle(stack, reference, present, in_base)
        return stack, reference

    def _expert(self, deltas: Deltas, chunk: Chunk) -> Tensor:
        alignment = deltas.alignment
        return read_chunk(alignment.checkpoint, alignment.files[chunk.spec.name], chunk)


def read_chunk(checkpoint: Checkpoint, name: str, chunk: Chunk) -> Tensor:
    """Rows of a model's own tensor, which is known to have them."""
    if chunk.is_whole:
        return checkpoint.read(name)
    rows = checkpoint.read_rows(name, chunk.start, chunk.stop)
    return rows[0] if chunk.is_matrix else rows


def _of_base(coefficients: Sequence[float]) -> float:
    """1 - Σ c_n, 0 if that is rounding."""
    rest = 1.0 - math.fsum(coefficients)
    return rest if abs(rest) > 1e-12 else 0.0
