"""The names that transformers itself reads as new ones, where it is installed.

It publishes, by class and model type, how names in files become those of its models. That takes
seconds to import, so it is asked only where names do not meet otherwise.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
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


def renames_of(rules: Sequence[Sequence[Any]]) -> Iterator[Renames]:
    """How these rules of transformers read names: four ways; nothing without rules.

    A tensor that is more than renamed by the rules of one model is none of the models in that:
    their rules would take it for one of theirs.
    """
    levels = [
        (
            [_reading(rule) for rule in level if _renames_alone(rule)],
            [way for rule in level if converts(rule) for way in (rule, rule.reverse_transform())],
        )
        for level in rules
    ]

    @cache
    def whole(name: str) -> str:
        for renaming, converting in levels:
            for rule in renaming:
                name = rule(name)
            if any(rule.rename_source_key(name)[1] is not None for rule in converting):
                break
        return name

    @cache
    def inner(name: str) -> str:
        first, dot, rest = name.partition(".")
        return f"{first}.{whole(rest)}" if dot else name

    if rules:
        yield from (whole, inner)
        yield from (lambda name: canonical(whole(name)), lambda name: canonical(inner(name)))


def published_rules(*models: Checkpoint) -> tuple[Mapping[str, Any], list[list[Any]]]:
    """The first config.json of some models that transformers has rules for, and these rules.

    The rules are those of the model, of its backbone, and of the models in it, in this order, a
    list each. There are none where no model says its type, or transformers is not there.

    Raises:
        CheckpointError: A config.json is damaged.
    """
    configs = [read_auxiliary_file(model.auxiliary_files, CONFIG) for model in models]
    for config in (c for c in configs if isinstance(c, dict) and c.get("model_type")):
        try:
            from transformers.conversion_mapping import get_checkpoint_conversion_mapping as rules

            found = [rule for called in _called(config) if (rule := rules(called))]
        except (ImportError, AttributeError):  # before transformers 5 there were no such tables
            break
        if found:
            return config, found
    return {}, []


def _renames_alone(rule: Any) -> bool:
    """Whether a rule changes names alone, one at a time.

    Others make tensors of tensors, or rename several together, as their old and new names overlap.
    """
    return not converts(rule) and len(rule.source_patterns) == 1


def converts(rule: Any) -> bool:
    """Whether a rule of transformers makes tensors of tensors."""
    return hasattr(rule, "operations")


def _reading(rule: Any) -> Renames:
    """A rule that leaves new names as they are, even those that hold an old one.

    `norm` becomes `mlp.norm`; that stays what it is, and does not become `mlp.mlp.norm`.
    """
    old, new = rule.compiled_sources, rule.reverse_transform().compiled_sources

    def read(name: str) -> str:
        found, already = old.search(name), new.search(name)
        if found and already and already.start() <= found.start() <= found.end() <= already.end():
            return name
        return rule.rename_source_key(name)[0]

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
