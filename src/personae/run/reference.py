"""The reference of a pack: opened where it is, and held to its fingerprint."""

from typing import Any

from personae.checkpoints import Checkpoint, open_checkpoint
from personae.checkpoints.tied import each_once
from personae.errors import CheckpointError, Faults, PackError
from personae.packs.manifest import ReferenceRecord
from personae.packs.reader import Pack
from personae.run.scan import fingerprint
from personae.run.work import Work


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
