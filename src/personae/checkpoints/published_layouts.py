"""Tensors that transformers stores fused and holds apart, or the other way round.

Beside names, its conversion map says which operations make the tensors of a model of those of a
file: q, k and v cut from one matrix, experts stacked, rows interleaved. Each has a reverse. So a
model that is stored in the one way is read in the other one where its base is in that, and what
the operations do is left to transformers.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from personae._types import TensorSpec
from personae.checkpoints._protocol import Checkpoint
from personae.checkpoints.laid_out import Kept, LaidOut, Made
from personae.checkpoints.naming import find_names
from personae.checkpoints.published_renames import (
    Renames,
    converts,
    published_rules,
    renames_of,
)
from personae.checkpoints.renames import canonical

_NUMBER = re.compile(r"\d+")
_LAYER = re.compile(r"\d(\.|$)")
_AXES = ("dim", "dim0", "dim1")
_UNSUITED = (
    AttributeError,
    IndexError,
    KeyError,
    RuntimeError,
    StopIteration,
    TypeError,
    ValueError,
)
"""What operations raise for tensors that are not what they expect."""


def with_layout_like(base: Checkpoint, model: Checkpoint) -> Checkpoint:
    """A full model in the layout of its base, by transformers' conversion map.

    It is the model itself where every tensor meets one of the base, or where nothing is known.
    The map takes seconds to import: it is asked only where tensors in layers do not meet.

    Raises:
        CheckpointError: A config.json is damaged.
    """
    theirs, ours = unmet(base, model)
    if not (theirs and ours and any(map(in_layer, chain(theirs, ours)))):
        return model
    config, rules = published_rules(base, model)
    for rename in renames_of(rules):
        stored = {rename(name): name for name in ours}
        wanted = {rename(name): name for name in theirs}
        shapes = {rename(name): spec.shape for name, spec in base.specs.items()}
        described = Described(config, shapes)
        made: dict[TensorSpec, Made] = {}
        for rule in chain.from_iterable(rules):
            if way := _direction(rule, stored, wanted):
                made |= made_by(way, stored, model.specs, described)
        if made:
            return LaidOut(model, made, laid_out_note(made))
    return model


def in_layer(name: str) -> bool:
    """Whether a tensor is, by its name, in one of a model's layers, which are counted."""
    return _LAYER.search(name) is not None


def laid_out_note(made: Mapping[TensorSpec, Made]) -> str:
    """What a person should be told of tensors that are made of others."""
    laid_out = {spec: how for spec, how in made.items() if not isinstance(how, Renamed)}
    first, how = next(iter((laid_out or made).items()))
    return (
        f"stores tensors otherwise than the base, such as '{next(iter(how.used))}', and is "
        f"read as the base is stored, such as '{first.name}'"
    )


def unmet(
    base: Checkpoint, model: Checkpoint, renames: Sequence[Renames] = (canonical,)
) -> tuple[set[str], set[str]]:
    """Names of tensors of each that the other lacks, or has in another shape."""
    if base.specs.keys() == model.specs.keys():
        plain, expert_name = (lambda name: name), (lambda name: name)
    else:
        plain, renaming = find_names(base.specs, model.specs, renames)
        expert_name = renaming.expert_name
    own = {plain(name): spec for name, spec in model.specs.items()}
    met = {
        name: expert_name(name)
        for name, spec in base.specs.items()
        if expert_name(name) in own and own[expert_name(name)].shape == spec.shape
    }
    taken = set(met.values())
    return (
        {name for name in base.specs if name not in met},
        {name for name in model.specs if plain(name) not in taken},
    )


def _direction(rule: Any, stored: Iterable[str], wanted: Iterable[str]) -> Any | None:
    """The rule, or its reverse, that makes tensors like the wanted ones of those stored."""
    if converts(rule) or len(rule.source_patterns) > 1:
        back = rule.reverse_transform()
        for there, again in ((rule, back), (back, rule)):
            if _fits(there, stored) and _fits(again, wanted):
                return there
    return None


