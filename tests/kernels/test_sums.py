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
