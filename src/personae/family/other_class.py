"""What an expert of another class than its base's has no place for, as transformers tells.

An adapter is seen as its base with some tensors changed. Where it brings a classifier, and the
base has the head of a language model, the class it was trained with does not have that; nor does
a classifier of images have the text tower of a base of two towers, or the pooler of a backbone.
"""

from collections.abc import Callable, Iterable

from personae.checkpoints import Checkpoint
from personae.checkpoints.adapter import adapter_of
from personae.checkpoints.built import build
from personae.checkpoints.configuration import CONFIG, class_of, fit_config, is_head
from personae.checkpoints.modules import read_auxiliary_file
from personae.checkpoints.published_renames import published_renames


def left_by_class(expert: Checkpoint, reference: Checkpoint) -> set[str]:
    """Names of the base's tensors, and stored copies, that the class of an adapter does not have.

    They are told by transformers, which builds both classes without weights: what that of the base
    has and the other one has not, and whole parts that stand beside the backbone. None where the
    class, or transformers, is not known.

    Raises:
        CheckpointError: A config.json is damaged.
    """
    adapter, names = adapter_of(expert), {*reference.specs, *reference.copies}
    new = () if adapter is None else adapter.specs.keys() - adapter.base_specs.keys()
    if adapter is None or not any(map(is_head, new)):
        return set()
    config = read_auxiliary_file(expert.auxiliary_files, CONFIG)
    if not isinstance(config, dict):
        return set()
    fitted, _ = fit_config(config, adapter.base_specs, adapter.specs, adapter.model_class)
    own_class, class_of_base = class_of(fitted), class_of(config)
    built = build(fitted, own_class) if own_class != class_of_base else None
    if built is None:
        return set()
    found = {*filter(_for_any_name(built.has_place, reference), names)}
    parts = {name.partition(".")[0] for name in found}
    left = {name for name in names if name.partition(".")[0] not in parts}
    if base := build(config, class_of_base):
        held = {*filter(_for_any_name(base.holds, reference), names)}
        left |= held - {*filter(_for_any_name(built.holds, reference), held)}
    understood = bool(found) and left.isdisjoint((*adapter.adapted, *adapter.whole))
    return left if understood else set()


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
    has_place = _for_any_name(built.has_place, expert)
    return all(map(has_place, held)) and not any(map(has_place, lacked))


def _for_any_name(holds: Callable[[str], bool], model: Checkpoint) -> Callable[[str], bool]:
    """Whether that holds for a tensor under its name, or under one that loaders give it."""
    renames = [*published_renames(model)]
    return lambda name: any(map(holds, (name, *(rename(name) for rename in renames))))
