"""Methods that need whole rows get them: in memory, in streams cut anywhere, of any model."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from families import State, saved, tuned
from personae import MergeSettings, merge, plan_merge
from personae.family import chunks
from personae.methods import MERGE_METHODS, DeltaBlocks, Site, Statistics, Undecided, _deltas
from personae.methods._entries import find_thresholds
from personae.methods._merge import RowWise
from personae.methods._method import Passes
from toys import load

SEEN: list[tuple[str, int, int]] = []
SHAPES = {
    "model.layers.0.mlp.weight": (40, 30),
    "model.layers.0.mlp.experts.up_proj": (3, 20, 16),
    "model.conv.weight": (4, 3, 2, 5),
    "model.norm.bias": (900,),
    "model.scale": (),
}


class LargestOfRow(RowWise):
    """The sum of the task vectors over the largest magnitude that the first has in the row."""

    whole_rows = True
    default_scope = "tensor"
    name = "largest_of_row"

    def passes(self, experts: int) -> Passes:
        """A pass that every method with thresholds takes: it is given whole rows too."""

        def seen(_: "LargestOfRow", site: Site):
            def look(start: int, deltas: Float[ndarray, "expert entry"]) -> ndarray:
                assert deltas.shape[1] % site.row_entries == 0
                assert (site.start + start) % site.row_entries == 0
                return deltas

            return look

        return {"thresholds": (yield from find_thresholds(0.5, experts, seen))}

    def merge_blocks(
        self,
        blocks: DeltaBlocks,
        statistics: Statistics,
        site: Site,
        undecided: Undecided | None = None,
    ) -> Iterator[Float[ndarray, " entry"]]:
        """See `Entrywise.merge_blocks`."""
        for start, deltas in blocks:
            SEEN.append((site.name, site.start + start, deltas.shape[1]))
            rows = deltas.reshape(len(deltas), -1, site.row_entries)
            largest = np.abs(rows[0]).max(axis=1, keepdims=True)
            yield (rows.sum(axis=0) / np.maximum(largest, 1e-6)).reshape(-1)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MERGE_METHODS, "largest_of_row", LargestOfRow)
    SEEN.clear()


def expected(base: Tensor, experts: list[Tensor]) -> Tensor:
    deltas = torch.stack([expert.double() - base.double() for expert in experts])
    largest = deltas[0].abs().amax(dim=-1, keepdim=True) if base.ndim else deltas[0].abs()
    return base.double() + deltas.sum(dim=0) / largest.clamp(min=1e-6)


def family() -> tuple[State, dict[str, State]]:
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return base, {name: tuned(base, seed) for seed, name in enumerate("ab", 1)}


@pytest.mark.parametrize(("block", "chunk"), [(1 << 15, 1 << 20), (64, 300), (7, 16)])
def test_rows_are_whole_however_tensors_are_cut(
    block: int, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Rows are longer than blocks and chunks, or some to a block; a vector is one row."""
    monkeypatch.setattr(_deltas, "BLOCK", block)
    monkeypatch.setattr(chunks, "CHUNK_ENTRIES", chunk)
    monkeypatch.setattr(chunks, "ITEM_ENTRIES", 4 * chunk)
    base, experts = family()
    paths = {name: saved(state, tmp_path / name) for name, state in experts.items()}
    merge(saved(base, tmp_path / "base"), paths, tmp_path / "out", LargestOfRow())
    for name, tensor in load(tmp_path / "out").items():
        wanted = expected(base[name], [state[name] for state in experts.values()])
        torch.testing.assert_close(tensor.double(), wanted, rtol=1e-5, atol=1e-5)
    row_of = {name: shape[-1] if shape else 1 for name, shape in SHAPES.items()}
    assert all(start % row_of[name] == count % row_of[name] == 0 for name, start, count in SEEN)
    most = {name: max(count for seen, _, count in SEEN if seen == name) for name in SHAPES}
    assert all(most[name] <= max(block, row_of[name]) for name in SHAPES)
    assert most["model.norm.bias"] == 900


def test_rows_are_those_of_the_tensor_as_it_is_stored():
    stack = torch.tensor([[[1.0, -2.0], [4.0, 3.0]]])
    for transposed in (False, True):
        merged = LargestOfRow().apply(stack, site=Site("w", (2, 2), transposed=transposed))
        assert merged.tolist() == [[0.5, -1.0], [1.0, 0.75]]


def test_plans_count_rows_that_are_longer_than_blocks(monkeypatch: pytest.MonkeyPatch):
    """A block of one row of 900, and one of 100 entries.

    An entry is 4 bytes of each expert and 4 of the base; beside that DARE's is the sum's 4, and 28
    where nothing else is said.
    """
    monkeypatch.setattr(_deltas, "BLOCK", 100)
    base, experts = family()
    by_rows, by_entries = (
        plan_merge(base, experts, MergeSettings(method=name, only=("model.norm.bias",))).largest
        for name in ("largest_of_row", "dare")
    )
    assert by_rows - by_entries == 900 * (2 * 4 + 4 + 28) - 100 * (2 * 4 + 4 + 4)
