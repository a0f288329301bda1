"""Writers of checkpoints: complete or not at all."""

from personae.writers.atomic import (
    atomic_file,
    locked,
    output_directory,
    output_errors,
    require_space,
)
from personae.writers.checkpoint import CheckpointWriter

__all__ = [
    "CheckpointWriter",
    "atomic_file",
    "locked",
    "output_directory",
    "output_errors",
    "require_space",
]
