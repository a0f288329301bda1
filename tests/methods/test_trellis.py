"""Paths on the trellis and their code: against all paths, and against whole numbers."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from personae.errors import PackError
from personae.methods._trellis import MODELS, Reader, Writer, quantise

NEXT = ((0, 2), (2, 0), (1, 3), (3, 1))


def path_of(numbers: list[int]) -> list[int]:
    """The integers that these numbers mean, with the sign."""
    state, found = 0, list[int]()
    for number in numbers:
        size = 2 * abs(number) - state // 2 if number else 0
        found.append(size if number > 0 else -size)
        state = NEXT[state][number % 2]
    return found


def bits_of(path: list[int], model: int) -> float:
    """Bits by the models' frequencies."""
    state, total = 0, 0.0
    for integer in path:
        k = (abs(integer) + state // 2) // 2
        total += 12 - np.log2((MODELS[model].odd if state // 2 else MODELS[model].even)[k])
        state = NEXT[state][k % 2]
    return total


def write(vectors: list[torch.Tensor], models: list[int]) -> torch.Tensor:
    """A code that gives these vectors in this order."""
    writer = Writer()
    for vector, model in reversed(list(zip(vectors, models, strict=True))):
        writer.add(vector, model)
    return writer.end()


def test_frequencies_add_up():
    for model in MODELS:
        assert len(model.even) == len(model.odd) <= 16
        for zero, *others in (model.even, model.odd):
            assert zero + 2 * sum(others) == 4096
            assert min(zero, *others) > 0


def test_coded_by_hand():
    # Model 3: of 4096, +2 has 1880 to 2847 of the even ones; +1 has 2 to 1633 of the odd ones and
    # -1 the next 1632. (2, -1, 1) goes through the states 0, 2 and 3. From the last one back:
    # 2^23 = 5140 · 1632 + 128, then 5140 · 4096 + 128 + 2 = 21053570 = 12900 · 1632 + 770, then
    # 12900 · 4096 + 770 + 1634 = 52840804 = 54587 · 968 + 588, then 54587 · 4096 + 588 + 1880.
    codes = write([torch.tensor([2, -1, 1], dtype=torch.int8)], [3])
    assert codes.tolist() == list((54587 * 4096 + 2468).to_bytes(4, "big"))
    reader = Reader(codes)
    assert reader.read(3, 3).tolist() == [2, -1, 1]
    reader.end()


def test_no_path_is_better():
    draw = torch.Generator().manual_seed(0)
    for model in (0, 3, 5):
        for _ in range(4):
            vector = torch.randn(4, generator=draw)
            norm = float(vector.double().square().sum())
            paths = np.array([path_of(list(each)) for each in product(range(-3, 4), repeat=4)])
            bits = np.array([bits_of(path, model) for path in paths.tolist()])
            best: list[list[int]] = []
            for stretch in (0.88, 1.0, 1.15, 1.35):
                step = stretch * MODELS[model].step * (norm / 4) ** 0.5
                off = vector.double().numpy() / step - paths
                costs = (off**2).sum(axis=1) + MODELS[model].weight * bits
                best.append(paths[int(costs.argmin())].tolist())
            assert quantise(vector, model, 1.0, 0.01)[0].tolist() in best


@given(st.data())
def test_there_and_back_within_the_bytes_that_were_priced(data: st.DataObject):
    models = data.draw(st.lists(st.integers(0, len(MODELS) - 1), max_size=4))
    paths = [
        path_of(
            data.draw(st.lists(st.integers(1 - (n := len(MODELS[m].even)), n - 1), max_size=60))
        )
        for m in models
    ]
    vectors = [torch.tensor(path, dtype=torch.int8) for path in paths]
    codes = write([*vectors, torch.zeros(0, dtype=torch.int8)], [*models, 0])
    bits = sum(bits_of(path, model) for path, model in zip(paths, models, strict=True))
    assert 4 + bits / 8 - 2 <= len(codes) <= 4 + (bits + 0.0008 * sum(map(len, paths))) / 8
    reader = Reader(codes)
    for path, model in zip(paths, models, strict=True):
        assert reader.read(len(path), model).tolist() == path
    reader.end()


def test_a_price_is_what_is_written_at_most():
    vector = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    for model, each in enumerate(MODELS):
        path, nbytes = quantise(vector, model, 1.0, 1e-5)
        assert 0.998 * nbytes <= len(write([path], [model])) - 4 <= nbytes
        integers = path.double()
        cosine = float((integers @ vector.double()) ** 2 / (integers @ integers))
        assert cosine / float(vector.double().square().sum()) == pytest.approx(each.kept, abs=0.07)


@pytest.mark.parametrize(
    "vector", [[1.0] * 9, [0.0, 0, -1e-30], [3e38, 1.0], [-5.0], [1, *[0.0] * 99]]
)
def test_a_vector_is_never_nothing(vector: list[float]):
    path = quantise(torch.tensor(vector), 0, 1.0, 1e3)[0].double()
    assert float(path @ torch.tensor(vector).double()) > 0


def test_nothing_is_nothing():
    assert quantise(torch.zeros(4), 0, 1.0, 0.1)[0].tolist() == [0] * 4


@given(st.binary(max_size=40), st.lists(st.integers(0, len(MODELS) - 1), max_size=4))
def test_any_bytes_are_refused_or_paths(data: bytes, models: list[int]):
    codes = torch.tensor(list(data), dtype=torch.uint8)
    try:
        reader = Reader(codes)
    except PackError:
        return
    paths = [reader.read(50, model) for model in models]
    assert all(
        int(path.abs().max()) <= 2 * len(MODELS[m].even)
        for m, path in zip(models, paths, strict=True)
    )
    try:
        reader.end()
    except PackError:
        return
    assert torch.equal(write(paths, models) if paths else codes, codes)


def test_what_is_cut_or_longer_is_refused():
    path = quantise(torch.randn(300, generator=torch.Generator().manual_seed(0)), 2, 1.0, 0.1)[0]
    codes = write([path], [2])
    for damaged in (codes[:-1], torch.cat([codes, codes[:1]]), codes[:3], 0 * codes):
        with pytest.raises(PackError, match=r"'codes' of \d+ bytes is no code of its triplets"):
            reader = Reader(damaged)
            reader.read(300, 2)
            reader.end()
