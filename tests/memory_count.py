"""The peak of memory that tensors take, counted allocation by allocation: no clock, no RSS."""

import tracemalloc
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from personae import _memory


def peak_bytes(work: Callable[[], Any]) -> int:
    """Peak of what PyTorch and NumPy hold beyond what they held before, inside operations too.

    The peaks of the two are added: they may be apart, so that this is at most too much. All that
    `uninitialised` gives is taken from PyTorch, where it is counted.
    """
    with (
        patch.object(_memory, "_SMALLEST", 1 << 62),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded,
    ):
        tracemalloc.start()  # not before: the first profile imports much
        work()
        arrays = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    result = recorded.profiler
    assert result is not None and result.kineto_results is not None
    events = [e for e in result.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
        most = max(most, held)
    if held and _release(torch.__version__) < (2, 8):
        pytest.skip("this version of PyTorch does not record all tensors that are freed")
    return most + arrays


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])
