"""The reference point below every method: one average of all experts, each task's own head."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from personae.evaluate.evaluation import evaluate_model
from personae.evaluate.models import load_model
from personae.evaluate.tasks import Task


def evaluate_averaged(experts: Mapping[str, Path], tasks: Sequence[Task]) -> dict[str, float]:
    """Score the weight average of the experts' encoders on every task.

    θₘ = (1/N) Σ θₙ over the floating tensors of the encoder, summed in fp64; what lies outside
    the encoder, the head, stays the task's own.

    Args:
        experts: Task name to checkpoint directory.
        tasks: The tasks to score; all of them are averaged.

    Returns:
        Task name to score.
    """
    sums: dict[str, Tensor] = {}
    for task in tasks:
        for name, tensor in _encoder(load_model(experts[task.name], task.model_class)).items():
            sums[name] = sums[name] + tensor.double() if name in sums else tensor.double()
    merged = {name: (total / len(tasks)).float() for name, total in sums.items()}
    scores: dict[str, float] = {}
    for task in tasks:
        model = load_model(experts[task.name], task.model_class)
        own = _encoder(model)
        with torch.no_grad():
            for name, tensor in merged.items():
                own[name].copy_(tensor)
        scores[task.name] = evaluate_model(model, task)
    return scores


def _encoder(model: nn.Module) -> dict[str, Tensor]:
    """Return the floating tensors of the encoder, without the head, by name."""
    encoder: nn.Module = model.base_model  # pyright: ignore[reportAssignmentType]
    return {n: t for n, t in encoder.state_dict().items() if t.is_floating_point()}
