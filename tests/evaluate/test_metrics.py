"""Metrics: worked by hand, and against scikit-learn and SciPy."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("sklearn")

from personae.errors import RecipeError
from personae.evaluate.metrics import METRICS, check_fits, metric_name


def score(name: str, answers: list, labels: list) -> float:
    return METRICS[name].score(np.array(answers), np.array(labels))


def test_accuracy_hand_worked():
    assert score("accuracy", [1, 0, 2, 2], [1, 1, 2, 0]) == 0.5  # 2 of 4


def test_two_classes_hand_worked():
    answers, labels = [1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 1]
    # TP 2, FP 1, TN 2, FN 1: (2*2 - 1*1) / sqrt(3*3*3*3) = 3 / 9
    assert score("matthews", answers, labels) == pytest.approx(1 / 3)
    # 2 TP / (2 TP + FP + FN) = 4 / 6; of class 0: 2*2 / (2*2 + 1 + 1), the same
    assert score("f1", answers, labels) == pytest.approx(2 / 3)
    assert score("f1_macro", answers, labels) == pytest.approx(2 / 3)
    assert score("accuracy_f1", answers, labels) == pytest.approx((4 / 6 + 4 / 6) / 2)


def test_correlations_hand_worked():
    # Deviations (-1, 0, 1) and (-7/3, -4/3, 11/3): 6 / sqrt(2 * 186/9); ranks are the same.
    answers, labels = [1.0, 2.0, 3.0], [1.0, 2.0, 7.0]
    linear = 6 / np.sqrt(2 * 186 / 9)
    assert score("pearson", answers, labels) == pytest.approx(linear)
    assert score("spearman", answers, labels) == pytest.approx(1)
    assert score("pearson_spearman", answers, labels) == pytest.approx((linear + 1) / 2)


def test_what_never_varies_goes_along_with_nothing():
    assert score("matthews", [0, 0, 0, 0], [0, 1, 1, 0]) == 0
    for name in ("pearson", "spearman", "pearson_spearman"):
        assert score(name, [1.0, 1.0, 1.0], [0.0, 1.0, 2.0]) == 0
    assert score("f1", [0, 0], [0, 0]) == 0


pairs = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30)


@pytest.mark.filterwarnings("ignore:A single label was found")
@given(pairs)
def test_scores_are_scikit_learn_s(drawn: list[tuple[int, int]]):
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    answers, labels = map(list, zip(*drawn, strict=True))
    zero: Any = 0
    wanted = matthews_corrcoef(labels, answers)
    assert score("matthews", answers, labels) == pytest.approx(wanted, abs=1e-12)
    wanted = accuracy_score(labels, answers)
    assert score("accuracy", answers, labels) == pytest.approx(wanted, abs=1e-12)
    wanted = f1_score(labels, answers, average="macro", zero_division=zero)
    assert score("f1_macro", answers, labels) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(
    ("task", "name"),
    [("cola", "matthews"), ("STS-B", "pearson_spearman"), ("mrpc", "accuracy_f1")],
)
def test_glue_s_own_choice(task: str, name: str):
    assert metric_name(f"glue:{task}") == name


def test_unknown_metrics_name_the_nearest():
    with pytest.raises(RecipeError, match=r"Unknown metric 'acuracy'. Did you mean 'accuracy'?"):
        metric_name("acuracy")
    with pytest.raises(RecipeError, match=r"GLUE has no task 'colla'. Did you mean 'cola'?"):
        metric_name("glue:colla")


def test_metrics_of_other_answers_are_refused():
    with pytest.raises(RecipeError, match=r"pearson scores numbers.*answers are classes.*accuracy"):
        check_fits("pearson", 3)
    with pytest.raises(RecipeError, match=r"accuracy scores classes.*are numbers.*pearson"):
        check_fits("accuracy", None)
    with pytest.raises(RecipeError, match=r"f1 is of two classes, and there are 3. Take f1_macro"):
        check_fits("f1", 3)
    check_fits("f1", 2)
    check_fits("spearman", None)
