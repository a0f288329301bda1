"""Memory of chunks that come and go."""

from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from personae._memory import give_back_freed, kept_bytes, uninitialised

MANY = 1 << 18
"""Entries of fp32: 1 MiB."""


@pytest.fixture(autouse=True)
def nothing_kept() -> Generator[None]:
    give_back_freed()
    yield
    give_back_freed()


def places(tensors: Sequence[Tensor]) -> set[int]:
    return {tensor.data_ptr() for tensor in tensors}


def test_blocks_take_the_places_of_others_of_about_their_size():
    """Whatever lies between: eight places are used again, by dtypes and shapes of their size."""
    made = [uninitialised([MANY]) for _ in range(8)]
    there = places(made)
    assert len(there) == 8
    made.clear()
    again = [uninitialised([4, MANY // 2 - 3], torch.bfloat16) for _ in range(8)]
    assert places(again) == there


def test_a_short_chunk_leaves_the_places_of_whole_ones():
    """The last chunk of a tensor lies where a whole one was, and the next whole ones, too."""
    made = [uninitialised([4 * MANY]) for _ in range(3)]
    there = places(made)
    made.clear()
    short = [uninitialised([MANY]) for _ in range(3)]
    assert places(short) == there
    short.clear()
    assert places([uninitialised([4 * MANY]) for _ in range(3)]) == there


def test_what_is_larger_than_a_chunk_is_no_place_for_much_less():
    made = uninitialised([6 * MANY])
    place = made.data_ptr()
    del made
    assert uninitialised([4 * MANY]).data_ptr() != place


def test_what_is_in_use_is_in_no_other_place():
    kept = uninitialised([MANY]).fill_(1.0)
    view = kept[10:20]
    ptr = kept.data_ptr()
    del kept
    other = uninitialised([MANY]).fill_(2.0)
    assert view.tolist() == [1.0] * 10 and other.data_ptr() != ptr


def test_as_much_is_given_back_as_is_taken_anew():
    """Of 4 MiB that are free, one of 2 MiB that fits in none takes the place of two."""
    blocks = [uninitialised([MANY]) for _ in range(4)]
    blocks.clear()
    assert kept_bytes() == 4 << 20
    larger = uninitialised([2 * MANY])
    assert kept_bytes() == 2 << 20
    del larger
    assert kept_bytes() == 4 << 20
    give_back_freed()
    assert kept_bytes() == 0


def test_small_and_very_large_ones_are_not_kept():
    for entries in (MANY // 8, 9 << 20):
        made = uninitialised([entries])
        del made
        assert kept_bytes() == 0


def test_threads_share_what_is_free():
    """Each of four fills its own and reads it back, beside the one before: eight at most."""

    def work(number: int) -> bool:
        for _ in range(50):
            made = uninitialised([MANY], torch.int32).fill_(number)
            if not bool((made == number).all()):
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
    assert kept_bytes() <= 8 << 20


@given(
    st.lists(st.integers(0, 4), max_size=4),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool]),
)
def test_shape_and_dtype_are_those_asked_for(shape: list[int], dtype: torch.dtype):
    made = uninitialised(shape, dtype)
    assert made.shape == tuple(shape) and made.dtype == dtype and made.is_contiguous()
    made.zero_()
    assert not made.any()
