"""The parts of a merge, opened and ready to run: one family, or slices stacked on each other.

Each part is a merge in itself, of models seen with the layers that it takes and under the names
that come out. Together they write one model; here is what they have to agree in for that, and what
the model's small files are.
"""

import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from personae.checkpoints import Checkpoint, open_checkpoint
from personae.checkpoints.configuration import CONFIG
from personae.checkpoints.layers import WithLayers, layers_of
from personae.checkpoints.modules import read_auxiliary_file
from personae.checkpoints.tied import says_tied
from personae.commands.merge_adapter import AdapterMerge
from personae.commands.merge_job import MergeJob, open_to_merge, prepare
from personae.errors import CheckpointError, Faults
from personae.family.chat_templates import with_template
from personae.family.layers import stacked_config
from personae.family.opened import Family
from personae.family.small_files import with_generation
from personae.family.vocabularies import (
    VocabularyChoice,
    merge_vocabularies,
    merged_auxiliary_files,
)
from personae.recipe import MergePart


@dataclass(frozen=True)
class LayersPlan:
    """Layers of the output, and what they are merged of; spans are without their last number.

    Attributes:
        module: The stack they are in; None where the model has one.
        span: Their numbers.
        method: How they are merged.
        sources: Name of a model to the layers taken of it.
    """

    module: str | None
    span: tuple[int, int]
    method: str
    sources: Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class OpenedParts:
    """The parts of a merge, opened.

    Attributes:
        parts: What is merged, and how.
        jobs: The same, ready to run; items are numbered through.
        donor: Whose small files the output has.
        models: Of each part, the first of its models.
        adapter: The one part, where it writes an adapter.
    """

    parts: Sequence[MergePart]
    jobs: Sequence[MergeJob]
    donor: Checkpoint
    models: Sequence[Checkpoint]
    adapter: AdapterMerge | None = None

    @property
    def families(self) -> list[Family]:
        """The family of each part."""
        return [job.family for job in self.jobs]

    def layers(self) -> list[LayersPlan]:
        """Which layers of which models come out where; nothing where whole models are merged."""
        found: list[LayersPlan] = []
        for part, family, model in zip(self.parts, self.families, self.models, strict=True):
            view, models = layers_of(model), {"base": family.base} if family.has_base else {}
            models |= {name: expert.checkpoint for name, expert in family.experts.items()}
            seen = {name: one for name, m in models.items() if (one := layers_of(m)) is not None}
            if view is not None:
                sources = {name: _span([*one.layers.values()]) for name, one in seen.items()}
                span, method = _span([*view.layers]), part.settings.merge_method().name
                found.append(LayersPlan(view.module, span, method, sources))
        return found

    def _all_models(self) -> list[Checkpoint]:
        """Every model of all parts, in order."""
        found: list[Checkpoint] = []
        for family in self.families:
            found += [family.base] if family.has_base else []
            found += [expert.checkpoint for expert in family.experts.values()]
        return found

    def _with_generation(self) -> tuple[dict[str, Path | bytes], list[str]]:
        """The donor's small files under the vocabulary that comes out, and what to know of them."""
        first, settings = self.families[0], self.parts[0].settings
        files = merged_auxiliary_files(self.donor, first.vocabulary, settings.dtype)
        named: dict[str, Checkpoint] = {}
        for family in self.families:
            named = family.models | named
        return with_generation(files, named)

    @property
    def notes(self) -> list[str]:
        """What a person should know of the small files."""
        return self._with_generation()[1]

    def auxiliary_files(self, faults: Faults | None = None) -> dict[str, Path | bytes]:
        """The small files beside the weights; what config.json cannot say goes to `faults`.

        Raises:
            CheckpointError: if a configuration is damaged.
        """
        settings = self.parts[0].settings
        files = with_template(
            self._with_generation()[0], settings.chat_template, self._all_models()
        )
        if settings.layers is None:
            return files
        config = read_auxiliary_file(files, CONFIG)
        config = config if isinstance(config, dict) else None
        config = stacked_config(config, self.donor, self.models, faults or Faults())
        if config is not None:
            text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
            files[CONFIG] = text.encode()
        return files


def _span(layers: Sequence[int]) -> tuple[int, int]:
    return (layers[0], layers[-1] + 1)


