"""A model read in the layout of its base, where versions of transformers lay out tensors apart."""

from personae.checkpoints._protocol import Checkpoint
from personae.checkpoints.expert_layouts import with_experts_like
from personae.checkpoints.published_layouts import with_layout_like


def laid_out_like(base: Checkpoint, model: Checkpoint) -> Checkpoint:
    """A full model as its base is stored; the model itself where that is no other way.

    Raises:
        CheckpointError: A config.json is damaged.
    """
    return with_layout_like(base, with_experts_like(base, model))
