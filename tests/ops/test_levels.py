import math

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from personae.ops.levels import Levels, Split, dequantise, quantise, upper_half

HAND = torch.tensor([[6.0, -2.0, 1.0, 3.0, -4.0, 0.0]])
# positive 6 1 3: upper ⌊3/2⌋ = 1 is 6; small 3 1.   negative 2 4: large 4, small 2.
# codes (bit 0 negative, bit 1 large):                 6→2  -2→1  1→0  3→0  -4→3  0→0
CODES = [[2, 1, 0, 0, 3, 0]]


def test_hand_worked_rms():
    levels = quantise(HAND, split="rank", scales="rms")
    assert levels.codes.tolist() == CODES
    # small positive: sqrt((1 + 9) / 2) = sqrt(5); the others hold one value each
    small = np.float32(math.sqrt(5))
    assert levels.scales.tolist() == [[small, 2, 6, 4]]
    # the zero is decoded as code 0: it is the caller who notes it
    assert dequantise(levels).tolist() == [[6, -2, small, small, -4, small]]


def test_hand_worked_mean():
    levels = quantise(HAND, split="rank", scales="mean")
    assert levels.codes.tolist() == CODES
    assert levels.scales.tolist() == [[2, 2, 6, 4]]  # small positive: (1 + 3) / 2


def test_hand_worked_one():
    levels = quantise(HAND, split="rank", scales="one")
    assert levels.codes.tolist() == CODES
    assert dequantise(levels).tolist() == [[1, -1, 1, 1, -1, 1]]


def test_hand_worked_signs_alone():
    levels = quantise(HAND, split="none", scales="mean")
    assert levels.codes.tolist() == [[0, 1, 0, 0, 1, 0]]
    # positive (6 + 1 + 3) / 3 = 10/3; negative (2 + 4) / 2 = 3
    assert levels.scales.tolist() == [[np.float32(10 / 3), 3]]


def test_every_row_is_a_set_of_its_own():
    both = quantise(torch.tensor([[1.0, 2.0], [30.0, 40.0]]), split="rank", scales="rms")
    assert both.codes.tolist() == [[0, 2], [0, 2]]
    assert both.scales.tolist() == [[1, 0, 2, 0], [30, 0, 40, 0]]  # no negatives: scale 0


@pytest.mark.parametrize(
    ("magnitudes", "rank", "median"),
    [
        ([5.0], [], []),  # ⌊1/2⌋ = 0; nothing is above itself
        ([1.0, 2.0], [1], [1]),
        ([2.0, 2.0, 2.0], [0], []),  # one of three; none is above the median 2
        ([1.0, 2.0, 2.0], [1], []),
        ([2.0, 1.0, 2.0, 3.0], [0, 3], [3]),  # median 2: only 3 lies above
        ([1.0, 3.0, 3.0, 1.0], [1, 2], [1, 2]),  # ties, but not across the boundary
    ],
)
def test_ties(magnitudes: list[float], rank: list[int], median: list[int]):
    values = torch.tensor(magnitudes)
    assert upper_half(values, "rank").nonzero().flatten().tolist() == rank
    assert upper_half(values, "median").nonzero().flatten().tolist() == median


_integers = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.integers(-4, 4)
).map(torch.from_numpy)


@given(_integers)
def test_rank_split_against_a_stable_sort(sets: torch.Tensor):
    codes = quantise(sets, split="rank", scales="rms").codes
    for values, code in zip(sets.tolist(), codes.tolist(), strict=True):
        expected = [0] * len(values)
        for negative, sign in enumerate((1, -1)):
            members = [n for n, value in enumerate(values) if sign * value > 0]
            large = sorted(members, key=lambda n: -sign * values[n])[: len(members) // 2]
            for n in members:
                expected[n] = negative + 2 * (n in large)
        assert code == expected


@given(_integers)
def test_median_split_against_numpy(sets: torch.Tensor):
    codes = quantise(sets, split="median", scales="rms").codes
    for values, code in zip(sets.numpy(), codes.numpy(), strict=True):
        for sign in (1, -1):
            members = sign * values > 0
            if members.any():
                magnitudes = sign * values[members]
                assert ((code[members] >= 2) == (magnitudes > np.median(magnitudes))).all()


@given(_integers, st.sampled_from(["rank", "median", "none"]))
def test_rms_keeps_the_norm_and_every_sign(sets: torch.Tensor, split: Split):
    decoded = dequantise(quantise(sets, split=split, scales="rms"))
    decoded[sets == 0] = 0
    assert torch.equal(decoded.sign(), sets.sign())
    torch.testing.assert_close(decoded.norm(dim=1), sets.norm(dim=1))


@given(_integers)
def test_mean_keeps_the_sum(sets: torch.Tensor):
    decoded = dequantise(quantise(sets, split="rank", scales="mean"))
    decoded[sets == 0] = 0
    torch.testing.assert_close(decoded.sum(dim=1), sets.sum(dim=1), atol=1e-5, rtol=1e-5)


def test_squares_do_not_underflow():
    tiny = torch.full((1, 2), 1e-40)  # 1e-80 is below every fp32 number
    levels = quantise(tiny, split="rank", scales="rms")
    assert torch.equal(dequantise(levels), tiny)


def test_dequantise_by_hand():
    levels = Levels(
        torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8), torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    )
    assert dequantise(levels).tolist() == [[1, -2, 3, -4]]
