"""What an adapter with a head of its own has no place for: the base's own head.

An adapter is seen as its base with some tensors changed. Where it brings a classifier, and the
base has the head of a language model, the class it was trained with does not have that.
"""

from personae.checkpoints import Checkpoint
from personae.checkpoints.adapter import adapter_of
from personae.checkpoints.built import build
from personae.checkpoints.configuration import CONFIG, class_of, fit_config, is_head
from personae.checkpoints.modules import read_auxiliary_file
from personae.checkpoints.naming import module_of
from personae.checkpoints.published_renames import published_renames
from personae.checkpoints.vocabulary import is_output_layer


def heads_left(expert: Checkpoint, reference: Checkpoint) -> set[str]:
    """Names of the base's tensors, and stored copies, that the class of an adapter does not have.

    They are told by transformers, which builds the class without weights; whole parts that stand
    beside the backbone alone. None where the class, or transformers, is not known.

    Raises:
        CheckpointError: A config.json is damaged.
    """
    adapter, names = adapter_of(expert), (*reference.specs, *reference.copies)
    if adapter is None or not any(map(is_output_layer, (*names, *reference.tied))):
        return set()
    if not any(is_head(name) and name not in adapter.base_specs for name in adapter.specs):
        return set()
    config = read_auxiliary_file(expert.auxiliary_files, CONFIG)
    if not isinstance(config, dict):
        return set()
    fitted, _ = fit_config(config, adapter.base_specs, adapter.specs, adapter.model_class)
    built = build(fitted, class_of(fitted))
    if built is None:
        return set()
    renames = [*published_renames(reference)]
    found = {
        name
        for name in names
        if any(module_of(place) in built.modules for place in (name, *(r(name) for r in renames)))
    }
    left = {name for name in names if name not in found}
    parts = {name.partition(".")[0] for name in left}
    beside = parts.isdisjoint(name.partition(".")[0] for name in found)
    return left if beside and left.isdisjoint((*adapter.adapted, *adapter.whole)) else set()
