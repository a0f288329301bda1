from typing import Any

import pytest
import torch

from personae import _types
from personae.errors import PackError
from personae.methods import _codec
from personae.methods.codecs.svd import SVD


def test_diagonal_by_hand():
    delta = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    identity = torch.eye(3)
    given = _types.SVD(identity, torch.tensor([3.0, 2.0, 1.0]), identity)
    codec = SVD(rank_fraction=0.67)  # ⌊0.67 · 3⌋ = 2
    parts = codec.encode(delta, given)
    assert parts["left"].tolist() == [1, 0, 0, 1, 0, 0]
    assert parts["singular_values"].tolist() == [3, 2]
    assert parts["right"].tolist() == [1, 0, 0, 0, 1, 0]
    assert torch.equal(codec.decode(parts, (3, 3)), torch.diag(torch.tensor([3.0, 2.0, 0.0])))
    # 32 bits · (2 · (3 + 3) + 2)
    assert codec.bits((3, 3)) == (448, 448, 448)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 2, 2), (1, 48), (48, 1)])
def test_what_is_no_matrix_is_exact(shape: tuple[int, ...]):
    """Nor is one row or one column, as in the code that the published AMRs came from."""
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    parts = SVD().encode(delta)
    assert torch.equal(SVD().decode(parts, shape), delta)
    assert SVD().bits(shape).paper == 32 * delta.numel()


def test_best_approximation_of_its_rank():
    # Eckart–Young: the squared error is the sum of the squared singular values left out.
    delta = torch.randn(40, 60, generator=torch.Generator().manual_seed(0))
    codec = SVD(rank_fraction=0.25)
    decoded = codec.decode(codec.encode(delta), (40, 60))
    left_out = torch.linalg.svdvals(delta.double())[10:].square().sum()
    torch.testing.assert_close(
        (decoded - delta).double().square().sum(), left_out, rtol=1e-4, atol=0
    )


def test_full_rank_gives_the_delta_back():
    delta = torch.randn(12, 9, generator=torch.Generator().manual_seed(0))
    codec = SVD(rank_fraction=1.0)
    torch.testing.assert_close(codec.decode(codec.encode(delta), (12, 9)), delta)


def test_options_of_the_decomposition_reach_the_solver(monkeypatch: pytest.MonkeyPatch):
    seen: dict[str, Any] = {}

    def fake(matrix: torch.Tensor, rank: int, **options: Any) -> _types.SVD:
        seen.update(options, rank=rank)
        return _types.SVD(matrix[:, :rank], torch.ones(rank), matrix[:rank])

    monkeypatch.setattr(_codec, "truncated_svd", fake)
    SVD(solver="gram", rank_tolerance=0.5).decompose(torch.eye(5), 2)
    assert seen == {"rank": 2, "solver": "gram", "rank_tolerance": 0.5}


def test_damaged_parts_are_refused():
    parts = SVD(rank_fraction=0.5).encode(torch.eye(4))
    with pytest.raises(PackError, match="'left' has 7 elements, expected 8"):
        SVD().decode({**parts, "left": parts["left"][1:]}, (4, 4))
