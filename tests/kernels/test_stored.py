"""Values in their own dtype: every bf16 and fp16 there is, and roundings, beside PyTorch's."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from personae import kernels
from personae.methods import ROUNDS_TO_INFINITY, as_stored

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
dtypes = pytest.mark.parametrize("dtype", DTYPES)
INFINITY = 0x7F80_0000


def bits(values: np.ndarray) -> np.ndarray:
    return values.view(np.uint32)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_every_number_of_16_bits_is_read(dtype: torch.dtype):
    all_there_are = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    found = np.empty(2**16, np.float32)
    kernels.widen(as_stored(all_there_are), found)
    expected = all_there_are.float().numpy()
    is_number = ~np.isnan(expected)
    assert np.array_equal(bits(found)[is_number], bits(expected)[is_number])
    assert np.isnan(found[~is_number]).all()


@dtypes
def test_numbers_are_rounded_to_nearest_ties_to_even(dtype: torch.dtype):
    """Random bits, halves between neighbours of each dtype, and theirs one bit beside."""
    draw = np.random.default_rng(0)
    anything = draw.integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32)
    halves = [np.arange(2**16, dtype=np.uint32) << 16 | 0x8000]
    halves.append(np.arange(2**19, dtype=np.uint32) << 13 | 0x1000)
    patterns = np.concatenate([anything, *halves, *(h + 1 for h in halves)])
    # fp16 is subnormal from 2^-24 to 2^-14, in steps of 2^-24.
    steps = (np.arange(2**12) / 2 * 2.0**-24).astype(np.float32)
    values = np.concatenate([patterns.view(np.float32), steps, -steps])
    values = values[~np.isnan(values)]
    found = torch.empty(len(values), dtype=dtype)
    kernels.store(values, as_stored(found))
    expected = torch.from_numpy(values).to(dtype)
    assert np.array_equal(as_stored(found).view(np.uint8), as_stored(expected).view(np.uint8))


@dtypes
def test_what_does_not_fit_is_told(dtype: torch.dtype):
    limit = np.uint32(ROUNDS_TO_INFINITY[dtype]).view(np.float32)
    out = torch.empty(2, dtype=dtype)
    for value, fits in ((limit, False), (np.nextafter(limit, np.float32(0)), True)):
        for sign in (1, -1):
            values = np.array([1, sign * value], np.float32)
            assert kernels.store(values, as_stored(out)) == bits(np.array(value))
            assert bool(out.isfinite().all()) == fits


@dtypes
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_found_anywhere(dtype: torch.dtype, bad: float):
    for entries in (1, 8, 100):
        for place in {0, entries // 2, entries - 1}:
            model = torch.ones(entries, dtype=dtype)
            deltas, reference = np.empty(entries, np.float32), np.ones(entries, np.float32)
            assert kernels.subtract(as_stored(model), reference, deltas) == 0
            model[place] = bad
            assert kernels.subtract(as_stored(model), reference, deltas) >= INFINITY


@dtypes
@given(st.integers(0, 70), st.integers(0, 99))
def test_deltas_sums_and_multiples_are_rounded_once(dtype: torch.dtype, entries: int, seed: int):
    draw = torch.Generator().manual_seed(seed)
    one = torch.randn(entries, generator=draw).to(dtype)
    other = torch.randn(entries, generator=draw).numpy()
    exact = one.double().numpy()
    deltas = np.empty(entries, np.float32)
    largest = kernels.subtract(as_stored(one), other, deltas)
    assert np.array_equal(deltas, (exact - other).astype(np.float32))
    assert largest == (bits(np.abs(deltas)).max() if entries else 0)
    # fp64 holds the product of two fp32 numbers exactly; its sum with a third nearly always.
    total = other.copy()
    kernels.add_multiple(as_stored(one), np.float32(0.3), total)
    assert np.array_equal(total, (exact * float(np.float32(0.3)) + other).astype(np.float32))
    stored = torch.empty(entries, dtype=dtype)
    kernels.store_sum(deltas, other, as_stored(stored))
    assert torch.equal(stored, torch.from_numpy(deltas + other).to(dtype))
