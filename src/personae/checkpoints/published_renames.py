"""The names that transformers itself reads as new ones, where it is installed.

It publishes, by class and model type, how names in files become those of its models. That takes
seconds to import, so it is asked only where names do not meet otherwise.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import chain
from typing import Any

from personae.checkpoints._protocol import Checkpoint
from personae.checkpoints.configuration import CONFIG
from personae.checkpoints.modules import read_auxiliary_file
from personae.checkpoints.renames import canonical

Renames = Callable[[str], str]


def published_renames(*models: Checkpoint) -> Iterator[Renames]:
    """How names are read for the first of some models that says its type: four ways.

    Some rules speak of a whole name, some of a name without the attribute that holds the
    backbone (`vit.`), which a file of the backbone alone does not have. Rules of a model in
    another one say nothing of where it stands there, which `canonical` does.

    Yields:
        Nothing where no model says its type, or transformers is not there or has no rules for it.

    Raises:
        CheckpointError: A config.json is damaged.
    """
    yield from renames_of(published_rules(*models)[1])


def renames_of(rules: Sequence[Any]) -> Iterator[Renames]:
    """How these rules of transformers read names: four ways; nothing without rules."""
    renaming = [_reading(rule) for rule in rules if _renames_alone(rule)]

    @cache
    def whole(name: str) -> str:
        for rule in renaming:
            name = rule(name)
        return name

    @cache
    def inner(name: str) -> str:
        first, dot, rest = name.partition(".")
        return f"{first}.{whole(rest)}" if dot else name

    if rules:
        yield from (whole, inner)
        yield from (lambda name: canonical(whole(name)), lambda name: canonical(inner(name)))


def published_rules(*models: Checkpoint) -> tuple[Mapping[str, Any], list[Any]]:
    """The first config.json of some models that transformers has rules for, and these rules.

    The rules are those of the model, of its backbone, and of the models in it, in this order.
    There are none where no model says its type, or transformers is not there.

    Raises:
        CheckpointError: A config.json is damaged.
    """
    configs = [read_auxiliary_file(model.auxiliary_files, CONFIG) for model in models]
    for config in (c for c in configs if isinstance(c, dict) and c.get("model_type")):
        try:
            from transformers.conversion_mapping import get_checkpoint_conversion_mapping as rules

            found = [*chain.from_iterable(rules(called) or [] for called in _called(config))]
        except (ImportError, AttributeError):  # before transformers 5 there were no such tables
            break
        if found:
            return config, found
    return {}, []


def _renames_alone(rule: Any) -> bool:
    """Whether a rule changes names alone, one at a time.

    Others make tensors of tensors, or rename several together, as their old and new names overlap.
    """
    return not hasattr(rule, "operations") and len(rule.source_patterns) == 1


def _reading(rule: Any) -> Renames:
    """A rule that leaves new names as they are, even those that hold an old one.

    `norm` becomes `mlp.norm`; that stays what it is, and does not become `mlp.mlp.norm`.
    """
    back = rule.reverse_transform()

    def read(name: str) -> str:
        new = rule.rename_source_key(name)[0]
        if new == name:
            return name
        old = back.rename_source_key(name)[0]
        return name if old != name and rule.rename_source_key(old)[0] == name else new

    return read


def _called(config: Mapping[str, Any]) -> Iterable[str]:
    """The names under which rules may stand: a class before its type, each once.

    Raises:
        ImportError: transformers is not there.
    """
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    names = dict[str, None]()
    inside = [value for key, value in config.items() if key.endswith("_config")]
    for part in (config, *(value for value in inside if isinstance(value, dict))):
        model_type = str(part.get("model_type"))
        classes = part.get("architectures")
        backbone = MODEL_MAPPING_NAMES.get(model_type, ())
        for called in (
            *(classes if isinstance(classes, list) else ()),
            *((backbone,) if isinstance(backbone, str) else backbone),
            model_type,
        ):
            names[str(called)] = None
    return names
