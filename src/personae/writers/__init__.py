"""Writers of checkpoints: complete or not at all."""

from personae.writers.atomic import (
    atomic_file,
    locked,
    output_directory,
    output_errors,
    require_folder,
    require_place,
    require_space,
)
from personae.writers.checkpoint import SHARD_BYTES, CheckpointWriter
from personae.writers.companions import write_companions
from personae.writers.journal import Journal

__all__ = [
    "SHARD_BYTES",
    "CheckpointWriter",
    "Journal",
    "atomic_file",
    "locked",
    "output_directory",
    "output_errors",
    "require_folder",
    "require_place",
    "require_space",
    "write_companions",
]