@contextmanager
def open_parts(
    parts: Sequence[MergePart],
    small_files: str | Checkpoint | None = None,
    *,
    at_once: bool = False,
    beside: int = 0,
) -> Generator[OpenedParts, None, None]:
    """Open and align every part.

    Args:
        parts: What is merged, and how; at least one.
        small_files: The model whose small files the output has; by default the first part's base,
            or its first expert.
        at_once: See `MergeJob`.
        beside: See `MergeJob`.

    Raises:
        PersonaeError: as `open_to_merge` does, for all parts at once, and for parts that do not
            make one model.
    """
    faults = Faults()
    with ExitStack() as stack:
        families: list[Family] = []
        for part in parts:
            try:
                family = open_to_merge(part.base, part.experts, part.settings)
                families.append(stack.enter_context(family))
            except CheckpointError as error:
                faults.take(error)
        faults.raise_if_any(CheckpointError)
        models = [_first_model(family) for family in families]
        donor = models[0] if small_files is None else open_checkpoint(small_files)
        if small_files is not None:
            stack.callback(donor.close)
        if len(parts) > 1:
            _check_one_model(families, models, parts, faults)
        faults.raise_if_any(CheckpointError)
        jobs = [prepare(f, part.settings) for f, part in zip(families, parts, strict=True)]
        jobs = [replace(job, at_once=at_once, beside=beside) for job in jobs]
        writes_adapter = parts[0].settings.output == "adapter"
        adapter = AdapterMerge(parts[0], jobs[0]) if writes_adapter else None
        opened = OpenedParts(parts, _numbered(jobs), donor, models, adapter)
        opened.auxiliary_files(faults)
        faults.raise_if_any(CheckpointError)
        yield opened


def _first_model(family: Family) -> Checkpoint:
    """The base, or without one the first expert, whose names and small files come out."""
    return family.base if family.has_base else next(iter(family.experts.values())).checkpoint


def _numbered(jobs: Sequence[MergeJob]) -> list[MergeJob]:
    """Jobs whose items are numbered through; after each comes a number for its last step."""
    found: list[MergeJob] = []
    first = 0
    for job in jobs:
        items = [replace(item, number=first + item.number) for item in job.items]
        found.append(replace(job, items=items, first=first))
        first += len(items) + 1
    return found


def _check_one_model(
    families: Sequence[Family],
    models: Sequence[Checkpoint],
    parts: Sequence[MergePart],
    faults: Faults,
) -> None:
    """What parts must agree in to make one model: sizes, dtypes, ties, vocabulary."""
    views = [view for view in map(layers_of, models) if view is not None]
    known: dict[tuple[str | None, str], tuple[str, Any]] = {}
    for view, family, part in zip(views, families, parts, strict=True):
        unlike = _unlike(view, family, part, known)
        if unlike:
            name, found, source, wanted = unlike[0]
            faults.add(
                f"Layers of {view.source} and of {source} are stacked, but {len(unlike)} of their "
                f"tensors differ: '{name}' is {found}, there {wanted}. Stack models of one "
                "architecture and size"
                + (", or set the dtype of the output: dtype." if found[0] == wanted[0] else ".")
            )
    said = {view.source: says_tied(view.model) for view in views}
    if len({*said.values()}) > 1:
        told = ", ".join(f"{source} {str(tied).lower()}" for source, tied in said.items())
        faults.add(
            "The models that are stacked do not agree in tie_word_embeddings: "
            f"{told}. Save those that are tied untied, or leave them out."
        )
    _check_vocabulary(views, faults)


def _unlike(
    view: WithLayers,
    family: Family,
    part: MergePart,
    known: dict[tuple[str | None, str], tuple[str, Any]],
) -> list[tuple[str, Any, str, Any]]:
    """Tensors of a part's layers that have another shape or dtype than in parts before."""
    unlike: list[tuple[str, Any, str, Any]] = []
    own: dict[tuple[str | None, str], tuple[str, Any]] = {}
    for name, spec in family.base.specs.items():
        if name.startswith(view.stack.prefix):
            suffix = name.removeprefix(view.stack.prefix).partition(".")[2]
            key = view.module, suffix
            dtype = (
                part.settings.dtype if part.settings.dtype and spec.is_floating else spec.dtype_name
            )
            found = spec.shape, dtype
            if key in known and known[key][1] != found:
                unlike.append((name, found, *known[key]))
            own.setdefault(key, (view.source, found))
    known.update({key: value for key, value in own.items() if key not in known})
    return unlike


def _check_vocabulary(views: Sequence[WithLayers], faults: Faults) -> None:
    """Slices of several models have one vocabulary: rows are not chosen over all of them."""
    models = {view.source: view.model for view in views}
    first, *others = models
    try:
        others_by_name = {name: models[name] for name in others}
        merge_vocabularies(models[first], others_by_name, VocabularyChoice())
    except CheckpointError as error:
        faults.take(error)
