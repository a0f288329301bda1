"""Scores of answers against what is right, by scikit-learn and SciPy, behind names."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from personae.errors import RecipeError, nearest

Answers = np.ndarray
"""Classes (int64) or numbers (float32), one an example."""


@dataclass(frozen=True)
class Metric:
    """How answers are scored.

    Attributes:
        answers: What it scores.
        score: Answers and what is right to the score, a fraction rather than percent.
        two_classes: Whether it is of two classes only, the second being the one looked for.
        per_example: Whether it is a mean over the examples.
    """

    answers: Literal["classes", "numbers"]
    score: Callable[[Answers, Answers], float]
    two_classes: bool = False
    per_example: bool = False


def accuracy(answers: Answers, labels: Answers) -> float:
    """The fraction of examples answered right."""
    return float((answers == labels).mean())


def f1(answers: Answers, labels: Answers) -> float:
    """F1 of the second of two classes; 0 where it is neither answered nor right."""
    return _f1(answers, labels, "binary")


def f1_macro(answers: Answers, labels: Answers) -> float:
    """Mean of the F1 of all classes that are answered or right."""
    return _f1(answers, labels, "macro")


def _f1(answers: Answers, labels: Answers, average: str) -> float:
    metrics: Any = importlib.import_module("sklearn.metrics")
    return float(metrics.f1_score(labels, answers, average=average, zero_division=0.0))


def accuracy_f1(answers: Answers, labels: Answers) -> float:
    """Mean of accuracy and F1, GLUE's score of MRPC and QQP."""
    return (accuracy(answers, labels) + f1(answers, labels)) / 2


def matthews(answers: Answers, labels: Answers) -> float:
    """Matthews correlation, of two classes or more; 0 where one class is all there is.

    With s examples, c of them right, and p_k answered and t_k true ones of class k:
    (c s - Σ p_k t_k) / √((s² - Σ p_k²) (s² - Σ t_k²)) (Gorodkin 2004, eq. 8). By NumPy, as
    intervals ask for it a thousand times; scikit-learn's takes milliseconds.
    """
    kinds = int(max(answers.max(), labels.max())) + 1
    answered = np.bincount(answers, minlength=kinds).astype(float)
    true = np.bincount(labels, minlength=kinds).astype(float)
    examples, right = float(len(labels)), float((answers == labels).sum())
    spread = (examples**2 - answered @ answered) * (examples**2 - true @ true)
    return float((right * examples - answered @ true) / np.sqrt(spread)) if spread else 0.0


def pearson(answers: Answers, labels: Answers) -> float:
    """Pearson correlation; 0 where all are equal."""
    return _correlation("pearsonr", answers, labels)


def spearman(answers: Answers, labels: Answers) -> float:
    """Spearman correlation of ranks; 0 where all are equal."""
    return _correlation("spearmanr", answers, labels)


def pearson_spearman(answers: Answers, labels: Answers) -> float:
    """Mean of both correlations, GLUE's score of STS-B."""
    return (pearson(answers, labels) + spearman(answers, labels)) / 2


def _correlation(kind: str, answers: Answers, labels: Answers) -> float:
    if _constant(answers) or _constant(labels):
        return 0.0
    stats: Any = importlib.import_module("scipy.stats")
    return float(getattr(stats, kind)(answers, labels).statistic)


def _constant(values: Answers) -> bool:
    """Whether all are equal, so that nothing can go along with them."""
    return len(values) < 2 or bool((values == values[0]).all())


METRICS: Mapping[str, Metric] = {
    "accuracy": Metric("classes", accuracy, per_example=True),
    "f1": Metric("classes", f1, two_classes=True),
    "f1_macro": Metric("classes", f1_macro),
    "accuracy_f1": Metric("classes", accuracy_f1, two_classes=True),
    "matthews": Metric("classes", matthews),
    "pearson": Metric("numbers", pearson),
    "spearman": Metric("numbers", spearman),
    "pearson_spearman": Metric("numbers", pearson_spearman),
}

GLUE: Mapping[str, str] = {
    "cola": "matthews",
    "sst2": "accuracy",
    "mrpc": "accuracy_f1",
    "qqp": "accuracy_f1",
    "stsb": "pearson_spearman",
    "mnli": "accuracy",
    "qnli": "accuracy",
    "rte": "accuracy",
    "wnli": "accuracy",
}
"""GLUE's own choice for each task; papers often print the plain accuracy of MRPC, QQP and CoLA."""

_GLUE = "glue:"


def metric_name(text: str) -> str:
    """The name in `METRICS` that a text means, `glue:TASK` too.

    Raises:
        RecipeError: if there is none; the text suggests the nearest.
    """
    if text.startswith(_GLUE):
        task = text.removeprefix(_GLUE).replace("-", "").replace("_", "").lower()
        if task not in GLUE:
            raise RecipeError(f"GLUE has no task '{task}'. {nearest(task, GLUE)}")
        return GLUE[task]
    if text not in METRICS:
        raise RecipeError(f"Unknown metric '{text}'. {nearest(text, METRICS)}")
    return text


def check_fits(name: str, classes: int | None) -> None:
    """Refuse a metric that is not one of such answers.

    Args:
        name: Of the metric.
        classes: How many there are; None where numbers are predicted.

    Raises:
        RecipeError: if it is of other answers.
    """
    metric = METRICS[name]
    found = "numbers" if classes is None else "classes"
    if metric.answers != found:
        known = ", ".join(n for n, one in METRICS.items() if one.answers == found)
        raise RecipeError(
            f"The metric {name} scores {metric.answers}, and the task's answers are {found}. "
            f"Take one of {known}."
        )
    if metric.two_classes and classes != 2:
        raise RecipeError(
            f"The metric {name} is of two classes, and there are {classes}. Take f1_macro, "
            "matthews or accuracy."
        )
