"""Joint decompositions: orthonormal, exact, and LAPACK's in fp64, on ill-conditioned stacks too."""

import pytest
import torch

from personae.ops.stacks import StackedSVD, stacked_rank, stacked_svd

SHAPES = {"wide": (4, 24, 40), "square": (2, 24, 12), "tall": (2, 60, 10), "one": (1, 30, 20)}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def graded(shape: tuple[int, int, int], smallest: float, seed: int = 0) -> torch.Tensor:
    """A stack whose matrices side by side have singular values from 1 to `smallest`, in fp32."""
    experts, rows, columns = shape
    short = min(rows, experts * columns)
    draw = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(rows, short, generator=draw).double())
    v, _ = torch.linalg.qr(torch.randn(experts * columns, short, generator=draw).double())
    values = torch.logspace(0, torch.tensor(smallest).log10().item(), short, dtype=torch.float64)
    beside = (u * values) @ v.T
    return beside.reshape(rows, experts, columns).movedim(1, 0).float().contiguous()


def side_by_side(stack: torch.Tensor) -> torch.Tensor:
    return torch.cat(list(stack), dim=1)


def lapack(stack: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.linalg.svd(side_by_side(stack).double(), full_matrices=False)


def right_vectors(svd: StackedSVD) -> torch.Tensor:
    return side_by_side(svd.coordinates.double()) / svd.values.double()[:, None]


@shapes
@pytest.mark.parametrize("smallest", [0.5, 1e-3, 1e-6])
def test_agrees_with_lapack_in_fp64(shape: tuple[int, int, int], smallest: float):
    stack = graded(shape, smallest)
    svd = stacked_svd(stack)
    u, values, vh = lapack(stack)
    assert len(svd.values) == len(values)
    torch.testing.assert_close(svd.values.double(), values, rtol=1e-5, atol=0)
    # Equal up to the sign of each direction, which is fixed here.
    signs = (svd.basis.double() * u).sum(dim=0).sign()
    torch.testing.assert_close(svd.basis.double(), u * signs, rtol=0, atol=2e-6)
    torch.testing.assert_close(right_vectors(svd), vh * signs[:, None], rtol=0, atol=2e-6)


@shapes
@pytest.mark.parametrize("smallest", [0.5, 1e-3, 1e-6])
def test_orthonormal_and_exact(shape: tuple[int, int, int], smallest: float):
    stack = graded(shape, smallest)
    svd = stacked_svd(stack)
    eye = torch.eye(len(svd.values), dtype=torch.float64)
    basis, right = svd.basis.double(), right_vectors(svd)
    assert (basis.T @ basis - eye).abs().max() < 1e-6
    assert (right @ right.T - eye).abs().max() < 1e-5
    torch.testing.assert_close(svd.basis @ svd.coordinates, stack, rtol=0, atol=1e-6)
    assert (svd.values.diff() <= 1e-6 * svd.values[:-1]).all()


def test_directions_are_counted_in_either_precision():
    """1, 0.8, 0.5 and 0.05 of σ₁: three above 0.1, four above 0.001."""
    stack = torch.diag(torch.tensor([1.0, 0.8, 0.5, 0.05])).reshape(1, 4, 4)
    for size in (1.0, 1e-25, 1e25):  # squares would leave the range of fp32
        assert stacked_rank(size * stack, 0.1) == 3
        assert stacked_rank(size * stack, 1e-3) == 4


def test_tolerance_drops_directions_and_null_space_is_always_dropped():
    stack = graded((3, 16, 20), 1e-4)
    values = lapack(stack)[1]
    for tolerance in (0.0, 1e-3, 1e-2, 0.5):
        expected = int((values > tolerance * values[0]).sum())
        svd = stacked_svd(stack, tolerance)
        assert svd.basis.shape == (16, expected)
        assert svd.coordinates.shape == (3, expected, 20)
        assert stacked_rank(stack, tolerance) == expected
    draw = torch.Generator().manual_seed(0)
    low = torch.randn(16, 2, generator=draw) @ torch.randn(3, 2, 20, generator=draw)
    assert len(stacked_svd(low).values) == 2


def test_singular_values_of_copies_are_root_n_times_those_of_one():
    matrix = graded((1, 12, 9), 1e-2)
    for copies in (2, 5):
        svd = stacked_svd(matrix.repeat(copies, 1, 1))
        torch.testing.assert_close(svd.values, copies**0.5 * stacked_svd(matrix).values)


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12, 1e18])
def test_very_small_and_very_large(scale: float):
    stack = graded((3, 8, 10), 0.1)
    svd = stacked_svd(scale * stack)
    torch.testing.assert_close(svd.values / scale, stacked_svd(stack).values)
    rebuilt = svd.basis @ (svd.coordinates / scale)
    torch.testing.assert_close(rebuilt, stack, rtol=0, atol=1e-6)


def test_zeros_have_no_directions():
    svd = stacked_svd(torch.zeros(3, 4, 5))
    assert (svd.basis.shape, svd.values.shape, svd.coordinates.shape) == ((4, 0), (0,), (3, 0, 5))
    assert stacked_rank(torch.zeros(3, 4, 5), 0.1) == 0


def test_input_is_not_modified_and_signs_are_fixed():
    stack = graded((3, 8, 10), 0.1)
    before = stack.clone()
    svd = stacked_svd(stack)
    assert torch.equal(stack, before)
    largest = svd.basis.gather(0, svd.basis.abs().argmax(dim=0)[None])
    assert (largest > 0).all()
    assert torch.equal(svd.basis, stacked_svd(-stack).basis)
