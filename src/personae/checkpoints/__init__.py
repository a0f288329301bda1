"""Lazy readers of checkpoints, and the alignment of a family."""

from personae.checkpoints._protocol import Checkpoint
from personae.checkpoints.opening import open_checkpoint

__all__ = ["Checkpoint", "open_checkpoint"]
