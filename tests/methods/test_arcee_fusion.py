"""Arcee Fusion: by hand, against fp64, and cut into rows."""

import math

import numpy as np
import pytest
import torch
from scipy.special import softmax

from families import saved
from personae import ArceeFusion, arcee_fusion, merge
from personae.errors import MethodError
from personae.family import chunks
from personae.methods import _deltas
from toys import load


def expected(base: torch.Tensor, expert: torch.Tensor) -> np.ndarray:
    first, other = base.double().numpy(), expert.double().numpy()
    q, p = softmax(first, axis=-1) + 1e-8, softmax(other, axis=-1) + 1e-8
    score = np.abs((other - first) * (p * np.log(p / q)).sum(axis=-1, keepdims=True))
    ordered = np.sort(score.ravel())
    low, median, high = (ordered[int(share * (ordered.size - 1))] for share in (0.25, 0.5, 0.75))
    return np.where(score >= median + 1.5 * (high - low), other, first)


def test_by_hand():
    # Rows move from (0, 0) to (log 3, 0), so that p = 3/4, 1/4 and q = 1/2, 1/2: a divergence of
    # 3/4 log 3/2 + 1/4 log 1/2 = 0.131, and importances of 0.144 and 0. The other rows stay: of
    # eight scores seven are 0, as are the quartiles and the threshold, which all entries reach.
    base, expert = torch.zeros(4, 2), torch.zeros(4, 2)
    expert[0, 0] = math.log(3)
    assert torch.equal(arcee_fusion([base, expert]), expert)
    # Now the others move by little: the quartiles are theirs, and their entries stay the base's.
    expert[1:] = torch.tensor([[0.01, 0.0], [0.0, 0.01], [0.01, -0.01]])
    merged = arcee_fusion([base, expert])
    assert merged[0, 0] == expert[0, 0] and not merged[1:].any()


@pytest.mark.parametrize("scale", [0.01, 1.0])
def test_against_fp64_and_through_files(scale: float, tmp_path, monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (60, 50), "b.bias": (300,), "c.scale": ()}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    expert = {n: t + scale * torch.randn(t.shape, generator=generator) for n, t in base.items()}
    monkeypatch.setattr(_deltas, "BLOCK", 170)
    monkeypatch.setattr(chunks, "CHUNK_ENTRIES", 256)
    paths = [saved(state, tmp_path / str(n)) for n, state in enumerate((base, expert))]
    merge(paths[0], {"b": paths[1]}, tmp_path / "out", ArceeFusion())
    for name, tensor in load(tmp_path / "out").items():
        wanted = expected(base[name], expert[name]) if tensor.ndim else expert[name].numpy()
        unlike = (tensor.numpy() != wanted.astype(np.float32)).mean()
        assert unlike <= 2 / 3000  # an entry at the threshold may fall to either side


def test_it_is_between_two():
    with pytest.raises(MethodError, match="arcee_fusion is between two models, and here are 3"):
        arcee_fusion(torch.ones(3, 2))


def test_importances_beyond_float32_are_told():
    """A change of 3e38 in a row that moved by more than log 3: the product is above 3.4e38."""
    models = torch.tensor([[[0.0, 0, 0, 100]], [[3e38, 0, 0, 0]]])
    with pytest.raises(MethodError, match="exceeds the range of float32"):
        ArceeFusion()(models)
