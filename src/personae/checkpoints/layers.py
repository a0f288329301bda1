"""A model seen with other layers: some of its own, under the numbers they have in the output.

This is what stacking is made of. In a view, output layer k is layer j of the model, and what lies
outside the layers (the embeddings before them, the last norm and the output layer after them) is
there or not. A slice of a model is so a checkpoint as any other: it is aligned, merged, planned and
resumed by the names that come out, and slices whose numbers follow each other make one model.

What the layers are, names and config.json say; no model is built. They are the modules of a list,
`model.layers.3.`, numbered from 0 without gaps, as many as config.json counts. A model may have
several such stacks (an encoder and a decoder): its modules. What belongs to which is told by how
much of their names agree. What only the first layer has beside all that others have (T5's
`relative_attention_bias`) is what the first layer of the output has, whichever layer that is.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from personae._types import TensorSpec
from personae.checkpoints._protocol import Checkpoint
from personae.checkpoints.configuration import CONFIG
from personae.checkpoints.layer_configuration import layer_counts
from personae.checkpoints.modules import WithModules, read_auxiliary_file
from personae.checkpoints.specs import by_name, no_such_tensor
from personae.checkpoints.tied import WithCopies, still_tied
from personae.checkpoints.vocabulary_rows import WithRows
from personae.errors import CheckpointError

Reach = Literal["none", "module", "model"]
"""What of the tensors outside the layers is in a view: none, those of the stack's own module, or
those of no module too."""

_BEFORE = re.compile(
    r"embed|(^|\.)(wte|wpe|shared)\.|word_emb|pre_la?y|layernorm_pre|ln_pre|project_in|patch"
    r"|(cls|mask|class)_(token|emb)|position|(^|\.)conv\d?\."
)
"""Names of what comes before the first layer; all else outside the layers comes after the last."""

_DEFAULT = "default"
"""What recipes call the one module of a model that has one stack."""


@dataclass(frozen=True)
class Stack:
    """The layers of a model, or of a module of it.

    Attributes:
        prefix: What their names begin with, such as `model.layers.`.
        suffixes: What follows the number, of each layer.
    """

    prefix: str
    suffixes: Sequence[frozenset[str]]

    def __len__(self) -> int:
        """How many layers there are."""
        return len(self.suffixes)

    @property
    def name(self) -> str:
        """What a person may call it by."""
        return self.prefix.rstrip(".")

    def tensor(self, layer: int, suffix: str) -> str:
        """The name of a tensor of one layer."""
        return f"{self.prefix}{layer}.{suffix}"

    @cached_property
    def of_first(self) -> frozenset[str]:
        """What only the first layer has, beside all that another one has."""
        first, others = self.suffixes[0], self.suffixes[1:]
        own = first.difference(*others)
        return own if own and first - own in others else frozenset()

    def agreement(self, name: str) -> int:
        """How many of its first modules a tensor shares with the layers."""
        pairs = zip(name.split("."), self.prefix.split("."), strict=False)
        return len([*takewhile(lambda pair: pair[0] == pair[1], pairs)])


def stacks_of(model: Checkpoint) -> list[Stack]:
    """Every stack of layers that a model has.

    Raises:
        CheckpointError: if it has none, or none of as many layers as config.json says.
    """
    found = _lists(model.specs)
    if not found:
        raise CheckpointError(
            f"{model.source} has no layers: no tensor has a number in its name. Merge it as a "
            "whole, under 'models'."
        )
    config = read_auxiliary_file(model.auxiliary_files, CONFIG)
    if not isinstance(config, dict):
        return found
    counts = layer_counts(config)
    counted = [stack for stack in found if len(stack) in counts.values()]
    if not counted:
        said = ", ".join(f"{key} {count}" for key, count in counts.items()) or "no number of layers"
        lists = ", ".join(f"{len(stack)} in {stack.name}" for stack in found)
        raise CheckpointError(
            f"{model.source}: its config.json says {said}, its tensors are of other numbers of "
            f"layers ({lists}). Layers that cannot be told cannot be taken: merge the model as a "
            "whole, under 'models'."
        )
    return counted


def stack_of(model: Checkpoint, module: str | None = None) -> tuple[Stack, list[Stack]]:
    """The stack of a module, and all that the model has.

    Args:
        model: The model.
        module: A part of the names of the stack; None where there is one stack.

    Raises:
        CheckpointError: if there is no such, or more than one.
    """
    stacks = stacks_of(model)
    if module is None or (module == _DEFAULT and len(stacks) == 1):
        found = stacks
    else:
        found = [stack for stack in stacks if _is_called(stack, module)]
    if len(found) == 1:
        return found[0], stacks
    known = ", ".join(f"{stack.name} ({len(stack)} layers)" for stack in stacks)
    if module is None:
        raise CheckpointError(
            f"{model.source} has {len(stacks)} stacks of layers: {known}. Say which slices are of "
            "which: put them under 'modules', with the name of each."
        )
    raise CheckpointError(
        f"{model.source} has {'no' if not found else 'more than one'} module '{module}'. It has "
        f"{known}."
    )


def layers_of(checkpoint: Checkpoint) -> "WithLayers | None":
    """The view that chooses layers, whatever it is seen through; None if there is none."""
    model: Checkpoint | None = checkpoint
    while isinstance(model, WithRows | WithModules | WithCopies):
        model = model.model
    return model if isinstance(model, WithLayers) else None


class WithLayers:
    """A checkpoint seen with some of its layers, under other numbers.

    Attributes:
        model: The checkpoint as it is.
        stack: Its layers.
        layers: Number in the output to the layer's own.
        module: What the stack is called in the recipe; None where the model has one.
    """

    def __init__(
        self,
        model: Checkpoint,
        layers: range,
        *,
        first: int = 0,
        before: Reach = "model",
        after: Reach = "model",
        module: str | None = None,
        beside: "WithLayers | None" = None,
    ) -> None:
        """Choose layers; reads nothing.

        Args:
            model: The checkpoint.
            layers: Its own layers.
            first: The number of the first one in the output.
            before: What there is of what comes before the layers.
            after: What there is of what comes after them.
            module: The stack they are of.
            beside: The view of the base that an adapter is on.

        Raises:
            CheckpointError: if there is no such stack.
        """
        self.model, self.module = model, module
        self.stack, stacks = stack_of(model, module)
        self.layers = dict(enumerate(layers, first))
        self.source, self.revision = model.source, model.revision
        self.auxiliary_files: Mapping[str, Path] = model.auxiliary_files
        self._as_base = beside is None or beside.layers == self.layers
        self._own = self._names(stacks, before, after)
        self.specs: Mapping[str, TensorSpec] = by_name(
            replace(model.specs[own], name=name) for name, own in self._own.items()
        )
        self.tied: Mapping[str, str] = self._ties()
        self.copies: Mapping[str, torch.dtype] = still_tied(model.copies, self.tied)

    def _names(self, stacks: Sequence[Stack], before: Reach, after: Reach) -> dict[str, str]:
        """Name in the view to name in the model."""
        stack = self.stack
        names = {
            stack.tensor(number, suffix): stack.tensor(own, suffix)
            for number, own in self.layers.items()
            for suffix in stack.suffixes[own] - stack.of_first
        }
        if 0 in self.layers:
            names |= {name: name for name in (stack.tensor(0, s) for s in stack.of_first)}
        for name in self.model.specs:
            reach = before if _BEFORE.search(name) else after
            if _stack_with(name, stacks) is None and _is_reached(name, stack, stacks, reach):
                names[name] = name
        return names

    def _ties(self) -> dict[str, str]:
        """Ties whose kept tensor is in the view, and where they are in one layer, in each."""
        ties: dict[str, str] = {}
        for dropped, kept in self.model.tied.items():
            if kept in self.specs and not dropped.startswith(self.stack.prefix):
                ties[dropped] = kept
            for number, own in self.layers.items():
                was, is_ = (self.stack.tensor(layer, "") for layer in (own, number))
                if dropped.startswith(was) and kept.startswith(was):
                    ties[is_ + dropped.removeprefix(was)] = is_ + kept.removeprefix(was)
        return ties

    def read(self, name: str) -> Tensor:
        """Return one tensor; see `Checkpoint.read`."""
        return self.model.read(self._name(name))

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows `start:stop`; see `Checkpoint.read_rows`."""
        return self.model.read_rows(self._name(name), start, stop)

    def factors(
        self, name: str
    ) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]] | None:
        """Those of an adapter, where its base is seen with the same layers."""
        return self.model.factors(self._name(name)) if self._as_base else None

    def same_as_base(self, name: str) -> bool:
        """Whether it is the base's own; known where that is seen with the same layers."""
        return self._as_base and self.model.same_as_base(self._name(name))

    def close(self) -> None:
        """Close the model."""
        self.model.close()

    def _name(self, name: str) -> str:
        return self._own.get(name) or no_such_tensor(self.source, name, self.specs)


