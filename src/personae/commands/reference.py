"""The reference of a pack: the base, or a merged model streamed to disk; made, opened, checked."""

from pathlib import Path
from typing import Any

from personae.checkpoints import Checkpoint, open_checkpoint
from personae.checkpoints.tied import each_once
from personae.commands.merge import run
from personae.commands.merge_job import job_of
from personae.errors import CheckpointError, Faults, PackError
from personae.family.align import align
from personae.family.opened import Family
from personae.methods import MergeMethod
from personae.packs.manifest import REFERENCE, ReferenceRecord
from personae.packs.reader import Pack
from personae.recipe import PackSettings
from personae.run.scan import fingerprint, uncoded
from personae.run.work import Work
from personae.writers import output_directory, write_auxiliary_files


def write_merged_reference(
    family: Family, method: MergeMethod, directory: Path, work: Work
) -> None:
    """Merge the tensors all experts share with the base; the others stay the base's.

    Args:
        family: Base and experts.
        method: Static merge method.
        directory: Where the checkpoint is written, in the base's dtypes; replaced if it exists.
        work: Workers, memory bound, progress.
    """
    job = job_of(family, lambda _: method)
    with output_directory(directory, overwrite=True) as partial:
        run([job], partial, work)
        write_auxiliary_files(family.base.auxiliary_files, partial)


def make_reference(
    family: Family, base_fingerprint: str, settings: PackSettings, directory: Path, work: Work
) -> ReferenceRecord:
    """The record of the reference of a pack in `directory`; a merged one is written there first.

    Raises:
        CheckpointError: if the merged model holds values that are not finite.
    """
    base = family.base
    if settings.vector == "task":
        return ReferenceRecord(
            kind="base",
            source=base.source,
            revision=base.revision,
            fingerprint=base_fingerprint,
        )
    method = settings.merge(len(family.experts))
    write_merged_reference(family, method, directory / REFERENCE, work)
    faults = Faults()
    merged = open_checkpoint(directory / REFERENCE)
    unchecked = uncoded(family)
    found = fingerprint(merged, "The merged reference", work, faults, unchecked=unchecked)
    merged.close()
    faults.raise_if_any(CheckpointError)
    return ReferenceRecord(
        kind="merged",
        source=REFERENCE,
        fingerprint=found,
        method=method.name,
        method_parameters=method.model_dump(mode="json", by_alias=True),
        experts=tuple(family.experts),
    )


def relative_to_merged(family: Family, directory: Path, settings: PackSettings) -> Family:
    """The same experts, aligned with the merged reference as it stands on disk."""
    merged = each_once(open_checkpoint(directory))
    experts = {name: expert.checkpoint for name, expert in family.experts.items()}
    spared = {name for expert in family.experts.values() for name in expert.spared}
    aligned = align(
        merged,
        experts,
        skip=settings.skip,
        private=settings.private,
        spared=spared,
        may_lack_parts=True,
    )
    return Family(merged, aligned)


def check_fingerprint(reference: ReferenceRecord, found: str, source: str) -> None:
    """Check that a checkpoint is the reference a pack was made from.

    Raises:
        PackError: if its weights are others.
    """
    if found != reference.fingerprint:
        raise PackError(
            f"{source} is not the reference this pack was made from: its fingerprint is {found}, "
            f"the pack was made from {reference.source} with {reference.fingerprint}. "
            "Give the right one with --base."
        )


def note_source(pack: Pack, base: Any, work: Work) -> None:
    """Show what a pack, which may be anybody's, is about to have opened in its name."""
    if base is None and pack.reference_directory is None:
        work.note(f"the reference, as the pack names it: {pack.reference_source()}")


def open_reference(pack: Pack, base: Any, work: Work) -> Checkpoint:
    """Open the reference of a pack and check its fingerprint.

    Raises:
        PackError: if it is not found, or its weights are others.
    """
    note_source(pack, base, work)
    try:
        reference = open_checkpoint(pack.reference_source(base))
    except (CheckpointError, OSError) as error:
        raise PackError(
            f"The reference of {pack.directory} cannot be opened: {error} "
            "Say where it is with --base."
        ) from error
    unchecked = reference.specs  # the weights that were packed have been looked at then
    found = fingerprint(reference, "The reference", work, Faults(), unchecked=unchecked)
    check_fingerprint(pack.manifest.reference, found, reference.source)
    return each_once(reference)
