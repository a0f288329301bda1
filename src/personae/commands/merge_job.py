"""A merge ready to run, from headers alone: which tensors, cut how, merged by what; its faults."""

import heapq
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch

from personae._types import TensorSpec
from personae.checkpoints import Checkpoint
from personae.checkpoints.adapter import adapter_of
from personae.checkpoints.adapter_base import base_of_adapters
from personae.checkpoints.naming import left_out, matches, patterns, shown
from personae.errors import CheckpointError, Faults, RecipeError
from personae.family.align import reference_name, trained_apart
from personae.family.alignment import Alignment
from personae.family.chunks import Chunk, Item, items, whole_or_matrices
from personae.family.configurations import check_heads
from personae.family.deltas import Stacks
from personae.family.joint_adapter import check_joint, without_weights
from personae.family.mean import MeanOf
from personae.family.opened import Family, open_family
from personae.family.vocabularies import MergedVocabulary, merge_vocabularies
from personae.methods import Entrywise, MergeMethod, stored_bytes
from personae.recipe import MergeSettings, count_layers
from personae.run.passes import MethodOf, parts_counted
from personae.run.undecided import disk_bytes, waiting_bytes


@dataclass(frozen=True)
class MergeJob:
    """A merge, ready to run.

    Attributes:
        family: Base and experts.
        method: What is done: the class.
        method_of: The method with its parameters, by tensor.
        merged: Names of the tensors merged; all others are the reference's own.
        specs: Every tensor of the result, sorted by name, in its own dtype.
        copies: The base's copies of tensors, each with the dtype it is written in.
        stacks: The task vectors.
        items: The work, in order.
        per_tensor: Whether the method's passes are over each tensor alone.
        first: The number of its first item; after the last one comes that of its last step.
        at_once: Whether rows come out as they stay: nothing is decided after they are merged.
        beside: Bytes that computing what models in between give takes beside an item.
    """

    family: Family
    method: type[MergeMethod]
    method_of: MethodOf
    merged: frozenset[str]
    specs: Sequence[TensorSpec]
    copies: Mapping[str, torch.dtype]
    stacks: Stacks
    items: Sequence[Item]
    per_tensor: bool
    first: int = 0
    at_once: bool = False
    beside: int = 0

    @property
    def last_step(self) -> int:
        """The number of the step after its items."""
        return self.first + len(self.items)

    @cached_property
    def decides_late(self) -> bool:
        """Whether tensors are merged before it is known what becomes of undecided entries.

        Only where these are few: two difference vectors cancel everywhere.
        """
        if self.at_once:
            return False
        few = self.family.has_base and self.stacks.experts > 1
        return few and all(self.method_of(name).is_late() for name in self.merged)

    @property
    def decides_at_the_end(self) -> bool:
        """Whether that is known only once all of the model is merged, not at a tensor's end."""
        return self.decides_late and not self.per_tensor

    @property
    def merged_items(self) -> list[Item]:
        """The items of merged tensors, for passes over the whole model."""
        return self.items_of(self.merged)

    def items_of(self, names: Collection[str]) -> list[Item]:
        """The items of these tensors, without what they hold of others."""
        kept = [
            replace(item, chunks=tuple(p for p in item.chunks if p.spec.name in names))
            for item in self.items
        ]
        return [item for item in kept if item.chunks]

    def is_narrow(self, name: str) -> bool:
        """Whether a tensor comes out in 16 bits, so that no rounding of fp32 is seen in it."""
        return self.dtype_of(name).itemsize <= 2

    def dtype_of(self, name: str) -> torch.dtype:
        """What a tensor comes out in."""
        return self._dtypes[name]

    @property
    def in_blocks(self) -> bool:
        """Whether rows are merged a block of entries at a time, straight from what is stored."""
        return issubclass(self.method, Entrywise)

    @cached_property
    def pieces(self) -> Mapping[str, tuple[Sequence[Chunk], bool]]:
        """How each tensor is cut, and whether each piece is given whole to the method."""
        found: dict[str, tuple[list[Chunk], bool]] = {}
        for item in self.items:
            for chunk in item.chunks:
                found.setdefault(chunk.spec.name, ([], item.whole))[0].append(chunk)
        return found

    @cached_property
    def _dtypes(self) -> Mapping[str, torch.dtype]:
        return {spec.name: spec.dtype for spec in self.specs}

    def cost(self, item: Item) -> int:
        """Peak bytes of one item."""
        most = self.kept_bytes + max(self.chunk_cost(chunk, item.whole) for chunk in item.chunks)
        return most + waiting_bytes(item) if self.decides_late else most

    @property
    def kept_bytes(self) -> int:
        """Bytes that a worker holds beside what it merges: of models in between, and of experts."""
        return self.beside + sum(one.kept_bytes for one in self.family.experts.values())

    def undecided_bytes(self, workers: int) -> int:
        """Bytes of files that entries without a winner take while they wait, at most.

        They wait until all of the model is merged, or all of a tensor.
        """
        if not self.decides_late:
            return 0
        tensors: dict[str, int] = {}
        for item in self.merged_items:
            for chunk in item.chunks:
                tensors[chunk.spec.name] = tensors.get(chunk.spec.name, 0) + disk_bytes([chunk])
        at_once = workers if self.per_tensor else len(tensors)
        return sum(heapq.nlargest(at_once, tensors.values()))

    def chunk_cost(self, chunk: Chunk, undivided: bool) -> int:
        """Peak bytes of one chunk."""
        if chunk.spec.name not in self.merged:
            return 8 * chunk.numel
        experts = self.stacks.experts
        if not undivided and self.in_blocks:
            dtype = self.dtype_of(chunk.spec.name)
            cast = 0 if stored_bytes(dtype) == dtype.itemsize else dtype.itemsize
            return self._reading_bytes(chunk) + (stored_bytes(dtype) + cast) * chunk.numel
        if not undivided:
            return self.method.row_bytes(chunk.numel, experts)
        method = self.method_of(chunk.spec.name)
        return method.whole_bytes(self.stacks.site(chunk), experts)

    def _reading_bytes(self, chunk: Chunk) -> int:
        """Peak bytes of the models' values, and of a block of entries that is merged."""
        name = chunk.spec.name
        method = self.method_of(name)
        assert isinstance(method, Entrywise)
        coefficients = method.coefficients(self.stacks.experts) if self.is_narrow(name) else None
        if coefficients is None or not self.stacks.is_sum(chunk, coefficients):
            return self.stacks.blocks_bytes(chunk, method)
        return self.stacks.summands_bytes(chunk, coefficients)

    def counting_bytes(self, item: Item) -> int:
        """Peak bytes of an item in passes that count much: of a part of it, and of it so far.

        Headers tell no more than the most there can be, so that it is in no bound.
        """
        reading: list[int] = []
        for chunk in item.chunks if self.term_bytes else ():
            method = self.method_of(chunk.spec.name)
            if chunk.spec.name in self.merged and isinstance(method, Entrywise):
                reading.append(self.stacks.blocks_bytes(parts_counted(chunk)[0], method))
        return self.kept_bytes + max(reading) + 2 * self.term_bytes if reading else 0

    @cached_property
    def term_bytes(self) -> int:
        """Bytes of what a pass counts of one item, or of all, where that is much."""
        first = next(self.method_of("").passes(self.stacks.experts), None)
        return first.term_bytes if first is not None and self.in_blocks else 0


