"""Mapping over items: largest first, within workers and memory, torch's threads as they were."""

import threading
import time

import pytest
import torch

from personae.errors import BudgetError
from personae.run.work import Work


def test_every_item_once_and_largest_first():
    seen: list[int] = []
    items = [3, 1, 4, 1, 5]
    results = list(Work(workers=1).map(items, lambda n: seen.append(n) or n * n, cost=lambda n: n))
    assert seen == [5, 4, 3, 1, 1]
    assert sorted(results) == [(1, 1), (1, 1), (3, 9), (4, 16), (5, 25)]


@pytest.mark.parametrize(("workers", "memory", "most"), [(1, None, 1), (3, None, 3), (4, 25, 2)])
def test_no_more_at_once_than_workers_and_memory_allow(workers, memory, most):
    lock, now, peak = threading.Lock(), [0], [0]

    def work(_: int) -> None:
        with lock:
            now[0] += 1
            peak[0] = max(peak[0], now[0])
        time.sleep(0.005)
        with lock:
            now[0] -= 1

    list(Work(workers=workers, memory=memory).map(range(12), work, cost=lambda _: 10))
    assert peak[0] <= most


def test_an_item_above_the_bound_is_refused_before_any_work():
    seen: list[int] = []
    with pytest.raises(BudgetError, match="The largest tensor needs 30 bytes of memory"):
        Work(workers=1, memory=20).each([10, 30], seen.append, cost=lambda n: n)
    assert seen == []


def test_an_error_in_the_work_comes_through():
    def work(n: int) -> float:
        return 1 / n

    with pytest.raises(ZeroDivisionError):
        Work(workers=2).each([2, 1, 0], work, cost=lambda n: n)


@pytest.mark.parametrize("fails", [False, True])
def test_work_is_single_threaded_and_the_setting_comes_back(fails):
    torch.set_num_threads(2)
    inside: list[int] = []

    def work(_: int) -> None:
        inside.append(torch.get_num_threads())
        if fails:
            raise ValueError

    try:
        Work(workers=1).each([1, 2, 3], work, cost=lambda _: 1)
    except ValueError:
        assert fails
    assert set(inside) == {1}
    assert torch.get_num_threads() == 2


def test_nothing_to_do():
    assert list(Work(workers=2, memory=1).map([], str, cost=lambda _: 1)) == []


def test_progress_goes_on_from_what_an_earlier_run_has_done():
    steps: list[tuple[str, int, int]] = []
    work = Work(workers=1, progress=lambda *step: steps.append(step))
    assert len(list(work.map([7, 8], str, cost=lambda _: 1, stage="counting", done=3))) == 2
    assert steps == [("counting", 3, 5), ("counting", 4, 5), ("counting", 5, 5)]
    work.each([7], str, cost=lambda _: 1)
    assert len(steps) == 3
