"""Delta-CoMe: bands, levels worked by hand, and what more bits buy."""

import pytest
import torch

from personae import _types
from personae.methods.codecs.delta_come import DeltaCoMe, _dequantise, _quantise


def test_levels_by_hand():
    # One vector at 2 bits, codes 0 … 3. u = ½ (1 1 1 −1): from −0.5 to 0.5 in steps of ⅓, zero
    # point round(1.5) = 2; ±0.5 lie 1.5 steps off, which goes to the even 2: codes 3 (of 4) and 0.
    # v = (0.75, −0.75): steps of 0.5, zero point 1.5 → 2, 1.5 → 2: codes 4 → 3 and 0.
    u, v = torch.tensor([[0.5], [0.5], [0.5], [-0.5]]), torch.tensor([[0.75, -0.75]])
    svd = _types.SVD(u, torch.tensor([10.0]), v)
    codec = DeltaCoMe(bands=((1, 2),), bits_per_weight=2)
    parts = codec.encode(10 * u @ v, svd)
    # Codes and zero points 3 3 3 0 2 and 3 0 2, as planes of low and of high bits.
    assert parts["codes"].tolist() == [0b00111, 0b10111, 0b001, 0b101]
    assert parts["scales"].dtype == torch.float16
    assert parts["scales"].tolist() == pytest.approx([1 / 3, 0.5], abs=1e-3)
    assert parts["singular_values"].tolist() == [10]
    left = torch.tensor([[1.0], [1.0], [1.0], [-2.0]]) / 3
    expected = 10 * left @ torch.tensor([[0.5, -1.0]])
    torch.testing.assert_close(codec.decode(parts, (4, 2)), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("width", "error"), [(2, 0.253), (3, 0.045)])
def test_the_released_quantiser_on_gaussian_values(width: int, error: float):
    """Squared error of groups of 128, from least to largest value, 0 among the levels."""
    values = torch.randn(400, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    top = 2**width - 1
    step = (values.amax(1, keepdim=True) - values.amin(1, keepdim=True)) / top
    zero = (-values.amin(1, keepdim=True) / step).round()
    expected = (((values / step).round() + zero).clamp(0, top) - zero) * step
    codes, steps = _quantise(values.float(), width)
    found = _dequantise(codes, steps.float(), 128)
    lost = float((found - values).square().mean())
    assert lost == pytest.approx(float((expected - values).square().mean()), rel=1e-2)
    assert lost == pytest.approx(error, rel=0.1)


@pytest.mark.parametrize(
    ("name", "coded"),
    [
        ("model.layers.0.self_attn.q_proj.weight", True),
        ("model.layers.0.mlp.down_proj.weight", True),
        ("model.embed_tokens.weight", False),
        ("lm_head.weight", False),
    ],
)
def test_attention_and_mlp_matrices_are_coded(name: str, coded: bool):
    """As in the released code; all other matrices on request."""
    spec = _types.TensorSpec(name, (8, 8), torch.float32)
    assert DeltaCoMe().treats(spec) == ("code" if coded else "exact")
    assert DeltaCoMe(tensors="all").treats(spec) == "code"


def test_bands_and_what_follows_them():
    # 12 x 12, 3 bits a weight: room for 3 · 144 / 24 = 18 bits a pair. 8 + 2 · 3 = 14, then two
    # of 2 bits.
    codec = DeltaCoMe(bands=((1, 8), (2, 3)), bits_per_weight=3)
    assert codec.rank((12, 12)) == 5
    assert list(codec._runs(5)) == [(8, 0, 1), (3, 1, 3), (2, 3, 5)]
    assert list(codec._runs(2)) == [(8, 0, 1), (3, 1, 2)]
    bits = codec.bits((12, 12))
    assert bits.paper == 18 * 24 + 5 * 32
    # planes of each factor: 8 of 13 codes (12 and a zero point), 3 of 26 and 2 of 26; a scale for
    # 5 · 2 vectors
    assert bits.stored == 8 * 2 * (8 * 2 + 3 * 4 + 2 * 4) + 5 * 32 + 16 * 10


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