def settings_for(
    base: Any,
    settings: MergeSettings | None,
    method: MergeMethod | None = None,
    experts: int = 0,
) -> MergeSettings:
    """The settings, or those of a method; without a base they are about difference vectors.

    Raises:
        RecipeError: if both are given, or the method's parameters are not one an expert.
    """
    if method is not None and settings is not None:
        raise RecipeError("Both 'method' and 'settings' say how to merge. Give one of them.")
    if settings is None:
        settings = MergeSettings() if method is None else MergeSettings.of(method, experts)
    if base is not None or settings.output == "adapter":
        return settings
    return settings.model_copy(update={"vector": "difference"})


def open_to_merge(base: Any, experts: Mapping[str, Any], settings: MergeSettings) -> Family:
    """Open and align a family under the one vocabulary that comes out.

    Raises:
        MethodError: for a method or parameter that cannot be.
        PersonaeError: as `open_family` does, for vocabularies that differ, and for everything in
            the headers that keeps the experts from being merged.
    """
    settings.check(list(experts))
    if base is None and settings.output == "adapter":
        base = base_of_adapters(experts)

    def is_merged(name: str) -> bool:
        return not left_out([name], settings.skip, settings.only)

    def vocabulary(
        reference: Checkpoint | None, opened: Mapping[str, Checkpoint]
    ) -> MergedVocabulary | None:
        return merge_vocabularies(reference, opened, settings.vocabulary(), is_merged)

    def check(family: Family, faults: Faults) -> None:
        check_family(family, settings, faults)

    return open_family(
        base,
        experts,
        skip=settings.skip,
        only=settings.only,
        vocabulary=vocabulary,
        layers=settings.layers,
        check=check,
    )


