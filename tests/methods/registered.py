"""Every merge method, with what a test needs to call it."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from torch import Tensor

from personae import merge_state_dicts
from personae.methods import MERGE_METHODS, MERGEKIT_METHODS, MergeMethod, build, lookup

EVERY_METHOD = [*MERGE_METHODS.values(), *MERGEKIT_METHODS.values()]
every_method = pytest.mark.parametrize(
    "cls", EVERY_METHOD, ids=lambda cls: f"{cls.conventions}-{cls.name}"
)


def method_of(cls: type[MergeMethod], **parameters: Any) -> MergeMethod:
    """A method; what has no default, as mergekit's weights have none, is 1."""
    required = {name: 1.0 for name, field in cls.fields().items() if field.is_required()}
    return build(cls, required | parameters)


def mergekits(name: str, **parameters: Any) -> MergeMethod:
    """mergekit's method of this name."""
    return method_of(lookup(MERGEKIT_METHODS, name), **parameters)


def merged_as_model(
    method: MergeMethod, stacks: Sequence[Tensor] | Mapping[str, Tensor]
) -> list[Tensor]:
    """Merge task vectors of several tensors as one model, whose base is 0.

    Args:
        method: The method with its parameters.
        stacks: (expert, *shape) of each tensor, named or not.
    """
    named = stacks
    if not isinstance(named, Mapping):
        named = {f"{number}.weight": stack for number, stack in enumerate(named)}
    base = {name: stack[0].new_zeros(stack.shape[1:]) for name, stack in named.items()}
    count = len(next(iter(named.values())))
    experts = [{name: stack[n] for name, stack in named.items()} for n in range(count)]
    merged = merge_state_dicts(base, experts, method)
    return [merged[name] for name in named]
