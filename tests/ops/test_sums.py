"""Exact sums of magnitudes, against fractions."""

from fractions import Fraction

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from personae.ops.sums import magnitude_sums, total

floats = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True)
vectors = hnp.arrays(np.float32, st.integers(0, 30), elements=floats).map(torch.from_numpy)


def test_by_hand():
    # 1.5 and 1 have exponent field 127: units of 2^(112 - 150), 5 · 2^37 of them, whose 26 low bits
    # are 0: 5 · 2^11 units of 2^(138 - 150). 2^-149 is one unit at field 1.
    sums = magnitude_sums(torch.tensor([1.5, -1.0, 2.0**-149, 0.0]))
    found = {int(n): int(sums[n]) for n in sums.nonzero()}
    assert found == {138: 5 * 2**11, 1: 1}
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
