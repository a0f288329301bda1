"""A model that is merged as it is read: what one recipe of a file gives, for those that take it.

Nothing of it is written. Its headers and small files are those of a hollow model; whoever asks for
rows has them merged there and then, and rounded as the model's file would hold them. To the bit
they are what its own merge would have written: rows are cut as for that, unless they are known to
come out the same in any cut. What a method's passes find is found before; what its passes over one
tensor alone find, when the tensor is first read, and kept.
"""

import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from personae._memory import uninitialised
from personae._types import TensorSpec
from personae.checkpoints import Checkpoint
from personae.checkpoints.specs import check_rows, no_such_tensor
from personae.commands.merge_job import MergeJob
from personae.commands.merge_parts import OpenedParts
from personae.commands.merge_rows import merge_rows
from personae.errors import MethodError
from personae.family.chunks import Chunk
from personae.family.effects import Effect, without_effect
from personae.methods import Entrywise, NotFinite, Statistics
from personae.recipe import MergeRecipe, MergeSettings
from personae.run.passes import passes_over_family, passes_over_tensor
from personae.run.work import Work
from personae.writers import cast

MOST_READS = 2
"""How often a model whose method takes no passes is merged anew, at most, rather than written."""
_MOST_WITHIN = 16
"""Models that are merged as they are read, one in the other: Python's stack holds some fifty."""


def computed_as_read(recipes: Sequence[MergeRecipe]) -> frozenset[str]:
    """The models in between that are merged as they are read; the others are written.

    Those whose methods merge rows apart, and that are read once: by one model of one recipe, whose
    method takes no passes. Where their own takes none either, merging them anew costs less than
    to write and read them, and they may be read a few times (`MOST_READS`). Recipes that choose a
    vocabulary pick single rows, and those that write adapters whole matrices: for them models are
    written. Of a long chain, each merged from the one before, every seventeenth is written.

    Args:
        recipes: In the order in which they can be merged.
    """
    computed: dict[str, int] = {}
    within: dict[str | None, int] = {}
    for n, recipe in reversed([*enumerate(recipes)]):
        if recipe.name is None or not all(_by_rows(part.settings) for part in recipe.parts):
            continue
        reads = deep = 0
        for reader in recipes[n + 1 :]:
            again = 1 if reader.name is None else computed.get(reader.name, 1)
            for part in reader.parts:
                times = _reads(part.settings, at_once=reader.name in computed) * again
                named = _named_in(recipe.name, (part.base, *part.experts.values()))
                reads += times * named
                deep = max(deep, within.get(reader.name, 0) if named else 0)
        passes = any(part.settings.merge_method().has_passes() for part in recipe.parts)
        often = 0 < reads <= (1 if passes else MOST_READS)
        if often and deep < _MOST_WITHIN and not _picks(recipe.name, recipes):
            computed[recipe.name] = reads
            within[recipe.name] = deep + 1
    return frozenset(computed)


def _by_rows(settings: MergeSettings) -> bool:
    return issubclass(settings.merge_method(), Entrywise) and settings.output == "model"


def _reads(settings: MergeSettings, *, at_once: bool) -> int:
    """How often a recipe reads its models: to merge them, and for each pass."""
    method = settings.merge_method()
    return 1 + method.usual_passes + (method.can_decide_late and at_once)


def _named_in(name: str, models: Collection[object]) -> int:
    return sum(isinstance(m, str) and m.partition("+")[0] == name for m in models)


def _picks(name: str, recipes: Sequence[MergeRecipe]) -> bool:
    """Whether a recipe that takes a model reads otherwise than row after row."""
    return any(
        part.settings.tokenizer_source is not None or part.settings.output == "adapter"
        for recipe in recipes
        for part in recipe.parts
        if _named_in(name, (part.base, *part.experts.values()))
    )


