"""The analyses of the DRM paper: by hand, by brute force, against figures computed elsewhere."""

import itertools
import json
import math
from typing import Any

import pytest
import torch

from personae.methods import build
from personae.methods.analyses import ANALYSES, headline
from personae.methods.analyses.sign_agreement import agreement, random_agreement

names = pytest.mark.parametrize("name", sorted(ANALYSES))


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def analyse(name: str, stack: torch.Tensor, **settings: Any) -> dict[str, Any]:
    analysis = ANALYSES[name]
    return analysis.function(stack, **dict(build(analysis.parameters, settings)))


@names
def test_findings_print_as_json_and_have_their_headlines(name: str):
    for stack in (gaussian(3, 8, 6), gaussian(1, 5, 9), torch.zeros(2, 4, 3)):
        before = stack.clone()
        found = json.loads(json.dumps(analyse(name, stack), allow_nan=False))
        for place in ANALYSES[name].headlines:
            assert math.isfinite(headline(found, place))
        assert torch.equal(stack, before)


@names
def test_vertical_is_horizontal_of_the_transposes(name: str):
    stack = gaussian(3, 8, 5)
    transposes = analyse(name, stack.mT.contiguous())
    vertical = analyse(name, stack, direction="vertical")
    for place in ANALYSES[name].headlines:
        assert headline(vertical, place) == pytest.approx(headline(transposes, place), abs=1e-5)


def test_agreement_by_hand():
    entries = torch.tensor(
        [
            [1.0, 1.0, 2.0, 0.0, 0.0],
            [1.0, -1.0, 0.5, -3.0, 0.0],
            [1.0, -2.0, -1.0, 0.0, 0.0],
        ]
    )  # max(P, M) / (P + M):  3/3  2/3  2/3  1/1  nobody
    found = agreement(entries)
    assert found["agreement"] == pytest.approx((1 + 2 / 3 + 2 / 3 + 1) / 4)
    assert found["histogram"] == [0.0, 0.5, 0.0, 0.0, 0.5]  # 0.6 to 0.7, and 0.9 to 1
    assert found["entries"] == 4
    # Densities 3/5, 4/5, 3/5.
    assert found["random"] == pytest.approx(random_agreement([0.6, 0.8, 0.6]))


def test_three_of_five_falls_into_the_bin_that_begins_there():
    entries = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0])[:, None]
    assert agreement(entries)["histogram"] == [0.0, 1.0, 0.0, 0.0, 0.0]


def test_random_agreement_by_every_case():
    densities = [0.2, 0.5, 0.9]
    total = anyone = 0.0
    for signs in itertools.product((-1, 0, 1), repeat=3):
        chance = 1.0
        for sign, density in zip(signs, densities, strict=True):
            chance *= density / 2 if sign else 1 - density
        voters = sum(sign != 0 for sign in signs)
        if voters:
            anyone += chance
            total += chance * max(signs.count(1), signs.count(-1)) / voters
    assert random_agreement(densities) == pytest.approx(total / anyone)


@pytest.mark.parametrize(
    ("experts", "density", "percent"),
    [(8, 0.2, 84.7), (5, 0.2, 90.2), (8, 1.0, 63.7), (5, 1.0, 68.8)],
)
def test_random_agreement_is_what_the_reference_sheet_computes(
    experts: int, density: float, percent: float
):
    """methods.md 8.9, computed there independently."""
    assert round(100 * random_agreement([density] * experts), 1) == percent


def test_independent_experts_agree_as_random_signs_do_and_copies_wholly():
    found = analyse("sign_agreement", gaussian(4, 60, 50))
    for space in ("original", "joint", "projected"):
        assert found[space]["agreement"] == pytest.approx(found[space]["random"], abs=0.02)
        assert sum(found[space]["histogram"]) == pytest.approx(1)
    copies = gaussian(1, 20, 30).expand(3, -1, -1)
    found = analyse("sign_agreement", copies)
    assert found["original"]["agreement"] == found["joint"]["agreement"] == 1
    assert found["projected"]["agreement"] > 0.99  # entries of rounding noise


def test_dropped_percentage_by_hand():
    stack = torch.tensor([[[3.0, 0.0], [0.0, 3.0]], [[4.0, 0.0], [0.0, -1.0]]])
    # Rows of C: (3 0 | 4 0), (0 3 | 0 -1); orthogonal. V₁ᵀ = (.6 0; 0 .95), V₂ᵀ = (.8 0; 0 -.32).
    # One of four entries of each is kept: .95 of the first, .8 of the second, as they are.
    found = analyse("dropped_percentage", stack, density=0.25)
    assert found["as_is"]["percent"] == [[100.0, 50.0], [50.0, 100.0]]
    assert found["as_is"]["spread"] == 25.0
    # All rows of length 1: the first of equal entries.
    assert found["renormalised"]["percent"] == [[50.0, 100.0], [50.0, 100.0]]


def test_renormalised_rows_lose_about_the_same_share():
    left, right = gaussian(4, 40, 40), gaussian(4, 40, 50, seed=1)
    stack = (left * torch.arange(1, 41) ** -1.5) @ right
    found = analyse("dropped_percentage", stack)
    for kind in ("renormalised", "as_is"):
        percent = torch.tensor(found[kind]["percent"])
        torch.testing.assert_close(percent.mean(dim=1), torch.full((4,), 50.0), atol=1, rtol=0)
    assert 2 * found["renormalised"]["spread"] < found["as_is"]["spread"]


def test_copies_have_no_gap_to_bound():
    """Property 11: σ([A … A]) = √N σ(A)."""
    copies = gaussian(1, 6, 9).expand(4, -1, -1)
    found = analyse("singular_value_bound", copies)
    torch.testing.assert_close(torch.tensor(found["copies"][0]), torch.tensor(found["stack"]))
    assert found["largest_deviation"] < 1e-6
    assert found["bound"][2] == pytest.approx([0.0] * 6, abs=1e-6)


@pytest.mark.parametrize("distance", [1e-3, 0.1, 1.0])
@pytest.mark.parametrize("shape", [(6, 9), (12, 5)])
def test_the_bound_holds_and_is_not_idle(shape: tuple[int, int], distance: float):
    stack = gaussian(1, *shape) + distance * gaussian(3, *shape, seed=1)
    found = analyse("singular_value_bound", stack)
    for copies, bounds in zip(found["copies"], found["bound"], strict=True):
        for one, limit, together in zip(copies, bounds, found["stack"], strict=False):
            assert abs(together - one) <= limit * (1 + 1e-9)
    assert 0.01 < found["largest_share"] <= 1 + 1e-9


def test_directions_of_no_energy_have_no_bound():
    stack = torch.zeros(2, 3, 3)
    stack[:, 0, 0] = 1
    assert analyse("singular_value_bound", stack)["bound"][0] == [0.0, None, None]


def test_rank_drop_goes_from_nothing_to_most():
    stack = gaussian(3, 20, 15)
    found = analyse("rank_drop", stack, rank_tolerance=0.0)
    assert found["rank"] == [20, 18, 16, 14, 12, 10, 8, 6, 4, 2]
    values = torch.linalg.svdvals(torch.cat(list(stack), dim=1).double()).square()
    expected = [float(values[:rank].sum() / values.sum()) for rank in found["rank"]]
    assert found["energy"] == pytest.approx(expected, abs=1e-6)
    assert found["change"][0] == 0
    assert found["cosine"][0] == pytest.approx(1)
    assert found["change"] == sorted(found["change"])
    assert found["cosine"] == sorted(found["cosine"], reverse=True)
