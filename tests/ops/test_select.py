"""Selection by counting bits, against sorting."""

from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from personae.ops.select import (
    HIGH_BINS,
    LOW_BINS,
    count_high,
    count_low,
    find_bin,
    kept_count,
    kth_magnitude,
    magnitude,
)

floats = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True)
vectors = hnp.arrays(np.float32, st.integers(1, 40), elements=floats).map(torch.from_numpy)
tied_vectors = hnp.arrays(np.float32, st.integers(1, 40), elements=st.integers(-3, 3)).map(
    torch.from_numpy
)


def test_find_bin_counts_from_the_top():
    # Sorted down, bins 3 3 1 1 1 0: the 1st and 2nd lie in bin 3, the 4th is the 2nd in bin 1.
    counts = torch.tensor([1, 3, 0, 2])
    found = [find_bin(counts, k) for k in (1, 2, 3, 4, 6)]
    assert found == [(3, 1), (3, 2), (1, 1), (1, 2), (0, 1)]


@pytest.mark.parametrize(
    ("numel", "density", "count"),
    [(100, 0.29, 29), (100, 0.57, 57), (3, 0.2, 1), (9, 0.5, 4), (7, 1.0, 7), (0, 0.5, 0)],
)
def test_kept_count(numel: int, density: float, count: int):
    assert kept_count(numel, density) == count  # int(0.29 * 100) would be 28


@given(vectors | tied_vectors, st.data())
def test_kth_magnitude_is_what_sorting_finds(vector: torch.Tensor, data: st.DataObject):
    k = data.draw(st.integers(1, len(vector)))
    ordered = sorted(vector.abs().tolist(), reverse=True)
    value, tied = kth_magnitude(vector, k)
    assert value == ordered[k - 1]
    assert tied == k - sum(other > value for other in ordered)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_chunks_do_not_show(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    tensor = torch.randn(50, 21, generator=torch.Generator().manual_seed(0)).to(dtype).T
    whole = kth_magnitude(tensor, 315)
    monkeypatch.setattr("personae.ops.select._CHUNK", 17)
    assert kth_magnitude(tensor, 315) == whole
    assert whole[0] == tensor.abs().flatten().sort(descending=True).values[314]


@given(st.lists(vectors, min_size=1, max_size=4), st.randoms(use_true_random=False), st.data())
def test_a_stream_in_any_order_gives_the_same(
    tensors: list[torch.Tensor], random: Random, data: st.DataObject
):
    everything = torch.cat(tensors)
    k = data.draw(st.integers(1, len(everything)))
    random.shuffle(tensors)
    high_counts = torch.zeros(HIGH_BINS, dtype=torch.int64)
    low_counts = torch.zeros(LOW_BINS, dtype=torch.int64)
    for tensor in tensors:
        count_high(high_counts, tensor)
    high, rank = find_bin(high_counts, k)
    for tensor in reversed(tensors):
        count_low(low_counts, tensor, high)
    low, tied = find_bin(low_counts, rank)
    assert (magnitude(high, low), tied) == kth_magnitude(everything, k)
