"""Exact sums of magnitudes, against fractions."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from personae.ops.sums import magnitude_sums, total

floats = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True)
vectors = hnp.arrays(np.float32, st.integers(0, 30), elements=floats).map(torch.from_numpy)


def test_by_hand():
    # 1.5 and 1 have exponent field 127, significands 1.5 · 2^23 and 2^23; 2^-149 has 0 and 1.
    sums = magnitude_sums(torch.tensor([1.5, -1.0, 2.0**-149, 0.0]))
    found = {int(n): int(sums[n]) for n in sums.nonzero()}
    assert found == {127: 5 * 2**22, 0: 1}
    assert total(sums) == 2.5


@given(vectors, vectors)
def test_a_sum_in_parts_is_the_sum(first: torch.Tensor, second: torch.Tensor):
    both = torch.cat([first, second])
    sums = magnitude_sums(both)
    assert torch.equal(magnitude_sums(second) + magnitude_sums(first), sums)
    exact = sum((abs(Fraction(value)) for value in both.tolist()), Fraction(0))
    assert total(sums) == pytest.approx(float(exact), rel=1e-13)
