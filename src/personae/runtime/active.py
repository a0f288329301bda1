"""What is in force in each thread: a task, or several for a batch."""

import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn


@dataclass(frozen=True)
class Active:
    """A task, or several for a batch, as in force in one thread.

    Attributes:
        task: Its name; None of several.
        tasks: The names of all.
        model: The module to call.
        paths: What they change of the modules; empty where weights are in place.
    """

    task: str | None
    tasks: tuple[str, ...]
    model: nn.Module
    paths: Mapping[int, Callable[..., Any]] = field(default_factory=dict[int, Any])


class Threads:
    """Of each thread what is in force there; safe to share by them."""

    def __init__(self) -> None:
        """Nothing is in force."""
        self._active: WeakKeyDictionary[threading.Thread, Active] = WeakKeyDictionary()
        self._lock = threading.Lock()

    @property
    def here(self) -> Active | None:
        """What is in force in this thread; None if nothing is."""
        return self._active.get(threading.current_thread())

    @property
    def paths(self) -> Mapping[int, Callable[..., Any]] | None:
        """What it changes of the modules."""
        active = self.here
        return None if active is None else active.paths

    def task_of(self, thread: threading.Thread) -> str | None:
        """The one task in force in a thread; None if none is, or several are."""
        active = self._active.get(thread)
        return None if active is None else active.task

    def tasks(self) -> set[str]:
        """The tasks in force in any thread."""
        with self._lock:
            known = [*self._active.items()]
        return {task for thread, active in known if thread.is_alive() for task in active.tasks}

    def put(self, active: Active | None) -> None:
        """Note what is in force in this thread."""
        with self._lock:
            if active is None:
                self._active.pop(threading.current_thread(), None)
            else:
                self._active[threading.current_thread()] = active

    @contextmanager
    def during(self, active: Active) -> Generator[None]:
        """Something else than what is in force in this thread, for a while."""
        before = self.here
        self.put(active)
        try:
            yield
        finally:
            self.put(before)

    def clear(self) -> None:
        """Let nothing be in force anywhere."""
        with self._lock:
            self._active.clear()
