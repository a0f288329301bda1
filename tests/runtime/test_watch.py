"""Models that read tensors past their layers, or give layers what has no rows."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from personae import SVD, load, pack
from personae.errors import MethodError


class Positions(nn.Module):
    """Adds to its input a table of positions that has passed through a layer, without rows."""

    def __init__(self, past: bool) -> None:
        super().__init__()
        self.past = past
        self.table = nn.Embedding(8, 6)
        self.layer = nn.Linear(6, 6)

    def forward(self, given: Tensor) -> Tensor:
        places = torch.arange(given.shape[1])
        table = self.table.weight[places] if self.past else self.table(places)
        return self.layer(given) + self.layer(table)


GIVEN = torch.linspace(-1, 1, 3 * 6 * 6).reshape(3, 6, 6)


def positions(seed: int, past: bool) -> Positions:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Positions(past).eval()


def packed(past: bool, directory: Path) -> tuple[Positions, Path]:
    base = positions(0, past)
    experts = {"a": positions(1, past), "b": positions(2, past)}
    return base, pack(base, experts, directory / "pack", SVD(rank_fraction=1.0)).directory


def test_a_tensor_that_is_read_past_its_layer_is_refused(tmp_path: Path):
    base, directory = packed(True, tmp_path)
    runtime = load(directory, model=base, mode="factored")
    runtime.activate("a")
    for _ in range(2):
        with pytest.raises(MethodError, match=r"Positions reads table\.weight without calling"):
            runtime(GIVEN) if runtime.task else runtime.activate("a")
        runtime.deactivate()
    torch.testing.assert_close(runtime(GIVEN), positions(0, True)(GIVEN))
    merged = load(directory, model=base)
    with merged.activate("a"):
        torch.testing.assert_close(merged(GIVEN), positions(1, True)(GIVEN))


def test_rows_of_a_layer_that_is_given_none_are_computed_in_turn(tmp_path: Path):
    """As many positions as rows twice over, which shapes alone would take for rows."""
    base, directory = packed(False, tmp_path)
    runtime = load(directory, model=base, mode="factored")
    got = runtime(GIVEN, tasks=["b", "a", "b"])
    for row, seed in enumerate((2, 1, 2)):
        torch.testing.assert_close(got[row], positions(seed, False)(GIVEN[row : row + 1])[0])
    assert runtime.task is None
