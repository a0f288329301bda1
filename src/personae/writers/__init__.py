"""Writers of checkpoints: complete or not at all."""

from personae.writers.atomic import (
    atomic_file,
    clear,
    finish,
    free_space,
    locked,
    output_directories,
    output_directory,
    output_errors,
    remove,
    require_folder,
    require_place,
    require_space,
)
from personae.writers.checkpoint import (
    SHARD_BYTES,
    CheckpointWriter,
    cast,
    hollow_checkpoint,
    with_copies,
    write_auxiliary_files,
)
from personae.writers.journal import JOURNAL, Journal, identity_text, note, resume

__all__ = [
    "JOURNAL",
    "SHARD_BYTES",
    "CheckpointWriter",
    "Journal",
    "atomic_file",
    "cast",
    "clear",
    "finish",
    "free_space",
    "hollow_checkpoint",
    "identity_text",
    "locked",
    "note",
    "output_directories",
    "output_directory",
    "output_errors",
    "remove",
    "require_folder",
    "require_place",
    "require_space",
    "resume",
    "with_copies",
    "write_auxiliary_files",
]
