"""How to work: workers, memory, device, progress; and the work itself, item by item.

Workers and memory never change a byte. A device sums in an order of its own, so that the last bits
of what it computes may differ from the CPU's.
"""

import heapq
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, TypeVar

import numpy as np
import torch

from personae._memory import give_back_freed
from personae.errors import BudgetError, RecipeError

Item = TypeVar("Item")
Result = TypeVar("Result")
Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many steps are done, and how many there are."""

_BESIDE, _BESIDE_UNSUMMED = 2 << 20, 3 << 19
"""Memory of the process beside its workers, as measured: what is summed, noted and written; and
where it sums nothing."""
_KEPT = 11 << 20
"""What BLAS and the C library keep for each worker, as measured, where it is at work..."""
_SMALL, _MOST_KEPT = 16 << 20, 208 << 20
"""...and of an item larger than the first, an eighth of what is beyond, up to the second."""


def silent(_stage: str, _done: int, _total: int) -> None:
    """Nobody watches."""


def _ignored(_text: str) -> None:
    """Nobody reads."""


def _unrecorded(_name: str, _fact: Any) -> None:
    """Nobody records."""


@dataclass(frozen=True)
class Work:
    """How to work: workers, memory bound, device, progress.

    Attributes:
        workers: Tensors worked on at once; None for one a core.
        memory: Bound in bytes on the working memory of the CPU; None for no bound. What a device
            holds at once is no more than that.
        device: Where deltas are decomposed and decoded: `auto` (CUDA where there is any), `cpu`,
            `cuda` or `cuda:i`. Results come back to the CPU.
        progress: Told how far the work is.
        note: Told, a line each, what a person should know: prefixes, private tensors.
        fact: Told, as plain values under a name, what only the work itself could find.
    """

    workers: int | None = None
    memory: int | None = None
    device: str = "cpu"
    progress: Progress = silent
    note: Callable[[str], None] = _ignored
    fact: Callable[[str, Any], None] = _unrecorded

    @property
    def threads(self) -> int:
        """Number of workers."""
        return self.workers or default_workers()

    @property
    def torch_device(self) -> torch.device:
        """The device to compute on.

        Raises:
            RecipeError: if there is no such device here.
        """
        if self.device == "cpu":
            return torch.device("cpu")
        available = torch.cuda.is_available()
        if self.device == "auto":
            return torch.device("cuda" if available else "cpu")
        kind, _, index = self.device.partition(":")
        if kind != "cuda" or (index and not index.isdigit()):
            raise RecipeError(f"Unknown device '{self.device}'. Give auto, cpu, cuda or cuda:N.")
        if not available or (index and int(index) >= torch.cuda.device_count()):
            raise RecipeError(f"There is no device '{self.device}' here. Give auto or cpu.")
        return torch.device(self.device)

    def map(
        self,
        items: Sequence[Item],
        function: Callable[[Item], Result],
        *,
        cost: Callable[[Item], int],
        stage: str = "",
        done: int = 0,
        in_order: bool = False,
    ) -> Iterator[tuple[Item, Result]]:
        """Apply a function to every item, and yield items and results as they finish.

        Each worker computes on one thread of its own, so that neither the number of workers nor
        the order in which they finish changes a byte of what is computed (sums split over threads
        would).

        Args:
            items: What to work on; independent of each other.
            function: Pure function of one item.
            cost: Peak bytes one item needs while it is worked on.
            stage: What progress calls it; progress is not told where this is empty.
            done: Items that an earlier run has done, for progress.
            in_order: Begins items in the order given, as reading a disk wants; else largest
                first, so that all workers end at about the same time.

        Raises:
            BudgetError: if one item alone exceeds the memory bound.
        """
        order = [(item, cost(item)) for item in items]
        if not in_order:
            order.sort(key=itemgetter(1), reverse=True)  # stable
        check_memory(max((need for _, need in order), default=0), self.memory, "The largest tensor")
        waiting = iter(order)
        held = next(waiting, None)
        under_way: dict[Future[Result], tuple[Item, int]] = {}
        used, total, progress = 0, done + len(order), self.progress if stage else silent
        progress(stage, done, total)
        with _single_threaded(self.threads) as pool:
            while held is not None or under_way:
                while held is not None and len(under_way) < self.threads:
                    item, need = held
                    if under_way and self.memory is not None and used + need > self.memory:
                        break
                    used += need
                    under_way[pool.submit(function, item)] = held
                    held = next(waiting, None)
                finished, _ = wait(under_way, return_when=FIRST_COMPLETED)
                while finished:  # emptied, so that no result outlives the caller's use of it
                    future = finished.pop()
                    item, need = under_way.pop(future)
                    yield item, future.result()
                    used -= need
                    del future
                    done += 1
                    progress(stage, done, total)

    def each(
        self,
        items: Sequence[Item],
        function: Callable[[Item], object],
        *,
        cost: Callable[[Item], int],
        stage: str = "",
        in_order: bool = False,
    ) -> None:
        """The same, where the function does all there is to do."""
        for _ in self.map(items, function, cost=cost, stage=stage, in_order=in_order):
            pass


def default_workers() -> int:
    """As many workers as this process may use cores."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def held_at_once(
    costs: Iterable[int],
    workers: int,
    memory: int | None,
    *,
    in_loops: bool = False,
    summed: bool = True,
) -> int:
    """Peak memory of the largest items that workers can have under way within the bound.

    BLAS keeps some memory for itself, and the C library some of what PyTorch frees: of large items
    an eighth, as measured (`benchmarks/memory.py`), up to a limit. That is in no bound. Where all
    is done `in_loops`, on chunks in blocks of their own (`_memory.py`), nothing is kept. What
    workers find is `summed` beside them, unless each keeps to tensors of its own.
    """
    largest = heapq.nlargest(workers, costs)
    kept = _BESIDE if summed else _BESIDE_UNSUMMED
    if not in_loops:
        kept += sum(_KEPT + min(max(cost - _SMALL, 0) // 8, _MOST_KEPT) for cost in largest)
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


def quiet_numbers() -> np.errstate:
    """Let numbers leave the range without NumPy's warnings: what is written is checked as such."""
    return np.errstate(all="ignore")


def _begin_worker() -> None:
    torch.set_num_threads(1)
    np.seterr(all="ignore")  # as `quiet_numbers`, for as long as the thread lives


@contextmanager
def _single_threaded(workers: int) -> Generator[ThreadPoolExecutor]:
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="personae", initializer=_begin_worker)
    try:
        with quiet_numbers():
            yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        give_back_freed()
        torch.set_num_threads(before)  # the setting is per thread and per process at once