class ComputedModel:
    """A `Checkpoint` whose tensors are merged when they are read, by any number of threads.

    Attributes:
        name: What recipes call it.
    """

    def __init__(self, name: str, hollow: Checkpoint, opened: OpenedParts, work: Work) -> None:
        """Take the passes over whole models; merge nothing yet.

        Args:
            name: What recipes call it.
            hollow: Its headers and small files.
            opened: What it is merged from, to decide at once; it stays the caller's.
            work: Workers, memory bound, progress.

        Raises:
            CheckpointError: naming every weight that is not finite, as far as passes find it.
        """
        self.name = name
        self.source, self.revision = hollow.source, hollow.revision
        self.specs: Mapping[str, TensorSpec] = hollow.specs
        self.tied: Mapping[str, str] = hollow.tied
        self.copies = hollow.copies
        self.auxiliary_files: Mapping[str, Path] = hollow.auxiliary_files
        self._jobs = opened.jobs
        self._job_of = {spec.name: job for job in opened.jobs for spec in job.specs}
        bases = [job.family.base for job in opened.jobs]
        self._copy_of = {copy: base.tied[copy] for base in bases for copy in base.copies}
        self._of_models = {job.first: _over_model(job, work) for job in opened.jobs}
        self._of_tensors: dict[str, Statistics] = {}
        self._at_tensor = {name: threading.Lock() for name in self._job_of}
        self._cut = {chunk for job in opened.jobs for item in job.items for chunk in item.chunks}
        self._effects: dict[Chunk, Effect] = {}
        self._shown = set[str]()

    def read(self, name: str) -> Tensor:
        """Return one tensor; see `Checkpoint.read`.

        Raises:
            NotFinite: A model that it is merged from holds values that are not.
            MethodError: A value does not fit in the tensor's dtype.
        """
        spec = self._spec(name)
        if spec.shape:
            return self.read_rows(name, 0, spec.shape[0])
        name = self._copy_of.get(name, name)
        return self._merged(self._job_of[name].pieces[name][0][0])

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows `start:stop`; see `Checkpoint.read_rows`.

        Raises:
            NotFinite: A model that it is merged from holds values that are not.
            MethodError: A value does not fit in the tensor's dtype.
        """
        spec, name = self._spec(name), self._copy_of.get(name, name)
        check_rows(self.source, spec, start, stop)
        found: Tensor | None = None
        for chunk in self._job_of[name].pieces[name][0]:
            first, last = max(start, chunk.start), min(stop, chunk.stop)
            if first >= last:
                continue
            rows = self._rows(chunk, first, last).to(spec.dtype)  # of a copy, it may be its own
            if (first, last) == (start, stop):
                return rows
            if found is None:
                found = uninitialised((stop - start, *spec.shape[1:]), spec.dtype)
            found[first - start : last - start] = rows
        return torch.empty((0, *spec.shape[1:]), dtype=spec.dtype) if found is None else found

    def factors(self, name: str) -> None:
        """Return None: what it is merged to has no factors."""

    def same_as_base(self, name: str) -> bool:
        """Return False: only values could tell."""
        return False

    def close(self) -> None:
        """Do nothing: what it is merged from is its opener's."""

    def lost(self) -> dict[str, str]:
        """The tensors that came out as the base's, of those read in full; as `merge.run` tells."""
        lost: dict[str, str] = {}
        for job in self._jobs:
            told = [
                (name, self._effects[chunk])
                for name, (chunks, _) in job.pieces.items()
                if self._effects.keys() >= {*chunks}
                for chunk in chunks
            ]
            lost |= without_effect(told, job.method.name)
        return lost

    def _spec(self, name: str) -> TensorSpec:
        return self.specs.get(name) or no_such_tensor(self.source, name, self.specs)

    def _rows(self, chunk: Chunk, start: int, stop: int) -> Tensor:
        """Rows of a chunk, of which others are only merged where that is not the same."""
        if self._comes_apart(chunk):
            return self._merged(replace(chunk, start=start, stop=stop))
        return self._merged(chunk)[start - chunk.start : stop - chunk.start]

    def _comes_apart(self, chunk: Chunk) -> bool:
        """Whether rows of it come out the same, to the bit, if they are merged alone.

        They do where loops over stored values make them; means of models and products of factors
        are summed in an order that may depend on how many rows there are.
        """
        job, name = self._job_of[chunk.spec.name], chunk.spec.name
        if name not in job.merged:
            return False
        method, stacks = job.method_of(name), job.stacks
        if method.of_models() or (method.whole_rows and len(chunk.spec.shape) == 1):
            return False
        coefficients = method.coefficients(stacks.experts) if job.is_narrow(name) else None
        is_sum = coefficients is not None and stacks.is_sum(chunk, coefficients)
        return is_sum or stacks.are_stored(chunk)

    def _merged(self, chunk: Chunk) -> Tensor:
        """A chunk as the model's file would hold it.

        Raises:
            NotFinite: A model that it is merged from holds values that are not.
            MethodError: A value does not fit in the tensor's dtype.
        """
        job = self._job_of[chunk.spec.name]
        try:
            return self._merge(job, chunk)
        except NotFinite as error:
            faults = error.faults or job.stacks.why_not_finite(chunk)
            raise NotFinite([f"{self.name}: {fault}" for fault in faults]) from error
        except MethodError as error:
            raise MethodError(f"{self.name}: {error}") from error

    def _merge(self, job: MergeJob, chunk: Chunk) -> Tensor:
        name, untold = chunk.spec.name, chunk in self._cut and chunk not in self._effects
        spec = self.specs[name]
        if name not in job.merged:
            if untold:
                self._effects[chunk] = job.stacks.left_alone(chunk)
            return cast(job.stacks.reference(chunk), spec, computed=False)
        asked = untold and job.family.has_base and name not in self._shown
        rows = merge_rows(job, self._statistics(job, name), chunk, None, asked)
        if untold:
            self._effects[chunk] = rows.effect
            if rows.effect == "+":
                self._shown.add(name)
        if rows.finite and rows.value.dtype == spec.dtype:
            return rows.value
        return cast(rows.value, spec, computed=True)

    def _statistics(self, job: MergeJob, name: str) -> Statistics | None:
        """What passes find that a tensor's merge needs; those over the tensor are taken once."""
        if not job.per_tensor:
            return self._of_models[job.first]
        with self._at_tensor[name]:
            if name not in self._of_tensors:
                chunks, _ = job.pieces[name]
                method = job.method_of(name)
                found = passes_over_tensor(method, job.stacks, chunks, late=False)
                self._of_tensors[name] = found
            return self._of_tensors[name]


def _over_model(job: MergeJob, work: Work) -> Statistics | None:
    """What passes over the whole model find; all is decided, as nothing can be afterwards.

    Raises:
        CheckpointError: naming every weight that is not finite.
    """
    if not job.method.has_passes() or job.per_tensor:
        return None
    items = job.merged_items
    return passes_over_family(job.method_of, job.stacks, items, job.cost, work, late=False)
