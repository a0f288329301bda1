"""Truncated SVD against torch.linalg.svd in fp64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from personae._types import SVD
from personae.errors import MethodError
from personae.ops import gram, krylov
from personae.ops import svd as module
from personae.ops.svd import Solver, fix_signs, truncated_svd
from pretend_device import DEVICE, PretendDevice

SOLVERS: list[Solver] = ["auto", "randomised", "gram", "full"]
SHAPES = [(64, 64), (48, 160), (160, 48), (1, 7), (7, 1)]


def gaussian(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_spectrum(out: int, into: int, values: Tensor) -> Tensor:
    left, _ = torch.linalg.qr(gaussian(out, len(values), seed=2).double())
    right, _ = torch.linalg.qr(gaussian(into, len(values), seed=3).double())
    return ((left * values.double()) @ right.T).float()


def exact_energy(matrix: Tensor, rank: int) -> float:
    return float(torch.linalg.svdvals(matrix.double())[:rank].square().sum())


def assert_orthonormal(svd: SVD) -> None:
    identity = torch.eye(len(svd.singular_values))
    torch.testing.assert_close(svd.u.T @ svd.u, identity, atol=5e-5, rtol=0)
    torch.testing.assert_close(svd.vh @ svd.vh.T, identity, atol=5e-5, rtol=0)


@pytest.mark.parametrize("decay", [0.0, 0.5, 2.0, "noise"])
@pytest.mark.parametrize("fraction", [0.07, 0.3, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_captures_the_leading_energy(
    solver: Solver, shape: tuple[int, int], fraction: float, decay: float | str
) -> None:
    small = min(shape)
    rank = max(1, int(fraction * small))
    steps = torch.arange(1, small + 1).float()
    noise = isinstance(decay, str)
    matrix = gaussian(*shape) if noise else with_spectrum(*shape, steps**-decay)
    before = matrix.clone()
    svd = truncated_svd(matrix, rank, solver=solver)

    assert torch.equal(matrix, before)
    assert svd.u.shape == (shape[0], rank) and svd.vh.shape == (rank, shape[1])
    assert_orthonormal(svd)
    assert (svd.singular_values.diff() <= 0).all()
    best = exact_energy(matrix, rank)
    assert float(svd.singular_values.double().square().sum()) == pytest.approx(best, rel=1e-3)
    captured = (svd.u.double().T @ matrix.double()).square().sum()
    assert float(captured) == pytest.approx(best, rel=1e-3)
    # A = U Σ Vᵀ + E with ‖E‖² = ‖A‖² − Σσ²: u, σ and vh belong together.
    rebuilt = (svd.u * svd.singular_values) @ svd.vh
    left_out = exact_energy(matrix, small) - best
    error = float((matrix - rebuilt).double().square().sum())
    assert error == pytest.approx(left_out, abs=2e-3 * best)


@pytest.mark.parametrize("kind", ["decaying", "noise"])
def test_randomised_accepts_its_own_basis_within_tolerance(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decaying = with_spectrum(600, 640, torch.arange(1, 601).float() ** -0.5)
    matrix = decaying if kind == "decaying" else gaussian(600, 640)
    monkeypatch.setattr(module, "by_eigenvectors", None)  # a fallback would raise TypeError
    svd = truncated_svd(matrix, 40)
    assert_orthonormal(svd)
    assert 0.999 <= float(svd.singular_values.square().sum()) / exact_energy(matrix, 40) < 1.00001


def test_randomised_hands_over_where_its_basis_misses_energy() -> None:
    # Gaussian noise: three quarters of the small side as basis are too few for the top half.
    matrix = gaussian(200, 220)
    assert krylov.by_lanczos(matrix, 100, 0, block=16, limit=150) is None
    with_more_room = krylov.by_lanczos(matrix, 100, 0, block=16, limit=200)
    assert with_more_room is not None
    for ours, exact in zip(
        truncated_svd(matrix, 100, solver="randomised"),
        truncated_svd(matrix, 100, solver="gram"),
        strict=True,
    ):
        assert torch.equal(ours, exact)


def test_the_check_sees_a_head_that_the_basis_has_not_found() -> None:
    # θ = 4 coupled by r = 3 to a direction of energy 4: [[4, 3], [3, 4]] has 7, a gain of 3 over 4.
    gain = gram.estimated_gain(torch.tensor([4.0]), torch.tensor([3.0]), 4.0)
    assert gain == pytest.approx(3 / 4)
    # θ = 8, μ = 2, r = 4: h = 3, √(9 + 16) − 3 = 2; relative to 8.
    gain = gram.estimated_gain(torch.tensor([8.0]), torch.tensor([4.0]), 2.0)
    assert gain == pytest.approx(2 / 8)


@pytest.mark.parametrize(
    ("shape", "rank", "chosen"),
    [
        ((200, 200), 60, "gram"),  # small: the exact one
        ((768, 768), 53, "randomised"),
        ((768, 768), 230, "gram"),
        ((768, 768), 600, "gram"),
        ((4096, 4096), 286, "randomised"),
        ((4096, 4096), 1228, "gram"),
        ((256, 30_000), 17, "gram"),  # long to read
    ],
)
def test_the_solver_that_is_chosen(shape: tuple[int, int], rank: int, chosen: Solver) -> None:
    assert module._choose(*shape, rank)[0] == chosen


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("inner", [1, 16])
def test_low_rank_delta_has_its_own_rank(solver: Solver, inner: int) -> None:
    matrix = gaussian(300, inner) @ gaussian(inner, 260, seed=2)
    svd = truncated_svd(matrix, 200, solver=solver)
    assert len(svd.singular_values) == inner
    assert_orthonormal(svd)
    torch.testing.assert_close((svd.u * svd.singular_values) @ svd.vh, matrix, atol=1e-4, rtol=0)


@pytest.mark.parametrize("rank", [400, 800])
def test_low_rank_delta_is_recognised_without_an_eigendecomposition(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "by_eigenvectors", None)
    svd = truncated_svd(gaussian(1100, 64) @ gaussian(64, 1100, seed=2), rank)
    assert len(svd.singular_values) == 64


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("rank", [0, 3, 50])
def test_zero_matrix_has_rank_zero(solver: Solver, rank: int) -> None:
    u, values, vh = truncated_svd(torch.zeros(9, 5), rank, solver=solver)
    assert (u.shape, values.shape, vh.shape) == ((9, 0), (0,), (0, 5))


@pytest.mark.parametrize("solver", SOLVERS)
def test_rank_zero_and_rank_beyond_the_small_side(solver: Solver) -> None:
    matrix = gaussian(9, 5)
    assert truncated_svd(matrix, 0, solver=solver).u.shape == (9, 0)
    whole = truncated_svd(matrix, 99, solver=solver)
    assert whole.u.shape == (9, 5)
    torch.testing.assert_close((whole.u * whole.singular_values) @ whole.vh, matrix)


def test_empty_matrix() -> None:
    u, values, vh = truncated_svd(torch.zeros(0, 5), 3)
    assert (u.shape, values.shape, vh.shape) == ((0, 0), (0,), (0, 5))


@pytest.mark.parametrize("solver", ["full", "gram"])
def test_small_values_of_an_ill_conditioned_matrix(solver: Solver) -> None:
    values = 10.0 ** -torch.linspace(0, 4, 24)  # 1 … 1e-4; squared 1e-8, below eps of fp32
    svd = truncated_svd(with_spectrum(40, 60, values), 24, solver=solver)
    torch.testing.assert_close(svd.singular_values, values, rtol=5e-3, atol=0)
    assert_orthonormal(svd)


def test_tolerance_drops_what_is_at_or_below_it() -> None:
    matrix = torch.diag(torch.tensor([4.0, 2.0, 1.0]))
    at_tie = truncated_svd(matrix, 3, solver="full", rank_tolerance=0.5)  # 2 ≤ 0.5 · 4
    assert at_tie.singular_values.tolist() == [4.0]
    assert len(truncated_svd(matrix, 3, rank_tolerance=0.4).singular_values) == 2


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("solver", SOLVERS)
def test_very_small_and_large_entries(solver: Solver, scale: float) -> None:
    matrix = gaussian(20, 30)
    values = truncated_svd(matrix * scale, 5, solver=solver).singular_values
    expected = truncated_svd(matrix, 5, solver="full").singular_values
    torch.testing.assert_close(values / scale, expected, rtol=1e-3, atol=0)


def test_signs_by_hand() -> None:
    svd = SVD(
        # Largest magnitude per column: -4 (flip); -2 before +2 (tie, the first: flip); 5 (keep).
        torch.tensor([[3.0, 1.0, 5.0], [-4.0, -2.0, -1.0], [0.0, 2.0, 0.0]]),
        torch.tensor([3.0, 2.0, 1.0]),
        torch.tensor([[1.0, -1.0], [2.0, 0.0], [-3.0, 4.0]]),
    )
    fixed = fix_signs(svd)
    flipped = torch.tensor([[-3.0, -1.0, 5.0], [4.0, 2.0, -1.0], [0.0, -2.0, 0.0]])
    assert torch.equal(fixed.u, flipped)
    assert torch.equal(fixed.vh, torch.tensor([[-1.0, 1.0], [-2.0, 0.0], [-3.0, 4.0]]))


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
@pytest.mark.parametrize("solver", SOLVERS)
def test_signs_are_fixed_unless_left_to_the_solver(solver: Solver, shape: tuple[int, int]) -> None:
    svd = truncated_svd(gaussian(*shape), 12, solver=solver)
    largest = svd.u.gather(0, svd.u.abs().argmax(dim=0)[None])
    assert (largest > 0).all()
    loose = truncated_svd(gaussian(*shape), 12, solver=solver, signs="solver")
    assert torch.equal(fix_signs(loose).u, svd.u) and torch.equal(fix_signs(loose).vh, svd.vh)
    assert not torch.equal(loose.u, svd.u)


@pytest.mark.parametrize("solver", SOLVERS)
def test_same_bytes_and_global_generator_untouched(solver: Solver) -> None:
    matrix = with_spectrum(600, 80, torch.arange(1, 81).float() ** -1)
    torch.manual_seed(7)
    first = truncated_svd(matrix, 5, solver=solver)
    drawn = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(3))
    again = truncated_svd(matrix, 5, solver=solver)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_another_seed_is_another_start() -> None:
    matrix = gaussian(64, 80)
    one, two = (krylov.by_lanczos(matrix, 4, seed, block=16, limit=64) for seed in (0, 1))
    assert one is not None and two is not None and not torch.equal(one.u, two.u)


@pytest.mark.parametrize("solver", SOLVERS)
def test_transposing_swaps_the_factors(solver: Solver) -> None:
    matrix = with_spectrum(40, 60, torch.arange(1, 41).float() ** -1)
    plain = truncated_svd(matrix, 8, solver=solver)
    turned = truncated_svd(matrix.T, 8, solver=solver)
    torch.testing.assert_close(turned.singular_values, plain.singular_values, rtol=1e-3, atol=0)
    torch.testing.assert_close(
        (turned.u * turned.singular_values) @ turned.vh,
        ((plain.u * plain.singular_values) @ plain.vh).T,
        atol=5e-3,
        rtol=0,
    )


def test_half_precision_in_single_out() -> None:
    assert {part.dtype for part in truncated_svd(gaussian(6, 8).bfloat16(), 3)} == {torch.float32}


@given(
    st.integers(1, 6),
    st.integers(1, 6),
    st.lists(st.integers(-4, 4), min_size=36, max_size=36),
    st.integers(0, 7),
    st.sampled_from(SOLVERS),
)
def test_integer_matrices(out: int, into: int, entries: list[int], rank: int, solver: Solver):
    matrix = torch.tensor(entries[: out * into]).reshape(out, into).float()
    svd = truncated_svd(matrix, rank, solver=solver)
    true_rank = int(torch.linalg.matrix_rank(matrix.double()))
    assert len(svd.singular_values) == min(rank, true_rank)
    expected = torch.linalg.svdvals(matrix.double())[: min(rank, true_rank)].float()
    torch.testing.assert_close(svd.singular_values, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
def test_computes_on_the_device_of_the_matrix(solver: Solver) -> None:
    matrix = gaussian(300, 280)
    with PretendDevice():
        there = truncated_svd(matrix.to(DEVICE), 20, solver=solver)
        assert {part.device for part in there} == {DEVICE}
        there = SVD(*(part.cpu() for part in there))
    assert all(map(torch.equal, there, truncated_svd(matrix, 20, solver=solver)))


def test_negative_rank_is_refused() -> None:
    with pytest.raises(MethodError, match=r"rank is -1, expected 0 or more"):
        truncated_svd(gaussian(3, 4), -1)
