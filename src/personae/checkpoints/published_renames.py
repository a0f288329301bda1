"""The names that transformers itself reads as new ones, where it is installed.

It publishes, by class and model type, how names in files become those of its models. That takes
seconds to import, so it is asked only where names do not meet otherwise.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
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
    configs = [read_auxiliary_file(model.auxiliary_files, CONFIG) for model in models]
    config = next((c for c in configs if isinstance(c, dict) and c.get("model_type")), None)
    try:
        rules = [] if config is None else _rules(config)
    except (ImportError, AttributeError):  # before transformers 5 there were no such tables
        return

    @cache
    def whole(name: str) -> str:
        for rule in rules:
            name = rule(name)
        return name

    @cache
    def inner(name: str) -> str:
        first, dot, rest = name.partition(".")
        return f"{first}.{whole(rest)}" if dot else name

    if rules:
        yield from (whole, inner)
        yield from (lambda name: canonical(whole(name)), lambda name: canonical(inner(name)))


def _rules(config: Mapping[str, Any]) -> list[Renames]:
    """The rules of a model, of its backbone, and of the models in it, in this order.

    Raises:
        ImportError: transformers, or its tables, are not there.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    found: list[Renames] = []
    for called in _called(config):
        rules = get_checkpoint_conversion_mapping(called) or []
        found += [_reading(rule) for rule in rules if isinstance(rule, WeightRenaming)]
    return found


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
