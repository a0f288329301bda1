"""What is exported: a task of a pack, or a model beside its base, opened and described."""

from collections.abc import Generator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from personae.checkpoints import Checkpoint
from personae.checkpoints.adapter import adapter_of
from personae.checkpoints.built import build
from personae.checkpoints.configuration import CONFIG, class_of, task_type_of
from personae.checkpoints.modules import read_auxiliary_file
from personae.checkpoints.naming import is_safe_name, module_of, name_of
from personae.checkpoints.published_renames import published_renames
from personae.checkpoints.tied import ties_embedding
from personae.commands.export_report import Source
from personae.family.carried import describe
from personae.family.opened import open_family
from personae.family.small_files import small_files
from personae.packs.reader import Pack
from personae.run.changes import Changes, of_expert, of_task
from personae.run.outline import auxiliary_files_of
from personae.run.rebuilt import Rebuilt, left_in_words
from personae.run.reference import open_reference
from personae.run.work import Work

_TASK_TYPES = (
    "SEQ_CLS",
    "SEQ_2_SEQ_LM",
    "CAUSAL_LM",
    "TOKEN_CLS",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
)


@contextmanager
def open_task(pack: Pack, task: str, base: Any, work: Work) -> Generator[Source]:
    """A task of a pack.

    Raises:
        PackError: if the task is unknown, its files are damaged, or the reference is another.
    """
    device = work.torch_device
    with closing(open_reference(pack, base, work)) as reference:
        rebuilt = Rebuilt(pack, task, reference, device)
        files = auxiliary_files_of(pack, task, reference)
        changes = of_task(rebuilt)
        merged = pack.manifest.reference.kind == "merged"
        notes = ["the adapter is for the merged model in the pack, not for the experts' base"]
        left = left_in_words(rebuilt.record)
        yield _described(
            task,
            str(pack.directory),
            changes,
            reference,
            _config(files),
            base=str(pack.reference_source(base)) if merged else reference.source,
            notes=[*(notes if merged else ()), *([f"{task}: {left}"] if left else ())],
        )


@contextmanager
def open_model(model: Any, base: Any) -> Generator[Source]:
    """A model and its base.

    Raises:
        CheckpointError: if either cannot be read, or they do not fit; every fault at once.
    """
    name = name_of(str(model)) if isinstance(model, str | Path) else ""
    name = name if is_safe_name(name) else "model"
    with open_family(base, {name: model}, for_pack=True) as family:
        alignment = family.experts[name]
        adapter = adapter_of(alignment.checkpoint)
        yield _described(
            name,
            alignment.checkpoint.source,
            of_expert(alignment, family.base),
            family.base,
            _config(small_files(alignment, family.base)[0]),
            base=family.base.source,
            trained_as=adapter.model_class if adapter else None,
            notes=[*alignment.naming_notes, *family.base_notes],
        )


def _described(
    name: str,
    place: str,
    changes: Changes,
    reference: Checkpoint,
    config: Mapping[str, Any],
    *,
    base: str,
    trained_as: str | None = None,
    notes: list[str],
) -> Source:
    model_class = class_of(config)
    built = build(config, model_class)
    lacks = built and any(module_of(name) not in built.modules for name in changes.specs)
    return Source(
        name=name,
        place=place,
        changes=changes,
        model=describe(
            changes.specs,
            changes.private,
            tied=changes.tied,
            says_tied=bool(config) and ties_embedding(config),
            built=built,
            renames=[*published_renames(reference)] if lacks else [],
        ),
        base=base,
        revision=reference.revision,
        task_type=trained_as if trained_as in _TASK_TYPES else task_type_of(config),
        model_class=model_class,
        notes=tuple(notes),
    )


def _config(files: Mapping[str, Path | bytes]) -> dict[str, Any]:
    """The content of config.json; empty if there is none.

    Raises:
        CheckpointError: if it is damaged.
    """
    content = read_auxiliary_file(files, CONFIG)
    return content if isinstance(content, dict) else {}
