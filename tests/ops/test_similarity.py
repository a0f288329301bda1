"""Weights from embeddings: eq. 8 of the DTS paper, worked by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from personae.errors import MethodError
from personae.ops.similarity import cosines, mean_embedding, ratio_weights, softmax_weights


def test_directions_are_averaged_not_lengths():
    # (3, 4) -> (0.6, 0.8); (0, 10) -> (0, 1); their mean (0.3, 0.9) is not of unit length.
    found = mean_embedding(torch.tensor([[3.0, 4.0], [0.0, 10.0]]))
    torch.testing.assert_close(found, torch.tensor([0.3, 0.9], dtype=torch.float64))


def test_cosines_by_hand():
    # (1, 1)/√2 with (2, 0): 1/√2; with (0, 0): 0; with (-3, -3): -1; with (3, 4): 1.4/√2
    others = torch.tensor([[2.0, 0.0], [0.0, 0.0], [-3.0, -3.0], [3.0, 4.0]])
    expected = torch.tensor([1 / math.sqrt(2), 0, -1, 1.4 / math.sqrt(2)], dtype=torch.float64)
    torch.testing.assert_close(cosines(torch.tensor([1.0, 1.0]), others), expected)


def test_an_embedding_of_zeros_is_like_nothing():
    assert torch.equal(mean_embedding(torch.zeros(2, 3)), torch.zeros(3, dtype=torch.float64))
    assert torch.equal(cosines(torch.zeros(3), torch.ones(1, 3)), torch.zeros(1).double())


def test_eq_8_by_hand():
    # 0.6 + 0.3 + 0.1 = 1.0; then 0.4 + 0.4, the negative one clipped: 1/2, 0, 1/2
    exact = {"rtol": 0, "atol": 1e-15}
    even = ratio_weights(torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64))
    torch.testing.assert_close(even, torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64), **exact)
    clipped = ratio_weights(torch.tensor([0.4, -0.7, 0.4], dtype=torch.float64))
    torch.testing.assert_close(clipped, torch.tensor([0.5, 0, 0.5], dtype=torch.float64), **exact)


@pytest.mark.parametrize("similarities", [[-0.1, -0.5], [0.0, 0.0], [0.0, -1.0]])
def test_no_ratio_without_a_cosine_above_zero(similarities):
    with pytest.raises(MethodError, match=r"No cosine is above 0 .*softmax"):
        ratio_weights(torch.tensor(similarities))


def test_softmax_by_hand():
    # exp(0.2/0.1) : exp(0) = e² : 1
    found = softmax_weights(torch.tensor([0.2, 0.0]), 0.1)
    expected = [math.exp(2) / (math.exp(2) + 1), 1 / (math.exp(2) + 1)]
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_is_positive(temperature):
    with pytest.raises(MethodError, match="temperature"):
        softmax_weights(torch.tensor([0.2, 0.0]), temperature)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=9), st.floats(0.01, 100))
def test_weights_are_a_mixture_in_the_order_of_the_cosines(values, temperature):
    similarities = torch.tensor(values, dtype=torch.float64)
    found = [softmax_weights(similarities, temperature)]
    if max(values) > 0:
        found.append(ratio_weights(similarities))
    for weights in found:
        assert bool((weights >= 0).all())
        assert float(weights.sum()) == pytest.approx(1)
        order = torch.argsort(similarities, stable=True)
        assert bool((weights[order].diff() >= -1e-12).all())
