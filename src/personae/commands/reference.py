"""The reference of a new pack: the base, or a merged model streamed to disk."""

from pathlib import Path

from personae.checkpoints import open_checkpoint
from personae.checkpoints.tied import each_once
from personae.commands.merge import run
from personae.commands.merge_job import job_of
from personae.errors import CheckpointError, Faults
from personae.family.align import align
from personae.family.opened import Family
from personae.methods import MergeMethod
from personae.packs.manifest import REFERENCE, ReferenceRecord
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
