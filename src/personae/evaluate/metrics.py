"""Scores of predicted classes against true ones."""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

Metric = Literal["accuracy", "matthews"]


def accuracy(predictions: Int[Tensor, " example"], labels: Int[Tensor, " example"]) -> float:
    """Return the fraction of examples predicted right, in [0, 1]."""
    return (predictions == labels).double().mean().item()


def matthews(predictions: Int[Tensor, " example"], labels: Int[Tensor, " example"]) -> float:
    """Return the Matthews correlation, in [-1, 1], for two classes or more.

    With s examples, c of them right, and p_k predicted and t_k true ones of class k:
    (c s - Σ p_k t_k) / √((s² - Σ p_k²) (s² - Σ t_k²)); 0 where one class is all there is
    (Gorodkin 2004, eq. 8). CoLA is scored by it.
    """
    kinds = int(torch.maximum(predictions.max(), labels.max())) + 1
    predicted = torch.bincount(predictions, minlength=kinds).double()
    true = torch.bincount(labels, minlength=kinds).double()
    examples, right = float(len(labels)), float((predictions == labels).sum())
    spread = (examples**2 - predicted @ predicted) * (examples**2 - true @ true)
    if spread == 0:
        return 0.0
    return ((right * examples - predicted @ true) / spread.sqrt()).item()


METRICS: dict[Metric, Callable[[Tensor, Tensor], float]] = {
    "accuracy": accuracy,
    "matthews": matthews,
}
