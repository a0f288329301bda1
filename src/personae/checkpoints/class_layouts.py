"""A model as its class has it in memory, or as hubs hold it: other layouts than a file's own.

transformers says for each class by which rules the tensors of files become those in memory. Rules
of a model in another one are for names under its place in the class alone, which only the class
itself tells: it is built without weights. What is read so is what `from_pretrained` reads.
"""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from personae._types import TensorSpec
from personae.checkpoints._protocol import Checkpoint
from personae.checkpoints.built import build_module
from personae.checkpoints.configuration import CONFIG, class_of
from personae.checkpoints.laid_out import LaidOut, Made
from personae.checkpoints.modules import read_auxiliary_file
from personae.checkpoints.published_layouts import Conversion, Described, Renamed, in_order, made_by
from personae.checkpoints.published_renames import converts


@dataclass(frozen=True)
class Layout:
    """Another way to store a model.

    Attributes:
        there: Its tensors that are called or laid out otherwise, made of those that are stored.
        back: The stored ones again, made of those.
        names: Stored name, tied ones too, to the name there of what is only called otherwise.
    """

    there: Mapping[TensorSpec, Made]
    back: Mapping[TensorSpec, Made]
    names: Mapping[str, str]

    def of(self, model: Checkpoint, note: str = "") -> LaidOut:
        """The model in this layout."""
        names = {**dict.fromkeys(model.specs), **self.names}
        tied = {
            self.names.get(dropped, dropped): names[kept] or kept
            for dropped, kept in model.tied.items()
        }
        return LaidOut(model, self.there, note, tied)


class ModelClass:
    """A class of models as transformers builds it, with its rules for files."""

    def __init__(
        self, config: Mapping[str, Any], module: Any, rules: list[Any], to_save: list[Any]
    ) -> None:
        """Take config.json, the model without weights, and its rules; see `class_told_by`."""
        self._config, self._module = config, module
        self._rules, self._to_save = rules, to_save
        self._shapes: Mapping[str, tuple[int, ...]]
        self._shapes = {name: tuple(t.shape) for name, t in module.state_dict().items()}

    def in_memory(self, model: Checkpoint) -> Layout | None:
        """How a file of a model of this class, or of its backbone, is laid out in memory.

        None where the tensors that rules make are not those of the class.
        """
        rules = deepcopy(self._rules)  # some remember what they have seen
        renamings, converters = _apart(rules)
        read: dict[str, str] = {}
        as_it_is = set[str]()
        for name in sorted({*model.specs, *model.tied}, key=in_order):
            new = _renamed(name, renamings)
            known = self._placed(_key(new, converters)) in self._shapes
            if not known and self._placed(name) in self._shapes:
                new = name
                as_it_is.add(name)
            read[name] = new
        found = _lay_out(model, read, as_it_is, converters, self._placed, self._described)
        if found is None:
            return None
        changed = {spec.name: spec for spec, how in found.there.items() if _is_new(how)}
        fits = all(self._shapes.get(name) == spec.shape for name, spec in changed.items())
        return found if fits else None

    def on_hubs(self, model: Checkpoint) -> Layout | None:
        """How a model that is laid out as in memory is laid out in files that hubs hold."""
        renamings, converters = _apart([rule.reverse_transform() for rule in self._to_save[::-1]])
        read = {name: name for name in (*model.specs, *model.tied)}
        return _lay_out(
            model, read, (), converters, lambda n: _renamed(n, renamings), self._described
        )

    def _described(self, shapes: Mapping[str, tuple[int, ...]]) -> Described:
        return Described(self._config, {**self._shapes, **shapes})

    def _placed(self, name: str) -> str:
        """The name with or without the attribute of the backbone, as the class has it."""
        prefix = f"{self._module.base_model_prefix}."
        if prefix != "." and name not in self._shapes:
            without = name.removeprefix(prefix)
            if without != name and without in self._shapes:
                return without
            if f"{prefix}{name}" in self._shapes:
                return f"{prefix}{name}"
        return name


def class_told_by(model: Checkpoint) -> ModelClass | None:
    """The class of a model; None where it says none, or transformers has no rules for it.

    Raises:
        CheckpointError: The config.json is damaged.
    """
    config = read_auxiliary_file(model.auxiliary_files, CONFIG)
    if not isinstance(config, dict):
        return None
    module = build_module(config, class_of(config))
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:  # before transformers 5 there were no such tables
        return None
    if module is None:
        return None
    rules = get_model_conversion_mapping(module)
    to_save = get_model_conversion_mapping(module, add_legacy=False)
    # As transformers saves a model that it has not loaded: without prefixes that it cannot know of.
    to_save = [rule for rule in to_save if not hasattr(rule, "prefix_to_add")]
    return ModelClass(config, module, rules, to_save) if any(map(converts, rules)) else None


