"""Selection by counting patterns, against sorting."""

from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from personae.ops.select import (
    MOST_PATTERNS,
    SAMPLE_BINS,
    TOP,
    Window,
    count_magnitudes,
    guess,
    kept_count,
    kth_magnitude,
    largest,
    narrow,
    sample_counts,
)

floats = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True)
vectors = hnp.arrays(np.float32, st.integers(1, 40), elements=floats).map(torch.from_numpy)
tied_vectors = hnp.arrays(np.float32, st.integers(1, 40), elements=st.integers(-3, 3)).map(
    torch.from_numpy
)


def pattern(value: float) -> int:
    return int(np.float32(value).view(np.uint32))


def select(tensors: list[torch.Tensor], k: int, window: Window) -> tuple[float, int]:
    """Look until it is found, from a first window; and how many looks that took."""
    looks = 0
    while not window.found:
        counts = [count_magnitudes(tensor, window, window.bins) for tensor in tensors]
        window = narrow(torch.stack(counts).sum(dim=0), window, k)
        looks += 1
    return window.magnitude, looks


def kth(tensors: list[torch.Tensor], k: int) -> float:
    return sorted(torch.cat([t.flatten() for t in tensors]).abs().tolist())[-k]


@pytest.mark.parametrize(
    ("numel", "density", "count"),
    [(100, 0.29, 29), (100, 0.57, 57), (3, 0.2, 1), (9, 0.5, 4), (7, 1.0, 7), (0, 0.5, 0)],
)
def test_kept_count(numel: int, density: float, count: int):
    assert kept_count(numel, density) == count  # int(0.29 * 100) would be 28


def test_counts_by_hand():
    # From 1 to 2 there are 2^23 patterns: more than are counted one by one, so 2^12 bins of 2^11.
    # 1.25 lies a quarter in: in bin 1024 of 4096.
    window = Window(pattern(1.0), pattern(2.0))
    counts = count_magnitudes(
        torch.tensor([0.5, -1.0, 1.25, -1.25, 2.0, -7.0]), window, window.bins
    )
    assert (window.shift, window.bins, len(counts)) == (11, 4096, 4098)
    assert counts[:2].tolist() == [6, 2]  # all entries; 2 and -7 lie above
    assert {int(b): int(counts[2 + b]) for b in counts[2:].nonzero()} == {0: 1, 1024: 2}
    # The 3rd and the 4th largest are in bin 1024, the 5th in bin 0, the 6th below, the 2nd above.
    quarter = Window(pattern(1.25), pattern(1.25) + 2**11)
    assert [narrow(counts, window, k) for k in (3, 4)] == [quarter, quarter]
    assert narrow(counts, window, 5) == Window(pattern(1.0), pattern(1.0) + 2**11)
    assert narrow(counts, window, 6) == Window(0, pattern(1.0))
    assert narrow(counts, window, 2) == Window(pattern(2.0), TOP)


def test_a_narrow_window_has_a_bin_for_each_pattern():
    low = pattern(0.3)
    assert (Window(low, low + MOST_PATTERNS).shift, Window(low, low + MOST_PATTERNS).bins) == (
        0,
        MOST_PATTERNS,
    )
    window = Window(low, low + 3)
    values = torch.tensor([low + 2, low + 2, low], dtype=torch.int32).view(torch.float32)
    assert count_magnitudes(values, window, 5).tolist() == [3, 0, 1, 0, 2, 0, 0]


@given(vectors | tied_vectors, st.data())
def test_kth_magnitude_is_what_sorting_finds(vector: torch.Tensor, data: st.DataObject):
    k = data.draw(st.integers(1, len(vector)))
    ordered = sorted(vector.abs().tolist(), reverse=True)
    value, tied = kth_magnitude(vector, k)
    assert value == ordered[k - 1]
    assert tied == k - sum(other > value for other in ordered)


@given(
    st.lists(vectors | tied_vectors, min_size=1, max_size=4),
    st.randoms(use_true_random=False),
    st.floats(0.01, 0.99),
    st.data(),
)
def test_a_stream_in_any_order_gives_the_same_from_any_guess(
    tensors: list[torch.Tensor], random: Random, density: float, data: st.DataObject
):
    k = kept_count(sum(map(len, tensors)), density)
    ends = data.draw(st.lists(st.integers(0, TOP), min_size=2, max_size=2, unique=True))
    shuffled = random.sample(tensors, len(tensors))
    expected = kth(tensors, k)
    assert select(shuffled, k, Window(min(ends), max(ends) + 1))[0] == expected
    guessed = guess(torch.stack([sample_counts(t) for t in tensors]).sum(dim=0), density)
    assert select(tensors, k, guessed)[0] == expected


