"""The local pool: independent work items on threads, within a memory bound.

Each worker computes on one thread of its own, so that neither the number of workers nor the order
in which they finish changes a byte of what is computed (sums split over threads would).
"""

import heapq
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

import torch

from personae.errors import BudgetError

Item = TypeVar("Item")
Result = TypeVar("Result")


_KEPT = 11 << 20
_MOST_KEPT = 208 << 20


def default_workers() -> int:
    """As many workers as this process may use cores."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def held_at_once(costs: Iterable[int], workers: int, memory: int | None) -> int:
    """Peak memory of the largest items that workers can have under way within the bound.

    The C library keeps some of what is freed, and BLAS some for itself: an eighth, as measured
    (`benchmarks/memory.py`), up to a limit; that is in no bound.
    """
    largest = heapq.nlargest(workers, costs)
    kept = sum(_KEPT + min(cost // 8, _MOST_KEPT) for cost in largest)
    return kept + (sum(largest) if memory is None else min(sum(largest), memory))


def check_memory(largest: int, memory: int | None, what: str) -> None:
    """Refuse a memory bound below the largest item.

    Raises:
        BudgetError: naming the item and the bytes it needs.
    """
    if memory is not None and largest > memory:
        raise BudgetError(
            f"{what} needs {largest:,} bytes of memory, the bound is {memory:,}. "
            f"Give --memory {-(-largest // 2**20)}MiB or more."
        )


def run(
    items: Sequence[Item],
    work: Callable[[Item], Result],
    *,
    cost: Callable[[Item], int],
    workers: int,
    memory: int | None = None,
    in_order: bool = False,
) -> Iterator[tuple[Item, Result]]:
    """Apply `work` to every item, and yield results as they finish.

    Args:
        items: What to work on; independent of each other.
        work: Pure function of one item, run on a thread that computes single-threaded.
        cost: Peak bytes one item needs while it is worked on.
        workers: Items worked on at the same time, at most.
        memory: Bound in bytes on the summed cost of items under way; None for no bound.
        in_order: Begins items in the order given, as reading a disk wants; else largest first,
            so that all workers end at about the same time.

    Raises:
        BudgetError: if one item alone exceeds the bound.
    """
    order = list(items) if in_order else sorted(items, key=cost, reverse=True)  # stable
    check_memory(max(map(cost, order), default=0), memory, "The largest tensor")
    waiting = iter(order)
    held = next(waiting, None)
    under_way: dict[Future[Result], Item] = {}
    used = 0
    with _single_threaded(workers) as pool:
        while held is not None or under_way:
            while held is not None and len(under_way) < workers:
                if under_way and memory is not None and used + cost(held) > memory:
                    break
                used += cost(held)
                under_way[pool.submit(work, held)] = held
                held = next(waiting, None)
            done, _ = wait(under_way, return_when=FIRST_COMPLETED)
            while done:  # emptied, so that no result outlives the caller's use of it
                future = done.pop()
                item = under_way.pop(future)
                yield item, future.result()
                used -= cost(item)
                del future


@contextmanager
def _single_threaded(workers: int) -> Generator[ThreadPoolExecutor]:
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(
        workers, thread_name_prefix="personae", initializer=torch.set_num_threads, initargs=(1,)
    )
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)  # the setting is per thread and per process at once
