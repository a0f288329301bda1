"""How sure an average over tasks is: bootstrap intervals over examples."""

from collections.abc import Mapping, Sequence

import numpy as np

from personae.evaluate.metrics import METRICS, Answers

RESAMPLES = 1000
CONFIDENCE = 0.95


def bootstrap_interval(
    answers: Mapping[str, Answers],
    labels: Mapping[str, Answers],
    metrics: Mapping[str, str],
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> tuple[float, float]:
    """The interval of the average score over tasks, by the bootstrap's percentiles.

    The examples of each task are drawn anew with replacement, as many as there are; the average is
    that of the tasks' scores. Of one seed every method sees the same draws.

    Args:
        answers: Task name to a method's answers.
        labels: The same of what is right.
        metrics: The same of the metric's name.
        resamples: How often examples are drawn.
        confidence: How often the interval holds the average.
        seed: Of the draws.

    Returns:
        Its ends, as fractions.
    """
    averages = np.mean(
        [
            _resampled(given, labels[task], metrics[task], resamples, [seed, n])
            for n, (task, given) in enumerate(answers.items())
        ],
        axis=0,
    )
    low, high = np.quantile(averages, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _resampled(
    answers: Answers, labels: Answers, metric: str, resamples: int, seed: Sequence[int]
) -> np.ndarray:
    """A task's score on each resample."""
    generator, count = np.random.default_rng(list(seed)), len(labels)
    measure = METRICS[metric]
    scores = np.empty(resamples)
    each = answers == labels if measure.per_example else None
    for n in range(resamples):
        drawn = generator.integers(0, count, count)
        scores[n] = (
            measure.score(answers[drawn], labels[drawn]) if each is None else each[drawn].mean()
        )
    return scores