def _fits(rule: Any, names: Iterable[str]) -> bool:
    """Whether a rule speaks of some of these; the first pattern of those that rename together.

    Their old and new names overlap, and only the first one is in one of the two alone.
    """
    if converts(rule):
        return any(rule.rename_source_key(name)[1] is not None for name in names)
    return any(re.search(rule.source_patterns[0], name) for name in names)


class Described:
    """What operations ask of a model: its configuration, and shapes of its tensors."""

    def __init__(self, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Take config.json, and shapes of the base by the names that transformers gives."""
        self._config, self._shapes = config, shapes

    @cached_property
    def config(self) -> Any:
        """The configuration as transformers has it in memory.

        Raises:
            KeyError: transformers does not know the type.
        """
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        return CONFIG_MAPPING[self._config["model_type"]].from_dict(dict(self._config))

    def get_parameter(self, name: str) -> Tensor:
        """A tensor without memory, of the shape that goes by a name, with or without a prefix.

        Raises:
            AttributeError: There is none, or more than one.
        """
        found = {
            shape
            for known, shape in self._shapes.items()
            if known == name or known.endswith(f".{name}") or name.endswith(f".{known}")
        }
        if len(found) != 1:
            raise AttributeError(name)
        return torch.empty(found.pop(), device="meta")


def made_by(
    rule: Any, stored: Mapping[str, str], specs: Mapping[str, TensorSpec], described: Described
) -> dict[TensorSpec, Made]:
    """What a rule makes of stored tensors, given by the names that transformers has for them."""
    if not converts(rule):
        return dict(_renamed(rule, stored, specs))
    groups: dict[str, dict[str, list[str]]] = {}
    for name in sorted(stored, key=in_order):
        key, pattern = rule.rename_source_key(name)
        if pattern is not None:
            groups.setdefault(key, {}).setdefault(pattern, []).append(name)
    made: dict[TensorSpec, Made] = {}
    for key, sources in groups.items():
        complete = sources.keys() == {*rule.source_patterns}
        if complete and all(map(_is_counted, sources.values())):
            own = {pattern: [specs[stored[n]] for n in names] for pattern, names in sources.items()}
            made |= Conversion(rule, key, own, described).results()
    return made


def _renamed(
    rule: Any, stored: Mapping[str, str], specs: Mapping[str, TensorSpec]
) -> Iterator[tuple[TensorSpec, Made]]:
    """What rules rename together: the first one shows that the names are old, and comes first."""
    for name in sorted(stored, key=lambda n: not re.search(rule.source_patterns[0], n)):
        new, pattern = rule.rename_source_key(name)
        if pattern is not None:
            spec = specs[stored[name]]
            yield TensorSpec(new, spec.shape, spec.dtype), Renamed(spec.name)


def in_order(name: str) -> list[tuple[int, str]]:
    """A key that puts `shard_2` before `shard_11`."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def _is_counted(names: Sequence[str]) -> bool:
    """Whether names differ in one number alone, which counts them from 0 on, without a gap."""
    numbers = [tuple(map(int, _NUMBER.findall(name))) for name in names]
    if len({_NUMBER.sub("#", name) for name in names}) > 1:
        return False
    columns = [column for column in zip(*numbers, strict=True) if len(set(column)) > 1]
    return len(names) == 1 or columns == [tuple(range(len(names)))]


@dataclass(frozen=True)
class Renamed:
    """A stored tensor under another name."""

    name: str

    @property
    def used(self) -> tuple[str, ...]:
        """That tensor."""
        return (self.name,)

    @property
    def kept_bytes(self) -> int:
        """None."""
        return 0

    def read_rows(self, model: Checkpoint, keep: Kept, start: int, stop: int) -> Tensor:
        """Rows `start:stop`, as they are stored."""
        del keep
        return model.read_rows(self.name, start, stop)


@dataclass(frozen=True, eq=False)
class Conversion:
    """One use of a rule: tensors of some patterns become those of others.

    Attributes:
        rule: A converter of transformers.
        key: The name that it gives to all of them.
        sources: Pattern to stored tensors, in order.
        described: What operations ask.
    """

    rule: Any
    key: str
    sources: Mapping[str, Sequence[TensorSpec]]
    described: Described

    @property
    def used(self) -> tuple[str, ...]:
        """All that it is made of."""
        return tuple(spec.name for specs in self.sources.values() for spec in specs)

    @property
    def kept_bytes(self) -> int:
        """Of all that comes out, or of one row of stacks, and a copy of it on the way."""
        if self.rows_alone or self.stacks:
            return 0
        specs = [spec for specs in self.sources.values() for spec in specs]
        return 2 * sum(s.nbytes // (s.shape[0] if self.unstacks else 1) for s in specs)

    def results(self) -> dict[TensorSpec, Made]:
        """What becomes of them, from headers; nothing if the operations do not suit them."""
        try:
            tensors = self.convert(
                lambda spec: torch.empty(spec.shape, dtype=spec.dtype, device="meta")
            )
        except _UNSUITED:
            return {}
        return {
            TensorSpec(name, tuple(tensor.shape), tensor.dtype): _Result(self, name, place)
            for place, (name, tensor) in enumerate(tensors.items())
        }

    def convert(self, read: Callable[[TensorSpec], Tensor]) -> dict[str, Tensor]:
        """All that the operations make, by name."""
        rule = self.rule
        tensors: Any = {pattern: [*map(read, specs)] for pattern, specs in self.sources.items()}
        for operation in rule.operations:
            tensors = operation.convert(
                tensors,
                source_patterns=rule.source_patterns,
                target_patterns=rule.target_patterns,
                full_layer_name=self.key,
                model=self.described,
                config=self.described.config,
                missing_keys=None,
            )
        # Operations know the part of a name that the rule speaks of; the rest is around it.
        whole = self.key.replace("*.", "0.")
        before, _, after = next(whole.partition(part) for part in tensors if part in whole)
        return {
            f"{before}{part}{after}": value[0] if isinstance(value, list) else value
            for part, value in tensors.items()
        }

    @property
    def rows_alone(self) -> bool:
        """Whether each operation leaves the first axis alone, so that rows need only theirs."""
        return all(map(_leaves_rows, self.rule.operations))

    @property
    def stacks(self) -> bool:
        """Whether the first operation stacks tensors, which then are the rows of what comes out."""
        first, *others = self.rule.operations
        return type(first).__name__ == "MergeModulelist" and all(map(_leaves_rows, others))

    @property
    def unstacks(self) -> bool:
        """Whether the last operation takes a stack apart, so that a result needs one row of it."""
        *others, last = self.rule.operations
        return type(last).__name__ == "SplitModulelist" and all(map(_leaves_rows, others))


def _leaves_rows(operation: Any) -> bool:
    axes = [getattr(operation, name) for name in _AXES if hasattr(operation, name)]
    return bool(axes) and min(axes) > 0


@dataclass(frozen=True)
class _Result:
    """One tensor of those that a conversion makes."""

    conversion: Conversion
    name: str
    place: int

    @property
    def used(self) -> tuple[str, ...]:
        return self.conversion.used

    @property
    def kept_bytes(self) -> int:
        return self.conversion.kept_bytes

    def read_rows(self, model: Checkpoint, keep: Kept, start: int, stop: int) -> Tensor:
        """Rows `start:stop`, of no more than they are made of where the operations allow."""
        whole = self.conversion

        def one_row(row: int) -> Callable[[TensorSpec], Tensor]:
            return lambda spec: model.read_rows(spec.name, row, row + 1)

        if whole.rows_alone:
            return whole.convert(lambda spec: model.read_rows(spec.name, start, stop))[self.name]
        if whole.stacks and stop > start:
            cut = {pattern: specs[start:stop] for pattern, specs in whole.sources.items()}
            part = Conversion(whole.rule, whole.key, cut, whole.described)
            return part.convert(lambda spec: model.read(spec.name))[self.name]
        if whole.unstacks:
            # Results are in the order of patterns, each with all rows; alone, a row is number 0.
            rows = next(iter(whole.sources.values()))[0].shape[0]
            pattern, row = divmod(self.place, rows)
            made = keep((whole, row), lambda: whole.convert(one_row(row)))
            return [*made.values()][pattern][start:stop]
        made = keep(whole, lambda: whole.convert(lambda spec: model.read(spec.name)))
        return made[self.name][start:stop]
