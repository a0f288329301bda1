"""Sums over experts and entries, against NumPy in fp64."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from personae import kernels

shapes = st.tuples(st.integers(1, 4), st.integers(0, 3), st.integers(0, 200))
vectors = shapes.flatmap(
    lambda shape: hnp.arrays(np.float32, shape, elements=st.integers(-1000, 1000))
)


def test_inner_products_by_hand():
    # Of (1, 2) and (3, -1): 1·1 + 2·2 = 5, 1·3 - 2·1 = 1, 3·3 + 1·1 = 10; beside what was there.
    models = np.array([[[1, 2]], [[3, -1]]], np.float32)
    gram = np.ones((1, 2, 2))
    kernels.add_inner_products(models, gram)
    assert gram.tolist() == [[[6, 2], [2, 11]]]


@given(vectors)
def test_inner_products_of_rows(models: np.ndarray):
    gram = np.zeros((models.shape[1], len(models), len(models)))
    kernels.add_inner_products(models, gram)
    exact = models.astype(np.int64)
    assert np.array_equal(gram, np.einsum("nre,mre->rnm", exact, exact))


def test_products_are_not_rounded_to_fp32():
    # (2^24 + 2)² = 2^48 + 2^26 + 4, whose last term fp32 would lose.
    models = np.full((1, 1, 1), 2**24 + 2, np.float32)
    gram = np.zeros((1, 1, 1))
    kernels.add_inner_products(models, gram)
    assert gram.item() == 2**48 + 2**26 + 4


def test_deviations_by_hand():
    # Of 1, 3, 5 about 3: ((-2)² + 0 + 2²) / 3 = 8/3; of equal entries 0.
    found = np.empty(2, np.float32)
    kernels.deviations(np.array([[1, 7], [3, 7], [5, 7]], np.float32), found)
    assert found.tolist() == [np.float32(np.sqrt(8 / 3)), 0]


@given(
    hnp.arrays(
        np.float32, st.tuples(st.integers(1, 5), st.integers(0, 70)), elements=st.integers(-99, 99)
    )
)
def test_deviations_of_many(deltas: np.ndarray):
    found = np.empty(deltas.shape[1], np.float32)
    kernels.deviations(deltas, found)
    np.testing.assert_allclose(found, deltas.astype(np.float64).std(axis=0), rtol=1e-6, atol=1e-12)


def test_what_is_far_apart_is_kept():
    # Means 2, 1 and 0; squares apart 1 + 1, 9 + 9 and 4 + 4.
    deltas = np.array([[1, -2, 2], [3, 4, -2]], np.float32)
    kernels.keep_apart(deltas, 8.0)
    assert deltas.tolist() == [[0, -2, 2], [0, 4, -2]]