def _apart(rules: list[Any]) -> tuple[list[Any], list[Any]]:
    """Rules that change names alone, and those that make tensors of tensors."""
    return [r for r in rules if not converts(r)], [r for r in rules if converts(r)]


def _renamed(name: str, renamings: list[Any]) -> str:
    for rule in renamings:
        name, _ = rule.rename_source_key(name)
    return name


def _key(name: str, converters: list[Any]) -> str:
    """The name of what a tensor becomes part of."""
    found = _converter(name, converters)
    return found[1] if found else name


def _converter(name: str, converters: list[Any]) -> tuple[Any, str, str] | None:
    """The first rule that speaks of a name, what it makes of that, and by which pattern."""
    for rule in converters:
        key, pattern = rule.rename_source_key(name)
        if pattern is not None:
            return rule, key, pattern
    return None


def _lay_out(
    model: Checkpoint,
    read: Mapping[str, str],
    as_it_is: Any,
    converters: list[Any],
    finish: Callable[[str], str],
    described: Callable[[Mapping[str, tuple[int, ...]]], Described],
) -> Layout | None:
    """The layout that rules give; None where two tensors would have one name.

    Args:
        model: What is stored.
        read: Stored name, tied ones too, to the one by which rules know it.
        as_it_is: Names of which rules do not speak, though they might seem to.
        converters: Rules that make tensors of tensors.
        finish: What a name becomes after rules.
        described: What operations ask, by shapes beside those of the class.
    """
    groups: dict[str, tuple[Any, dict[str, list[str]]]] = {}
    names: dict[str, str] = {}
    for name, new in read.items():
        found = None if name in as_it_is else _converter(new, converters)
        if found and name in model.specs:
            rule, key, pattern = found
            groups.setdefault(key, (rule, {}))[1].setdefault(pattern, []).append(name)
        elif not found:
            names[name] = finish(new)
    there: dict[TensorSpec, Made] = {}
    back: dict[TensorSpec, Made] = {}
    for key, (rule, sources) in groups.items():
        one = _convert(rule, key, sources, model, read, finish, described)
        for spec, how in one[0].items():
            there[spec] = how
        back |= one[1]
    done = {name for how in there.values() for name in how.used}
    for name, new in names.items():
        if new != name and name in model.specs and name not in done:
            spec = model.specs[name]
            there[TensorSpec(new, spec.shape, spec.dtype)] = Renamed(name)
            back[spec] = Renamed(new)
            done.add(name)
    left = [name for name in model.specs if name not in done]
    all_names = [*left, *(spec.name for spec in there)]
    return Layout(there, back, names) if len({*all_names}) == len(all_names) else None


def _convert(
    rule: Any,
    key: str,
    sources: Mapping[str, list[str]],
    model: Checkpoint,
    read: Mapping[str, str],
    finish: Callable[[str], str],
    described: Callable[[Mapping[str, tuple[int, ...]]], Described],
) -> tuple[dict[TensorSpec, Made], dict[TensorSpec, Made]]:
    """What a rule makes of some tensors, and what its reverse makes of that; nothing if not both.

    Their order in `sources` is that of the names by which rules know them.
    """
    own = {
        pattern: [model.specs[n] for n in sorted(names, key=lambda n: in_order(read[n]))]
        for pattern, names in sources.items()
    }
    conversion = Conversion(rule, key, own, described({}))
    made = conversion.results() if own.keys() == {*rule.source_patterns} else {}
    finished = {spec.name: finish(spec.name) for spec in made}
    there = {TensorSpec(finished[s.name], s.shape, s.dtype): how for s, how in made.items()}
    stored = {read[spec.name]: spec for specs in own.values() for spec in specs}
    of_stored = described({name: spec.shape for name, spec in stored.items()})
    specs = {spec.name: spec for spec in there}
    again = made_by(rule.reverse_transform(), finished, specs, of_stored) if made else {}
    alike = {s.name: s.shape for s in again} == {n: s.shape for n, s in stored.items()}
    return (there, {stored[s.name]: how for s, how in again.items()}) if alike else ({}, {})


def _is_new(how: Made) -> bool:
    return not isinstance(how, Renamed)


def other_layouts(base: Checkpoint) -> Iterator[list[Layout]]:
    """Other ways in which a model could be stored, as layouts of layouts: in memory, on hubs.

    Raises:
        CheckpointError: The base's config.json is damaged.
    """
    told = class_told_by(base)
    memory = None if told is None else told.in_memory(base)
    if told is None or memory is None:
        return
    if memory.there:
        yield [memory]
    hubs = told.on_hubs(memory.of(base))
    if hubs is not None and hubs.there:
        yield [memory, hubs]
