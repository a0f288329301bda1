"""What entry-wise methods hold of a block, counted by NumPy's own allocations, beside the plan."""

import tracemalloc

import numpy as np
import pytest
import torch

from personae.methods import BLOCK, MERGE_METHODS, DeltaBlocks, Entrywise, Site, Undecided

SHAPE = 4 * BLOCK // 512, 512
CASES = [
    (name, experts)
    for name, method in sorted(MERGE_METHODS.items())
    if issubclass(method, Entrywise)
    for experts in ([method.takes] if method.takes else [2, 6])
]
HEADERS = 40_000
"""Bytes of the objects around the arrays."""


class Unheard(Undecided):
    """Keeps nothing of what it is told."""

    def add(self, places: np.ndarray, positive: np.ndarray, negative: np.ndarray) -> None:
        """See `Undecided.add`."""
        self.count += len(places)


@pytest.mark.parametrize(("name", "experts"), CASES)
def test_no_more_is_held_than_is_planned(name: str, experts: int):
    method, site = MERGE_METHODS[name](), Site("w", SHAPE)
    assert isinstance(method, Entrywise)
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(SHAPE, generator=draw)
    deltas = torch.randn(experts, *SHAPE, generator=draw)
    models, reference = list(base + deltas), None if method.of_models() else base
    given = deltas if reference is not None else torch.stack(models)
    statistics = method.statistics([(site, given)])

    def merge() -> None:
        blocks = DeltaBlocks(models, reference).in_rows(method.row_entries(site))
        told = Unheard() if method.can_decide_late else None
        for block in method.merge_blocks(blocks, statistics, site, told):
            del block  # written, and not held beside the next

    merge()  # compiled, and what is kept is kept
    tracemalloc.start()
    merge()
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    planned = method.block_bytes(site, base.numel(), experts, has_reference=reference is not None)
    assert held <= planned + HEADERS
    assert planned <= 1.3 * held
