"""TSV-C: each task keeps its share of the directions of an exact SVD."""

import pytest
import torch

from personae import _types
from personae.methods.codecs.tsv_c import TSVCompress


def test_diagonal_by_hand():
    # 2 tasks: ⌊3 / 2⌋ = 1 direction of diag(3, 2, 1); 1 · (3 + 3 + 1) numbers.
    delta = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    codec = TSVCompress().for_family([{}, {}])
    assert codec.rank((3, 3)) == 1
    given = _types.SVD(torch.eye(3), torch.tensor([3.0, 2.0, 1.0]), torch.eye(3))
    parts = codec.encode(delta, given)
    assert {name: values.tolist() for name, values in parts.items()} == {
        "left": [1, 0, 0],
        "singular_values": [3],
        "right": [1, 0, 0],
    }
    assert codec.decode(parts, (3, 3)).tolist() == [[3, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert codec.bits((3, 3)) == (7 * 32, 7 * 32, 7 * 32)


@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_error_is_that_of_the_best_approximation(tasks: int):
    delta = torch.randn(20, 31, generator=torch.Generator().manual_seed(0))
    codec = TSVCompress(tasks=tasks)
    error = codec.decode(codec.encode(delta), (20, 31)) - delta
    left_out = torch.linalg.svdvals(delta.double())[20 // tasks :].square().sum()
    torch.testing.assert_close(error.double().square().sum(), left_out, rtol=1e-4, atol=1e-8)


def test_given_tasks_are_kept():
    assert TSVCompress(tasks=4).for_family([{}, {}]) == TSVCompress(tasks=4)
    assert TSVCompress().for_family([{}] * 3) == TSVCompress(tasks=3)