def _lists(specs: Mapping[str, TensorSpec]) -> list[Stack]:
    """Lists of modules, numbered from 0 without gaps; of nested ones the outer."""
    found: dict[str, dict[int, set[str]]] = {}
    for name in specs:
        parts = name.split(".")
        at = next((n for n, part in enumerate(parts[:-1]) if part.isdecimal()), None)
        if at is not None:
            prefix = "".join(f"{part}." for part in parts[:at])
            layer = found.setdefault(prefix, {}).setdefault(int(parts[at]), set())
            layer.add(".".join(parts[at + 1 :]))
    return [
        Stack(prefix, [frozenset(layers[n]) for n in range(len(layers))])
        for prefix, layers in found.items()
        if layers.keys() == set(range(len(layers)))
    ]


def _stack_with(name: str, stacks: Sequence[Stack]) -> Stack | None:
    """The stack that a tensor is a layer's of."""
    return next((s for s in stacks if name.startswith(s.prefix)), None)


def _is_reached(name: str, stack: Stack, stacks: Sequence[Stack], reach: Reach) -> bool:
    """Whether a tensor outside the layers is one of this stack's, as far as `reach` goes."""
    if reach == "none":
        return False
    if len(stacks) == 1:
        return True
    most = max(one.agreement(name) for one in stacks)
    nearest = [one for one in stacks if one.agreement(name) == most]
    return nearest == [stack] if len(nearest) == 1 else reach == "model"


def _is_called(stack: Stack, module: str) -> bool:
    """Whether a recipe's name for a module means this stack."""
    sees = "vis" in stack.prefix
    if "vis" in module or {"text", "language"} & {*module.split("_")}:
        return sees == ("vis" in module)
    return module == stack.name or module in stack.name.split(".")
