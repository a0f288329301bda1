"""Opens base and experts and aligns them: everything that can be known from headers."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from personae._types import TensorSpec
from personae.checkpoints import Checkpoint, open_checkpoint
from personae.checkpoints.adapter import adapter_of
from personae.checkpoints.layouts import laid_out_like
from personae.checkpoints.memory import InMemory
from personae.checkpoints.naming import check_names, left_out, matches, shown
from personae.checkpoints.quantised import quantisation_of
from personae.checkpoints.tied import as_stored, each_once
from personae.checkpoints.vocabulary import is_input_embedding
from personae.errors import CheckpointError, Faults, RecipeError
from personae.family.align import Alignment, align, align_one, lacked_by_some, lacking
from personae.family.layers import Layers, choose
from personae.family.mean import MeanOf
from personae.family.small_files import small_files
from personae.family.vocabularies import MergedVocabulary

OneVocabulary = Callable[[Checkpoint | None, Mapping[str, Checkpoint]], MergedVocabulary | None]
"""From base and experts to the vocabulary under which they are merged."""


@dataclass
class Family:
    """A base and its experts, opened and aligned.

    Attributes:
        base: The base model, or the average of the experts where there is none.
        experts: Task name to the expert aligned with the base, in the order given.
        patterns: What was to be skipped or kept whole.
        has_base: Whether `base` is a model of its own.
        vocabulary: The vocabulary under which all are seen; None if each has its own.
    """

    base: Checkpoint
    experts: dict[str, Alignment]
    patterns: tuple[str, ...] = ()
    has_base: bool = True
    vocabulary: MergedVocabulary | None = None

    @property
    def models(self) -> dict[str, Checkpoint]:
        """Every model that was opened, by its name."""
        own = {"the base": self.base} if self.has_base else {}
        return own | {name: expert.checkpoint for name, expert in self.experts.items()}

    @property
    def notes(self) -> list[str]:
        """What a person who packs should be told about the alignment."""
        notes = [note for expert in self.experts.values() for note in expert.notes]
        for name, expert in self.experts.items():
            if absent := lacking(expert, self.base):
                notes.append(
                    f"{name}: these tensors are missing, and will be missing when it is rebuilt: "
                    f"{shown(absent)}"
                )
        notes += self.base_notes
        names = (self.base.specs.keys() | self.base.copies.keys()).union(
            *(expert.checkpoint.specs for expert in self.experts.values())
        )
        for pattern in self.patterns:
            if not any(matches(name, [pattern]) for name in names):
                notes.append(f"the pattern '{pattern}' matches no tensor; '*' matches any text")
        for name, expert in self.experts.items():
            notes += [f"{name}: {note}" for note in small_files(expert, self.base)[1]]
        return notes

    @property
    def base_notes(self) -> list[str]:
        """What is odd about the base, and which experts do not seem to be fine-tuned from it."""
        notes: list[str] = []
        method = quantisation_of(self.base)
        if method:
            notes.append(
                f"config.json of the base names the quantiser {method}, but its weights are plain "
                "numbers; the result keeps that config, so loading it quantises the weights"
            )
        models = [self.base, *(expert.checkpoint for expert in self.experts.values())]
        if any(
            spec.dtype.itemsize == 8 and spec.is_floating
            for m in models
            for spec in m.specs.values()
        ):
            notes.append("weights in float64 are computed in float32: results have its precision")
        tied, copies = self.base.tied, sorted(self.base.copies)
        if copies:
            told = shown([f"{name} as {tied[name]}" for name in copies])
            notes.append(f"stored twice with equal values, and treated as one tensor: {told}")
        for name in copies:
            if matches(name, self.patterns) and not matches(tied[name], self.patterns):
                notes.append(
                    f"'{name}' is treated as '{tied[name]}' is: they are one tensor, whichever of "
                    "them a pattern matches"
                )
        for name, expert in self.experts.items():
            adapter, base = adapter_of(expert.checkpoint), self.base.source
            wanted = adapter.trained_on if adapter else None
            if isinstance(as_stored(self.base), InMemory):
                continue  # it has no name
            if wanted and Path(wanted).name.lower() != Path(base.split("@")[0]).name.lower():
                notes.append(
                    f"{name}: its adapter_config.json says it was trained on '{wanted}', the base "
                    f"is '{base}'; they must be the same model"
                )
        return notes

    def shared_specs(self, name: str) -> list[TensorSpec]:
        """Headers of the tensors to be coded for one expert."""
        return [self.base.specs[n] for n in self.experts[name].shared]

    def close(self) -> None:
        """Release every file."""
        self.base.close()
        for expert in self.experts.values():
            expert.checkpoint.close()

    def __enter__(self) -> "Family":
        """Return the family."""
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _e: BaseException | None, _t: TracebackType | None
    ) -> None:
        """Release every file."""
        self.close()


def open_family(
    base: Any,
    experts: Mapping[str, Any],
    *,
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
    private: Sequence[str] = (),
    for_pack: bool = False,
    spared: Collection[str] = (),
    vocabulary: OneVocabulary | None = None,
    layers: Layers | None = None,
    check: Callable[[Family, Faults], None] | None = None,
) -> Family:
    """Open every checkpoint (headers only) and align it with the base.

    Args:
        base: Path, hub id, module or mapping of the base model. None: the experts' average takes
            its place, over the tensors that all have in one shape.
        experts: Task name to path, hub id, module or mapping.
        skip: Patterns of tensor names to leave out.
        only: If any, patterns of the only ones not to leave out.
        private: Patterns of tensor names to keep whole.
        for_pack: Whether the experts become tasks: names are those of files then, what only some
            experts lack is skipped in these alone, and an expert may lack whole parts of the base,
            such as a language model's head.
        spared: Reference names that tasks packed before lack, or were spared.
        vocabulary: Works out the vocabulary under which all are seen; by default each has its own.
        layers: Which layers of the models are seen, and under which numbers; by default all.
        check: Adds what else the headers tell against the family.

    Raises:
        RecipeError: if there is no expert.
        CheckpointError: listing every unsafe task name, every checkpoint that cannot be read,
            every expert that does not fit the base, and what `check` finds.
    """
    if not experts:
        raise RecipeError("There is no expert. Give at least one: --expert NAME=PATH.")
    faults = Faults()
    if for_pack:
        check_names(experts, faults)
    opened: dict[str, Checkpoint] = {}
    reference = None if base is None else _open("The base", base, None, faults, each_once)
    for name, source in experts.items():
        expert = _open(f"Expert '{name}'", source, reference, faults)
        if expert is not None:
            first = next(iter(opened.values()), expert)
            opened[name] = expert if reference is not None else laid_out_like(first, expert)
    if not opened or (reference is None and base is not None):
        faults.raise_if_any(CheckpointError)
    try:
        if reference is not None and not for_pack:
            reference = _with_apart(reference, opened)
        chosen = None if vocabulary is None else vocabulary(reference, opened)
        if chosen is not None:
            reference, opened = chosen.seen(reference, opened)
        if layers is not None and len(opened) == len(experts):
            reference, opened = choose(reference, opened, layers)
        if reference is None:
            reference = _average(opened, skip, only)
    except CheckpointError as error:
        faults.take(error)
        faults.raise_if_any(CheckpointError)
        raise
    if for_pack and base is not None and skip and len(opened) > 1:
        alike = align(
            reference, opened, skip=skip, private=private, may_lack_parts=True, faults=Faults()
        )
        spared = {*spared, *lacked_by_some(reference, alike)}
    aligned = align(
        reference,
        opened,
        skip=skip,
        only=only,
        private=private,
        spared=spared,
        may_lack_parts=for_pack,
        faults=faults,
    )
    family = Family(reference, aligned, (*skip, *private), base is not None, chosen)
    if check is not None:
        check(family, faults)
    faults.raise_if_any(CheckpointError)
    return family


def open_pair(one: Any, other: Any, name: str) -> tuple[Checkpoint, Alignment]:
    """Open two models and match the second with the first, however little they have in common.

    Args:
        one: Path, hub id, module or mapping of a model, never an adapter.
        other: Likewise, or an adapter on the first.
        name: What the second is called.

    Raises:
        CheckpointError: if one of them cannot be read.
    """
    reference = each_once(open_checkpoint(one))
    second = open_checkpoint(other, base=reference)
    reference = _with_apart(reference, {name: second})
    return reference, align_one(name, reference, second)


def _average(experts: Mapping[str, Checkpoint], skip: Sequence[str], only: Sequence[str]) -> MeanOf:
    """The average of the experts, aligned with the first of them.

    Raises:
        CheckpointError: if an expert does not fit the first.
    """
    (_, first), *others = experts.items()
    first = _with_apart(each_once(first), dict(others))
    aligned = align(first, dict(others), skip=skip, only=only, lenient=True)
    return MeanOf(first, list(aligned.values()), lambda name: left_out([name], skip, only))


def _with_apart(reference: Checkpoint, experts: Mapping[str, Checkpoint]) -> Checkpoint:
    """The reference, with embeddings as two that are equal in it alone.

    An encoder and a decoder that begin as one model are trained apart. Adapters are seen with
    their base's tensors, so that beside them the reference stays as it is.

    Raises:
        CheckpointError: A config.json is damaged, or a file changed since it was opened.
    """
    inputs = [name for name in reference.copies if is_input_embedding(name)]
    if not inputs or any(adapter_of(expert) for expert in experts.values()):
        return reference
    aligned = align(reference, experts, lenient=True, faults=Faults()).values()
    apart = [n for n in inputs if any(e.renaming.expert_name(n) in e.private for e in aligned)]
    return each_once(as_stored(reference), apart) if apart else reference


def _open(
    label: str,
    source: Any,
    base: Checkpoint | None,
    faults: Faults,
    seen: Callable[[Checkpoint], Checkpoint] = lambda model: model,
) -> Checkpoint | None:
    try:
        return seen(open_checkpoint(source, base=base))
    except CheckpointError as error:
        for fault in error.faults or (str(error),):
            faults.add(f"{label}: {fault}")
        return None
