"""Delta-CoMe: bands, levels worked by hand, and what more bits buy."""

import pytest
import torch

from personae import _types
from personae.methods.personalise.delta_come import DeltaCoMe


def test_levels_by_hand():
    # One vector at 2 bits: levels −1 −⅓ ⅓ 1 of the largest magnitude. u = ½ (1 1 1 −1): levels
    # 3 3 3 0, planes 0111 0111. v = (0.8, −0.6): s = 0.8, −0.6/0.8 = −0.75 is nearest to −1.
    u, v = torch.tensor([[0.5], [0.5], [0.5], [-0.5]]), torch.tensor([[0.8, -0.6]])
    svd = _types.SVD(u, torch.tensor([10.0]), v)
    codec = DeltaCoMe(bands=((1, 2),), bits_per_weight=2)
    parts = codec.encode(10 * u @ v, svd)
    assert parts["codes"].tolist() == [7, 7, 1, 1]
    assert parts["scales"].dtype == torch.float16
    assert parts["scales"].tolist() == pytest.approx([0.5, 0.8], abs=1e-3)
    assert parts["singular_values"].tolist() == [10]
    expected = 10 * u @ torch.tensor([[0.8, -0.8]])
    torch.testing.assert_close(codec.decode(parts, (4, 2)), expected, rtol=1e-3, atol=0)


def test_bands_and_what_follows_them():
    # 12 x 12, 3 bits a weight: room for 3 · 144 / 24 = 18 bits a pair. 8 + 2 · 3 = 14, then two
    # of 2 bits.
    codec = DeltaCoMe(bands=((1, 8), (2, 3)), bits_per_weight=3)
    assert codec.rank((12, 12)) == 5
    assert list(codec._runs(5)) == [(8, 0, 1), (3, 1, 3), (2, 3, 5)]
    assert list(codec._runs(2)) == [(8, 0, 1), (3, 1, 2)]
    bits = codec.bits((12, 12))
    assert bits.counted == 18 * 24 + 5 * 32
    # planes of each factor: 8 of 12, 3 of 24 and 2 of 24 codes; a scale for 5 · 2 vectors
    assert bits.stored == 8 * 2 * (8 * 2 + 3 * 3 + 2 * 3) + 5 * 32 + 16 * 10


def test_a_small_matrix_keeps_one_direction():
    assert DeltaCoMe().rank((4, 4)) == 1
    assert DeltaCoMe().rank((1, 768)) == 1


def test_long_vectors_have_groups_of_their_own():
    # A vector of 130: one group of 128 and one of 2, with a scale each.
    u = torch.full((130, 1), 1e-3)
    u[0], u[129] = 1.0, 0.01
    svd = _types.SVD(u, torch.tensor([1.0]), torch.ones(1, 1))
    codec = DeltaCoMe(bands=((1, 8),), bits_per_weight=8)
    parts = codec.encode(u, svd)
    decoded = codec.decode(parts, (130, 1))
    torch.testing.assert_close(decoded[[0, 129]], u[[0, 129]], rtol=1e-3, atol=0)


def test_more_bits_come_closer():
    delta = torch.randn(60, 80, generator=torch.Generator().manual_seed(0))
    best = torch.linalg.svd(delta)
    errors = []
    for width in (1, 2, 3, 5, 8):
        codec = DeltaCoMe(bands=((30, width),), bits_per_weight=9)
        codec = codec.model_copy(update={"rest_bits": width})
        given = _types.SVD(best.U[:, :30], best.S[:30], best.Vh[:30])
        truncated = given.u @ torch.diag(given.singular_values) @ given.vh
        parts = codec.model_copy(update={"bands": ((30, width),)}).encode(delta, given)
        errors.append(float((codec.decode(parts, (60, 80)) - truncated).norm() / truncated.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01