def prepare(family: Family, settings: MergeSettings) -> MergeJob:
    """Work out a merge from headers.

    Args:
        family: Base and experts, opened and aligned.
        settings: What to do.

    Raises:
        CheckpointError: if there is nothing to merge.
    """
    if settings.output == "adapter":
        family = without_weights(family)
    first = settings.layers.first if settings.layers else 0
    layers = count_layers(family.base.specs) - first
    experts = len(family.experts)

    @cache
    def method_of(name: str) -> MergeMethod:
        return settings.for_tensor(name, layers=layers, experts=experts)

    dtype = getattr(torch, settings.dtype) if settings.dtype else None
    job = job_of(family, method_of, dtype)
    if not job.merged:
        raise CheckpointError(
            f"There is no tensor to merge: none of the {len(family.base.specs)} is in 'only' "
            f"({', '.join(settings.only)}) and not in 'skip'. '*' matches any text."
        )
    return job


def job_of(
    family: Family,
    method_of: MethodOf,
    dtype: torch.dtype | None = None,
) -> MergeJob:
    """A merge of a family that is known to fit; see `MergeJob`."""
    stacks = Stacks(family)
    specs = list(family.base.specs.values())
    merged = frozenset(name for name in stacks.names if family.base.specs[name].numel)
    merged |= {n for n in stacks.statistics if _is_mean(method_of(n), stacks.experts)}
    method = method_of("")
    per_tensor = method.has_passes() and method.passes_over == "tensor"

    def undivided(spec: TensorSpec) -> bool:
        site = stacks.site(whole_or_matrices(spec)[0])
        return spec.name in merged and not method_of(spec.name).entrywise(site)

    return MergeJob(
        family=family,
        method=type(method),
        method_of=method_of,
        merged=merged,
        specs=[
            replace(spec, dtype=dtype) if dtype is not None and spec.is_floating else spec
            for spec in specs
        ],
        copies={name: dtype or own for name, own in family.base.copies.items()},
        stacks=stacks,
        items=items(specs, undivided, together=per_tensor, whole_vectors=method.whole_rows),
        per_tensor=per_tensor,
    )


def _is_mean(method: MergeMethod, experts: int) -> bool:
    """Whether a result is a weighted mean of base and experts: a variance stays one."""
    found = method.coefficients(experts)
    return found is not None and min(found) >= 0.0 and math.fsum(found) <= 1.0 + 1e-6


def check_family(family: Family, settings: MergeSettings, faults: Faults) -> None:
    """Add everything in the headers that keeps the experts from being merged as settings say."""
    for name, expert in family.experts.items():
        _check_shapes(name, expert, family, faults)
        _check_dtypes(name, expert, family, settings, faults)
        _check_ties(name, expert, family, faults)
    if not family.has_base:
        _check_average(family, settings, faults)
    if settings.output == "adapter":
        check_joint(family, settings.skip, settings.only, faults)
    else:
        _check_adapters(family, settings.merge_method(), faults)
    check_heads(family.models, family.experts, faults)
    if faults.messages:  # such as shapes that a mistyped 'skip' does not leave out
        for pattern in settings.unmatched(all_names(family)):
            faults.add(f"{pattern} matches no tensor; '*' matches any text.")


def all_names(family: Family) -> set[str]:
    """Every tensor name in the family, as the reference and as the experts' files have it."""
    checkpoints = (one.checkpoint for one in family.experts.values())
    names = family.base.specs.keys() | family.base.copies.keys()
    return names.union(*(checkpoint.specs for checkpoint in checkpoints))


