"""Layers of a family's models, and what config.json says where such families are stacked.

Of each model of a family some layers are taken, as many of each; `choose` gives the views. Families
whose layers follow each other make one model: `stacked_config` says what it is, or why it is none.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from personae.checkpoints import Checkpoint
from personae.checkpoints.adapter import adapter_of
from personae.checkpoints.configuration import CONFIG
from personae.checkpoints.layer_configuration import Origin, kinds, with_layers
from personae.checkpoints.layers import Reach, Stack, WithLayers, layers_of, stack_of
from personae.checkpoints.modules import read_auxiliary_file
from personae.checkpoints.tied import each_once
from personae.errors import CheckpointError, Faults

Span = tuple[int, int]
"""Layers from one up to another, without that."""


@dataclass(frozen=True)
class Layers:
    """Which layers of a family's models are merged, and what they are in the output.

    Attributes:
        experts: Of each expert, in order; None: all it has.
        base: Of the base; None: all it has.
        first: Number in the output of the first one.
        module: The stack they are of; None where models have one.
        before: What there is of what comes before the layers.
        after: What there is of what comes after them.
    """

    experts: tuple[Span | None, ...]
    base: Span | None = None
    first: int = 0
    module: str | None = None
    before: Reach = "model"
    after: Reach = "model"


def choose(
    reference: Checkpoint | None, experts: Mapping[str, Checkpoint], layers: Layers
) -> tuple[Checkpoint | None, dict[str, Checkpoint]]:
    """Base and experts with the layers that are taken of them.

    Raises:
        CheckpointError: naming each model that has no such layers.
    """
    faults = Faults()
    base = None
    if reference is not None:
        base = _view("The base", reference, layers.base, layers, None, faults)
    seen = {
        name: _view(f"Expert '{name}'", model, span, layers, base, faults)
        for (name, model), span in zip(experts.items(), layers.experts, strict=True)
    }
    models = {"The base": base, **{f"Expert '{name}'": view for name, view in seen.items()}}
    counts = {label: len(view.layers) for label, view in models.items() if view}
    if len({*counts.values()}) > 1:
        told = ", ".join(f"{label} {count}" for label, count in counts.items())
        faults.add(f"As many layers of each model are merged, but there are: {told}.")
    faults.raise_if_any(CheckpointError)
    return base, {name: view for name, view in seen.items() if view is not None}


def _view(
    label: str,
    model: Checkpoint,
    span: Span | None,
    layers: Layers,
    base: WithLayers | None,
    faults: Faults,
) -> WithLayers | None:
    try:
        once = model if adapter_of(model) else each_once(model)
        stack, _ = stack_of(once, layers.module)
        start, stop = span or (0, len(stack))
        if stop > len(stack):
            raise CheckpointError(
                f"layers {start} to {stop} are asked for, but {model.source} has {len(stack)}: "
                f"layer_range goes to {len(stack)} at most (the second number is not among them)."
            )
        return WithLayers(
            once,
            range(start, stop),
            first=layers.first,
            before=layers.before,
            after=layers.after,
            module=layers.module,
            beside=base,
        )
    except CheckpointError as error:
        for text in error.faults or (str(error),):
            faults.add(f"{label}: {text}")
        return None


def stacked_config(
    config: dict[str, Any] | None,
    donor: Checkpoint,
    models: Iterable[Checkpoint],
    faults: Faults,
) -> dict[str, Any] | None:
    """What config.json says of models stacked on each other.

    Args:
        config: What it says but for the layers; None if there is none.
        donor: The model whose configuration it is.
        models: Views of models with the layers that come out, in their order.
        faults: Gets what cannot be said, and layers that cannot be where they would be.

    Returns:
        The configuration; None if there is none.
    """
    views = [view for view in map(layers_of, models) if view is not None]
    for module in dict.fromkeys(view.module for view in views):
        mine = [view for view in views if view.module == module]
        _check_places(mine, faults)
        if config is None:
            continue
        stack, _ = _stack_of_donor(donor, module)
        origins = [
            Origin(view.source, _config_of(view), len(view.stack), own)
            for view in mine
            for own in view.layers.values()
        ]
        config = with_layers(config, stack.prefix, len(stack), origins, faults)
    return config


def _stack_of_donor(donor: Checkpoint, module: str | None) -> tuple[Stack, list[Stack]]:
    """The stack of a model, or of what is seen with some of its layers."""
    view = layers_of(donor)
    return stack_of(donor if view is None else view.model, module)


def _config_of(view: WithLayers) -> Mapping[str, Any]:
    config = read_auxiliary_file(view.auxiliary_files, CONFIG)
    return config if isinstance(config, dict) else {}


def _check_places(views: Sequence[WithLayers], faults: Faults) -> None:
    """Layers whose names, sizes or place do not let them stand where they would."""
    first = views[0]
    last = sum(len(view.layers) for view in views) - 1
    for view in views:
        if view.stack.prefix != first.stack.prefix:
            faults.add(
                f"{view.source} calls its layers '{view.stack.name}', {first.source} "
                f"'{first.stack.name}'. Models that are stacked have the same names: save both "
                "with the same class."
            )
            continue
        odd = _unlike_others(view.stack, _config_of(view))
        ends = {number: own for number, own in ((0, 0), (last, len(view.stack) - 1)) if own in odd}
        for number, own in view.layers.items():
            if ends.get(number, own) != own or (own in odd and ends.get(number) != own):
                faults.add(
                    f"{view.source}: layer {ends.get(number, own)} has other tensors than the "
                    f"others of its kind, and cannot be in another place. Here layer {own} would "
                    f"be layer {number} of the output."
                )
        if [*view.layers.items()] != [(n, n) for n in range(len(view.stack))]:
            _check_sizes(view, faults)


def _unlike_others(stack: Stack, config: Mapping[str, Any]) -> set[int]:
    """Layers that have other tensors than most that are, by the configuration, of their kind."""
    told = kinds(config, stack.prefix, len(stack))
    own = [suffixes - stack.of_first for suffixes in stack.suffixes]
    odd: set[int] = set()
    for kind in {*told}:
        alike = [n for n in range(len(stack)) if told[n] == kind]
        having = [own[n] for n in alike]
        usual = max(reversed(having), key=having.count)
        odd |= {n for n in alike if own[n] != usual}
    return odd


def _check_sizes(view: WithLayers, faults: Faults) -> None:
    """Layers of different sizes, as the stages of a pyramid are."""
    specs, stack = view.model.specs, view.stack
    for suffix in sorted(frozenset[str]().union(*stack.suffixes)):
        shapes = {
            specs[stack.tensor(n, suffix)].shape: n
            for n in reversed(range(len(stack)))
            if suffix in stack.suffixes[n]
        }
        if len(shapes) > 1:
            told = ", ".join(f"{shape} in layer {n}" for shape, n in shapes.items())
            faults.add(
                f"The layers of {view.source} are of different sizes ('{suffix}' is {told}). They "
                "can only be taken all, in their order."
            )
            return
