"""What is decoded and held in memory, bounded in bytes."""

import threading
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Generic, Protocol, TypeVar, runtime_checkable

CACHE = "4%"
"""Bytes of decoded tensors held, by default, over those of the reference."""


@runtime_checkable
class Sized(Protocol):
    """What knows its size.

    Attributes:
        nbytes: Bytes of its tensors.
    """

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        ...


Entry = TypeVar("Entry", bound=Sized)


class Cache(Generic[Entry]):
    """Entries by task and name. What does not fit is made again whenever it is asked for.

    A forward pass asks for all entries of its tasks in one order, and the next pass again: what was
    asked for longest ago is what is needed next. So entries of tasks in use do not go for newer
    ones, but for smaller ones, of which more fit; making one costs something whatever its size.
    Those of other tasks make room first, the least recently used task's before others.

    Attributes:
        nbytes: Bytes held.
    """

    def __init__(self, limit: int, in_use: Callable[[], Collection[str]]) -> None:
        """Start empty.

        Args:
            limit: Most bytes held.
            in_use: The tasks that are.
        """
        self.nbytes = 0
        self._limit, self._in_use = limit, in_use
        self._tasks: OrderedDict[str, dict[str, Entry]] = OrderedDict()
        self._sizes: list[tuple[int, str, str]] = []  # with task and name, ascending
        self._lock = threading.Lock()

    def get(self, task: str, name: str, make: Callable[[], Entry]) -> Entry:
        """An entry, made if it is not there; by several threads at once, if they ask at once.

        Args:
            task: Whose it is.
            name: What it goes by there.
            make: Makes it.
        """
        with self._lock:
            if task in self._tasks:
                self._tasks.move_to_end(task)
                if name in self._tasks[task]:
                    return self._tasks[task][name]
        made = make()
        with self._lock:
            if name not in self._tasks.get(task, ()) and self._make_room(made.nbytes):
                self._put(task, name, made)
        return made

    def drop(self, task: str) -> None:
        """Forget all entries of a task."""
        with self._lock:
            for name in [*self._tasks.get(task, ())]:
                self._pop(task, name)

    def _make_room(self, nbytes: int) -> bool:
        """Let go what may go, as far as needed; whether there is room for so many bytes."""
        if nbytes > self._limit:
            return False
        if self._fits(nbytes):
            return True
        in_use = self._in_use()
        for task in [task for task in self._tasks if task not in in_use]:
            for name in [*self._tasks[task]]:
                self._pop(task, name)
                if self._fits(nbytes):
                    return True
        if self._sizes[-1][0] > nbytes:
            self._pop(*self._sizes[-1][1:])
        return self._fits(nbytes)

    def _fits(self, nbytes: int) -> bool:
        return self.nbytes + nbytes <= self._limit

    def _put(self, task: str, name: str, made: Entry) -> None:
        self._tasks.setdefault(task, {})[name] = made
        insort(self._sizes, (made.nbytes, task, name))
        self.nbytes += made.nbytes

    def _pop(self, task: str, name: str) -> None:
        nbytes = self._tasks[task].pop(name).nbytes
        del self._sizes[bisect_left(self._sizes, (nbytes, task, name))]
        self.nbytes -= nbytes
        if not self._tasks[task]:
            del self._tasks[task]
