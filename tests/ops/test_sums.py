"""Exact sums of magnitudes, against fractions."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from personae import kernels
from personae.ops.sums import SUM_BINS, absolute_sum, squared_norm, total

floats = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True)
vectors = hnp.arrays(np.float32, st.integers(0, 30), elements=floats).map(torch.from_numpy)


def magnitude_sums(entries: torch.Tensor) -> torch.Tensor:
    sums = np.zeros(SUM_BINS, np.int64)
    kernels.sum_magnitudes(entries.numpy(), sums)
    return torch.from_numpy(sums)


def test_by_hand():
    # 1.5 and 1 have exponent field 127: units of 2^(127 - 150), 5 · 2^22 of them. 2^-149 is one
    # unit at field 1.
    sums = magnitude_sums(torch.tensor([1.5, -1.0, 2.0**-149, 0.0]))
    found = {int(n): int(sums[n]) for n in sums.nonzero()}
    assert found == {127: 5 * 2**22, 1: 1}
    assert total(sums) == 2.5


@given(vectors, vectors)
def test_a_sum_in_parts_is_the_sum(first: torch.Tensor, second: torch.Tensor):
    both = torch.cat([first, second])
    exact = float(sum((abs(Fraction(value)) for value in both.tolist()), Fraction(0)))
    assert total(magnitude_sums(both)) == exact
    assert total(magnitude_sums(second) + magnitude_sums(first)) == exact


def test_a_long_stream():
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).exp()
    exact = sum(map(Fraction, values.tolist()), Fraction(0))
    assert total(magnitude_sums(values)) == float(exact)


def test_sums_in_fp64_by_hand():
    # In fp32 2^24 + 1 is 2^24: |3| + |-4| + 2^24 + 1 = 16777224; 9 + 16 + 2^48 + 1.
    values = torch.tensor([[3.0, -4.0], [2.0**24, 1.0]])
    for tensor in (values, values.mT):
        assert absolute_sum(tensor) == 2**24 + 8
        assert squared_norm(tensor) == 2**48 + 26
    assert absolute_sum(torch.zeros(0, 3)) == squared_norm(torch.zeros(0, 3)) == 0


def test_sums_in_fp64_of_more_than_one_chunk():
    values = torch.randn(3, 100_001, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = [Fraction(value) for value in values.flatten().tolist()]
    assert absolute_sum(values) == pytest.approx(float(sum(map(abs, exact))), rel=1e-14)
    assert squared_norm(values) == pytest.approx(float(sum(x * x for x in exact)), rel=1e-14)
