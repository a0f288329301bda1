"""What an expert of another class than its base's has no place for, as transformers tells.

An adapter is seen as its base with some tensors changed. Where it brings a classifier, and the
base has the head of a language model, the class it was trained with does not have that. A
classifier of images has one of the two towers of its base.
"""

from collections.abc import Callable, Iterable

from personae.checkpoints import Checkpoint
from personae.checkpoints.adapter import adapter_of
from personae.checkpoints.built import BuiltModel, build
from personae.checkpoints.configuration import CONFIG, class_of, fit_config, is_head
from personae.checkpoints.modules import read_auxiliary_file
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
    found = {*filter(_has_place(built, reference), names)}
    left = {name for name in names if name not in found}
    parts = {name.partition(".")[0] for name in left}
    beside = parts.isdisjoint(name.partition(".")[0] for name in found)
    return left if beside and left.isdisjoint((*adapter.adapted, *adapter.whole)) else set()


def has_no_place(expert: Checkpoint, held: Iterable[str], lacked: Iterable[str]) -> bool:
    """Whether the class of a full model has no place for any of some tensors, by its own names.

    Args:
        expert: The model, whose config.json says the class.
        held: What it has. The class tells nothing unless there is a place for each of these.
        lacked: What it might have had.

    Raises:
        CheckpointError: A config.json is damaged.
    """
    config = read_auxiliary_file(expert.auxiliary_files, CONFIG)
    built = build(config, class_of(config)) if isinstance(config, dict) else None
    if built is None:
        return False
    has_place = _has_place(built, expert)
    return all(map(has_place, held)) and not any(map(has_place, lacked))


def _has_place(built: BuiltModel, model: Checkpoint) -> Callable[[str], bool]:
    """Whether a tensor has a place in a class, under its name or one that loaders give it."""
    renames = [*published_renames(model)]
    return lambda name: any(map(built.has_place, (name, *(rename(name) for rename in renames))))
