"""The plainest way to run a static method over a whole model: every tensor in memory."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from personae.methods import MERGE_METHODS, MergeMethod, Site, build, lookup


def merge_model(
    method: str | MergeMethod,
    model: Sequence[Tensor] | Mapping[str, Tensor],
    settings: Mapping[str, Any] | None = None,
) -> list[Tensor]:
    """Merge a model given as stacked task vectors, one stack for each tensor, named or not."""
    method = lookup(MERGE_METHODS, method) if isinstance(method, str) else method
    parameters = build(method, settings or {})
    named = model if isinstance(model, Mapping) else {f"{n}.weight": t for n, t in enumerate(model)}
    stacks = [(Site(name, tuple(stack.shape[1:])), stack) for name, stack in named.items()]
    if getattr(parameters, "scope", "model") == "tensor":
        return [method.merge(stack, parameters, site=site) for site, stack in stacks]
    statistics = method.statistics(stacks, parameters)
    return [method.merge(stack, parameters, statistics, site) for site, stack in stacks]
