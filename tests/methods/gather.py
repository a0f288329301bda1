"""The plainest way to run a static method over a whole model: every tensor in memory."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from personae.methods import MERGE_METHODS, build, lookup


def merge_model(
    name: str, model: Sequence[Tensor], settings: Mapping[str, Any] | None = None
) -> list[Tensor]:
    """Merge a model given as stacked task vectors, one stack for each tensor."""
    method = lookup(MERGE_METHODS, name)
    parameters = build(method, settings or {})
    statistics: dict[str, Tensor] = {}
    for step in method.passes(parameters):
        state = step.start(len(model[0]))
        for task_vectors in model:
            state = step.update(state, task_vectors, parameters, statistics)
        statistics[step.name] = step.finish(state, parameters, statistics)
    return [method.merge(task_vectors, parameters, statistics) for task_vectors in model]
