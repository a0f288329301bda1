"""Writers of checkpoints: complete or not at all."""

from personae.writers.atomic import (
    atomic_file,
    locked,
    output_directory,
    output_errors,
    require_folder,
    require_space,
)
from personae.writers.checkpoint import CheckpointWriter
from personae.writers.journal import Journal

__all__ = [
    "CheckpointWriter",
    "Journal",
    "atomic_file",
    "locked",
    "output_directory",
    "output_errors",
    "require_folder",
    "require_space",
]
