import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from personae.evaluate.metrics import accuracy, matthews


def test_accuracy_hand_worked():
    assert accuracy(torch.tensor([1, 0, 2, 2]), torch.tensor([1, 1, 2, 0])) == 0.5  # 2 of 4


def test_matthews_hand_worked_two_classes():
    predictions = torch.tensor([1, 1, 1, 0, 0, 0])
    labels = torch.tensor([1, 1, 0, 0, 0, 1])
    # TP 2, FP 1, TN 2, FN 1: (2*2 - 1*1) / sqrt(3*3*3*3) = 3 / 9
    assert matthews(predictions, labels) == pytest.approx(1 / 3)


def test_matthews_is_zero_when_one_class_is_predicted():
    assert matthews(torch.zeros(4, dtype=torch.long), torch.tensor([0, 1, 1, 0])) == 0.0


pairs = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30)


@pytest.mark.filterwarnings("ignore:A single label was found")
@given(pairs)
def test_matthews_equals_scikit_learn(answers: list[tuple[int, int]]):
    metrics = pytest.importorskip("sklearn.metrics")
    predictions, labels = map(list, zip(*answers, strict=True))
    ours = matthews(torch.tensor(predictions), torch.tensor(labels))
    assert ours == pytest.approx(metrics.matthews_corrcoef(labels, predictions), abs=1e-12)
