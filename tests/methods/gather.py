"""The plainest way to run a static method over a whole model: every tensor in memory."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from personae.methods import MERGE_METHODS, MERGEKIT_METHODS, MergeMethod, Site, build, lookup

EVERY_METHOD = [*sorted(MERGE_METHODS), *(f"mergekit/{name}" for name in sorted(MERGEKIT_METHODS))]


def find(name: str) -> type[MergeMethod]:
    """A method by its name; `mergekit/NAME` is theirs."""
    theirs = name.startswith("mergekit/")
    return lookup(MERGEKIT_METHODS if theirs else MERGE_METHODS, name.removeprefix("mergekit/"))


def settings_of(
    method: type[MergeMethod], settings: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Settings with a value for what has no default: mergekit wants every weight given."""
    fields = method.fields()
    required = {name: 1.0 for name, field in fields.items() if field.is_required()}
    return required | dict(settings or {})


def merge_model(
    method: str | type[MergeMethod],
    model: Sequence[Tensor] | Mapping[str, Tensor],
    settings: Mapping[str, Any] | None = None,
) -> list[Tensor]:
    """Merge a model given as stacked task vectors, one stack for each tensor, named or not."""
    method = find(method) if isinstance(method, str) else method
    built = build(method, settings_of(method, settings))
    named = model if isinstance(model, Mapping) else {f"{n}.weight": t for n, t in enumerate(model)}
    stacks = [(Site(name, tuple(stack.shape[1:])), stack) for name, stack in named.items()]
    if built.looks_at == "tensor":
        return [built.apply(stack, site=site) for site, stack in stacks]
    statistics = built.statistics(stacks)
    return [built.apply(stack, statistics, site) for site, stack in stacks]