NORMAL = torch.randn(300_000, generator=torch.Generator().manual_seed(0))
BF16_BASE = (0.02 * NORMAL.roll(1)).bfloat16().float()
ADVERSARIAL = {
    "normal": NORMAL * 1e-3,
    "all equal": torch.full((70_000,), -0.125),
    "zeros": torch.zeros(70_000),
    "signed zeros and one entry": torch.cat([torch.zeros(70_000), -torch.zeros(9), NORMAL[:1]]),
    "mostly zeros": NORMAL * (NORMAL > 1.5),
    "denormal": NORMAL * 1e-40,
    "huge": NORMAL * 1e37,
    "differences of bf16": (BF16_BASE + 1e-3 * NORMAL).bfloat16().float() - BF16_BASE,
    "heaped on four values": (NORMAL * 1.5).round().clamp(-3, 3) / 1024,
    "sorted": NORMAL.sort().values,
    "sampled rows unlike the rest": NORMAL * torch.where(torch.arange(300_000) % 64 == 0, 30, 1),
    "tiny": NORMAL[:3],
}


@pytest.mark.parametrize("case", ADVERSARIAL)
@pytest.mark.parametrize("density", [0.001, 0.2, 0.5, 0.97])
def test_adversarial_values_are_selected_exactly(case: str, density: float):
    values = ADVERSARIAL[case]
    k = kept_count(len(values), density)
    expected = float(values.abs().sort(descending=True).values[k - 1])
    value, tied = kth_magnitude(values, k)
    assert value == expected
    assert tied == k - int((values.abs() > expected).sum())


@pytest.mark.parametrize("case", ["normal", "differences of bf16", "heaped on four values"])
def test_a_good_sample_takes_one_look(case: str):
    """A sample as large as that of a model of half a billion weights finds a narrow window."""
    values = ADVERSARIAL[case]
    window = guess(sample_counts(values) * 25, 0.2)
    assert window.shift == 0
    assert select([values], kept_count(len(values), 0.2), window)[1] == 1


def test_the_guess_holds_what_it_should():
    # Half the entries are 0.25, half 0.5; the bin of 0.5 is the one from 0.5 to 0.5 + 2^-10.
    counts = sample_counts(torch.tensor([0.25, 0.5]).repeat(50_000))
    window = guess(counts, 0.2)
    assert window.low == pattern(0.5) < window.high <= pattern(0.5 + 2**-10)
    assert counts.shape == (SAMPLE_BINS,)


def test_nothing_sampled_guesses_everything():
    assert guess(torch.zeros(SAMPLE_BINS, dtype=torch.int64), 0.2) == Window(0, TOP)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_chunks_do_not_show(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    tensor = torch.randn(500, 210, generator=torch.Generator().manual_seed(0)).to(dtype).T
    whole = kth_magnitude(tensor, 31_500)
    monkeypatch.setattr("personae.ops.select._CHUNK", 1717)
    assert kth_magnitude(tensor, 31_500) == whole
    assert whole[0] == tensor.abs().flatten().sort(descending=True).values[31_499]


@given(hnp.arrays(np.float32, st.integers(1, 60), elements=st.integers(-4, 4)), st.integers(0, 60))
def test_largest_marks_exactly_k_and_of_equal_ones_the_first(values: np.ndarray, k: int):
    k = min(k, len(values))
    order = sorted(range(len(values)), key=lambda n: -abs(values[n]))  # stable
    marked = largest(torch.from_numpy(values), k)
    assert marked.nonzero().flatten().tolist() == sorted(order[:k])


def test_largest_keeps_the_shape_and_takes_any_layout():
    stack = torch.randn(3, 40, 50, generator=torch.Generator().manual_seed(0)).mT
    marked = largest(stack, 700)
    assert marked.shape == stack.shape
    assert int(marked.sum()) == 700
    assert stack[marked].abs().min() > stack[~marked].abs().max()