def _check_shapes(name: str, expert: Alignment, family: Family, faults: Faults) -> None:
    if not family.has_base:
        return
    specs = family.base.specs
    differing: dict[str, dict[str, str]] = {"shape": {}, "kind": {}}
    for own in expert.private if expert.shared else ():  # of another size in all is said already
        known, has = reference_name(own, expert, family.base), expert.private_spec(own)
        if known and has.numel and specs[known].numel:  # empty ones are told of already
            wanted = specs[known]
            alike = has.shape == wanted.shape  # then one holds numbers and the other integers
            differing["kind" if alike else "shape"][known] = (
                f"'{own}' is {has.dtype_name if alike else has.shape}, "
                f"the base's {wanted.dtype_name if alike else wanted.shape}"
            )
    for what, found in differing.items():
        if found:
            rest = f" ({len(found) - 1} more differ likewise)" if len(found) > 1 else ""
            faults.add(
                f"Expert '{name}': tensor {next(iter(found.values()))}{rest}. Tensors of different "
                f"{what}s cannot be merged: leave them as in the base with skip: "
                f"{patterns(found, specs.keys() - found.keys())}."
            )
    for grown in expert.grown:
        faults.add(
            f"Expert '{name}': '{grown}' has {expert.spec(grown).shape[0]} rows, the base "
            f"{specs[grown].shape[0]}. Choose the vocabulary of the output: tokenizer_source."
        )


def _check_ties(name: str, expert: Alignment, family: Family, faults: Faults) -> None:
    """An output layer of its own beside a tied one has no place in the result, nor the reverse."""
    base, whose = family.base, "base" if family.has_base else "first expert"
    for own, kept in trained_apart(expert, base).items():
        faults.add(
            f"Expert '{name}': '{own}' was trained separately from '{kept}', to which the {whose} "
            "ties it: merged into one tensor, one training of the two would be lost. Give a "
            f"{whose} that is untied (tie_word_embeddings: false, '{own}' stored), and experts "
            "likewise."
        )
    for lacking in expert.absent:
        own = expert.renaming.expert_name(lacking)
        if own in expert.tied and base.specs[lacking].is_floating:
            faults.add(
                f"Expert '{name}' ties '{own}' to '{expert.tied[own]}', and the {whose} has both "
                "apart: its training of the two would not be merged. Save the expert untied "
                "(tie_word_embeddings: false, both stored)."
            )


def _check_dtypes(
    name: str, expert: Alignment, family: Family, settings: MergeSettings, faults: Faults
) -> None:
    """Experts of another dtype can be merged, once it is said what shall come out."""
    if settings.dtype is not None or adapter_of(expert.checkpoint):
        return
    whose = "the base's" if family.has_base else "the first expert's"
    for shared in expert.shared:
        found, wanted = expert.spec(shared).dtype_name, family.base.specs[shared].dtype_name
        if found != wanted:
            faults.add(
                f"Expert '{name}': '{shared}' is {found}, {whose} is {wanted}. Set the dtype of "
                f"the output: dtype: {wanted}."
            )
            return


def _check_average(family: Family, settings: MergeSettings, faults: Faults) -> None:
    """Without a base, what the experts do not share in one shape has nothing to stay as."""
    assert isinstance(family.base, MeanOf)
    for name, expert in family.experts.items():
        apart = trained_apart(expert, family.base)
        odd = [n for n in expert.private if not matches(n, settings.skip) and n not in apart]
        if odd:
            faults.add(
                f"Expert '{name}': {len(odd)} tensor(s) are missing from another expert, or have "
                f"another shape there: {shown(odd)}. Leave them as in the first with skip: "
                f"{patterns(odd, set(expert.own_specs) - {*odd})}, or give a base."
            )


def _check_adapters(family: Family, method: type[MergeMethod], faults: Faults) -> None:
    if method.needs != "adapters":
        return
    for name, expert in family.experts.items():
        if adapter_of(expert.checkpoint) is None:
            faults.add(
                f"Expert '{name}' is not a LoRA adapter, and {method.name} merges only those. "
                "Give its adapter directory, or another method (knots, tsv_m)."
            )
