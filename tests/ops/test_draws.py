"""Random masks: NumPy's numbers, their statistics, and what they depend on."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drawn_masks import keep_mask as by_numpy
from personae import kernels
from personae.ops.draws import DRAW_VALUES, Draws, kept_values


def keep_mask(kept: int, start: int, count: int, **stream: object) -> np.ndarray:
    """What is kept of entries that are all 1."""
    row = np.ones(count, np.float32)
    state, skipped = Draws(**stream).at(start, count)  # type: ignore[arg-type]
    kernels.drop(row, state, skipped, kept, np.float32(1))
    return row == 1


WHOLE = by_numpy(kept_values(0.3), 0, 4000, seed=1, name="a.weight", expert=2)


@given(st.integers(0, 4000), st.integers(0, 4000))
def test_an_entry_has_one_draw_wherever_rows_are_cut(start: int, stop: int):
    start, stop = sorted((start, stop))
    part = keep_mask(kept_values(0.3), start, stop - start, seed=1, name="a.weight", expert=2)
    assert np.array_equal(part, WHOLE[start:stop])


@given(st.lists(st.integers(1, 60), min_size=1, max_size=9), st.integers(0, 9))
def test_a_stream_goes_on_from_block_to_block(counts: list[int], start: int):
    draws = Draws(seed=1, name="a.weight", expert=2)
    for count in counts:
        row = np.ones(count, np.float32)
        kernels.drop(row, *draws.at(start, count), kept_values(0.3), np.float32(1))
        assert np.array_equal(row == 1, WHOLE[start : start + count])
        start += count


def test_what_is_kept_is_multiplied():
    row = np.arange(40, dtype=np.float32)
    state, skipped = Draws(seed=7, name="x", expert=1).at(6, 40)
    kernels.drop(row, state, skipped, kept_values(0.2), np.float32(-0.5))
    kept = np.zeros(40)
    kept[[7, 11, 23, 30, 32, 33, 35, 36]] = 1  # as recorded below
    assert np.array_equal(row, -0.5 * kept * np.arange(40))


@pytest.mark.parametrize(
    "other", [{"seed": 2}, {"name": "b.weight"}, {"expert": 0}, {"seed": 12, "expert": 0}]
)
def test_seed_name_and_expert_each_have_a_stream(other: dict):
    mask = keep_mask(
        kept_values(0.3), 0, 4000, **({"seed": 1, "name": "a.weight", "expert": 2} | other)
    )
    # Two independent masks of density 0.3 agree at 0.3² + 0.7² = 0.58 of the entries; the standard
    # deviation over 4000 is 0.008.
    assert 0.54 < (mask == WHOLE).mean() < 0.62


def test_kept_values():
    # 0.2 · 65536 = 13107.2; nothing is too sparse to keep one value.
    assert [kept_values(d) for d in (0.2, 0.5, 1.0, 1e-9)] == [13107, 32768, DRAW_VALUES, 1]


@pytest.mark.parametrize("density", [0.001, 0.2, 0.5, 0.9])
def test_the_share_kept_is_the_density(density: float):
    count = 400_000
    kept = keep_mask(kept_values(density), 0, count, seed=0, name="w", expert=0).sum()
    assert abs(kept - count * density) < 5 * (count * density * (1 - density)) ** 0.5


def test_neighbours_are_independent():
    """Each of the four draws of a word, and draws 1 to 8 apart."""
    mask = keep_mask(kept_values(0.5), 0, 400_000, seed=3, name="w", expert=0)
    assert np.abs(mask.reshape(-1, 4).mean(axis=0) - 0.5).max() < 5 * 0.5 / 100_000**0.5
    for apart in range(1, 9):
        both = (mask[:-apart] & mask[apart:]).mean()
        assert abs(both - 0.25) < 5 * (0.1875 / 400_000) ** 0.5


def test_draws_are_these():
    """Recorded: a recipe gives the same model with every version, on every machine."""
    kept = np.flatnonzero(keep_mask(kept_values(0.2), 6, 40, seed=7, name="x", expert=1))
    assert kept.tolist() == [7, 11, 23, 30, 32, 33, 35, 36]
