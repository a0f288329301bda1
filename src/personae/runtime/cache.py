"""What is decoded and held in memory, bounded in bytes; the least recently used goes first."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable
from typing import Generic, Protocol, TypeVar, runtime_checkable

from personae.errors import BudgetError

CACHE = "1GB"
"""Bytes of decoded factors held, by default."""


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
    """Entries by key. What is in use stays; the rest makes room for what is asked for."""

    def __init__(self, limit: int, in_use: Callable[[], Collection[Hashable]]) -> None:
        """Start empty.

        Args:
            limit: Most bytes held.
            in_use: The keys that must stay.
        """
        self._limit, self._in_use = limit, in_use
        self._entries: OrderedDict[Hashable, Entry] = OrderedDict()
        self._lock, self._making = threading.Lock(), threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(entry.nbytes for entry in [*self._entries.values()])

    def get(
        self,
        key: Hashable,
        make: Callable[[], Entry],
        size: Callable[[], int],
        beside: Collection[Hashable] = (),
    ) -> Entry:
        """The entry of this key, made if it is not there.

        Args:
            key: What it goes by.
            make: Makes it.
            size: Bytes it will take, known before it is made.
            beside: Further keys that must stay.

        Raises:
            BudgetError: naming the smallest cache that holds it beside what is in use.
        """
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key]
        with self._making:  # one at a time; what is there is handed out meanwhile
            with self._lock:
                if key in self._entries:
                    return self._entries[key]
                self._make_room(size(), {*self._in_use(), *beside})
            made = make()
            with self._lock:
                self._entries[key] = made
            return made

    def drop(self, key: Hashable) -> None:
        """Forget one."""
        with self._lock:
            self._entries.pop(key, None)

    def _make_room(self, nbytes: int, kept: Collection[Hashable]) -> None:
        staying = sum(entry.nbytes for key, entry in self._entries.items() if key in kept)
        if staying + nbytes > self._limit:
            used = f" beside {staying} bytes of what is in use" if staying else ""
            raise BudgetError(
                f"The factors take {nbytes} bytes{used}; the cache holds {self._limit}. "
                f"Load the pack with a cache of at least {staying + nbytes} bytes, or fewer tasks "
                "at once."
            )
        for key in [*self._entries]:
            if self.nbytes + nbytes <= self._limit:
                return
            if key not in kept:
                del self._entries[key]
