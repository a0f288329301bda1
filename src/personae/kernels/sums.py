"""Sums over the experts, in their order: how entries are cut into blocks changes nothing."""

import numpy as np
from numpy import ndarray

from personae.kernels._compile import kernel
from personae.kernels.stored import F32


@kernel
def weighted_sum(deltas: ndarray, weights: ndarray, total: ndarray) -> None:
    """Σ_n w_n τ_n; every product and every sum is rounded once."""
    first, weight = deltas[0], weights[0]
    for i in range(total.size):
        total[i] = first[i] * weight
    for n in range(1, deltas.shape[0]):
        row, weight = deltas[n], weights[n]
        for i in range(total.size):
            total[i] += row[i] * weight


@kernel
def multi_task_vector(deltas: ndarray, total: ndarray) -> None:
    """Σ_n τ_n in fp64."""
    total[:] = 0.0
    for n in range(deltas.shape[0]):
        row = deltas[n]
        for i in range(total.size):
            total[i] += np.float64(row[i])


@kernel
def keep_marked(
    deltas: ndarray,
    thresholds: ndarray,
    at_least: int,
    scale: float,
    total: ndarray,
    merged: ndarray,
) -> None:
    """Scale · τ_MTL where |τ_n| > threshold_n · |τ_MTL - τ_n| for at least so many experts.

    In fp64: near a threshold, the order of experts must not decide.
    """
    marks = np.zeros(total.size, np.int32)
    for n in range(deltas.shape[0]):
        row, threshold = deltas[n], thresholds[n]
        for i in range(total.size):
            value = np.float64(row[i])
            marks[i] += abs(value) > abs(total[i] - value) * threshold
    for i in range(total.size):
        merged[i] = F32(total[i] * scale * np.float64(marks[i] >= at_least))
