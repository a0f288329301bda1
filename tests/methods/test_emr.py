"""EMR worked by hand, its two rescalers, and its laws."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from personae.methods import Context, Site, numbers
from personae.methods.codecs.emr import EMR

ONE = torch.tensor([3.0, -1, 2, 0, -4])
TWO = torch.tensor([1.0, -2, -5, 0, 4])


def _context(codec: EMR, delta: torch.Tensor, *family: torch.Tensor) -> Context:
    shared = codec.share(list(family))
    site = Site("x", tuple(delta.shape))
    context = Context(site, "", shared)
    return replace(context, statistics=codec.statistics([(delta, context)]))


def test_by_hand():
    # Σ = 4 −3 −3 0 0, γ = + − − − −; ε = 3 2 5 0 4 and τ = 3 −2 −5 −0 −4.
    codec = EMR()
    shared = codec.share([ONE, TWO])
    assert shared.tolist() == [3, -2, -5, 0, -4]
    # Task one agrees in 0, 1 and 4: mask 1 + 2 + 16; λ = (3 + 1 + 2 + 4) / (3 + 2 + 4) = 10/9.
    parts = codec.encode(ONE, None, _context(codec, ONE, ONE, TWO))
    assert parts["mask"].tolist() == [19]
    assert parts["scale"].tolist() == [pytest.approx(10 / 9)]
    decoded = codec.decode(parts, (5,), shared)
    assert decoded.tolist() == pytest.approx([30 / 9, -20 / 9, 0, 0, -40 / 9])
    # Task two in 0, 1 and 2: λ = (1 + 2 + 5 + 4) / (3 + 2 + 5) = 1.2.
    parts = codec.encode(TWO, None, _context(codec, TWO, ONE, TWO))
    assert (parts["mask"].tolist(), parts["scale"].tolist()) == ([7], [pytest.approx(1.2)])
    assert codec.bits((5,)) == (5, 5, 8 * (1 + 4))


def test_rescalers_weigh_tensors_by_size_or_alike() -> None:
    # Sums 4 and 2 over 4 entries, 6 and 6 over 1: (4 + 6) / (2 + 6), or (1 + 6) / (½ + 6).
    small, large = torch.tensor([6.0]), torch.tensor([1.0, 1, 1, 1])
    shared = {"small": torch.tensor([6.0]), "large": torch.tensor([0.5, 0.5, 0.5, 0.5])}
    for codec, scale in ((EMR(rescaler="global"), 10 / 8), (EMR(), 7 / 6.5)):
        blocks = [
            (delta, Context(Site(name, ()), "", shared[name]))
            for name, delta in (("small", small), ("large", large))
        ]
        assert numbers(codec.statistics(blocks))["scale"] == pytest.approx(scale)


@given(st.lists(st.integers(-9, 9), min_size=1, max_size=30))
def test_one_expert_alone_and_copies_come_back(values: list[int]):
    delta, codec = torch.tensor(values, dtype=torch.float32), EMR()
    for copies in (1, 2, 5):
        context = _context(codec, delta, *[delta] * copies)
        parts = codec.encode(delta, None, context)
        assert not parts or parts["scale"].item() == 1
        assert torch.equal(codec.decode(parts, delta.shape, context.shared), delta)


@given(st.integers(0, 1000))
def test_against_the_formulas(seed: int):
    draw = torch.Generator().manual_seed(seed)
    family = torch.randint(-5, 6, (3, 40), generator=draw).double()
    gamma = torch.where(family.sum(0) > 0, 1.0, -1.0).double()
    agree = family.sign() == gamma
    unified = gamma * (family.abs() * agree).amax(0)
    codec = EMR()
    for delta in family.float():
        context = _context(codec, delta, *family.float())
        assert context.shared is not None
        assert torch.equal(context.shared.double(), unified)
        mask = (delta.double() * unified) > 0
        masked = (mask * unified).abs().sum()
        scale = delta.double().abs().sum() / masked if masked else 1.0
        decoded = codec.decode(codec.encode(delta, None, context), (40,), context.shared)
        torch.testing.assert_close(decoded.double(), scale * mask * unified, rtol=1e-6, atol=0)


def test_products_that_underflow_still_agree():
    delta, codec = torch.tensor([1e-30, -1e-30]), EMR()
    context = _context(codec, delta, delta)
    decoded = codec.decode(codec.encode(delta, None, context), (2,), context.shared)
    assert torch.equal(decoded, delta)
