"""One task's rebuilt weights in the place of the reference's: `merged` mode."""

import threading
from collections import Counter
from typing import NamedTuple

from personae.errors import WorkError
from personae.runtime.active import Threads
from personae.runtime.paths import changed
from personae.runtime.shells import Shell
from personae.runtime.variants import Variant


class _Held(NamedTuple):
    """Rebuilt weights in the place of the reference's.

    Attributes:
        thread: Which thread has them.
        shell: In which module.
        names: Which ones.
    """

    thread: threading.Thread
    shell: Shell
    names: frozenset[str]


class InPlace:
    """The weights of all shells, of which one thread at a time may have changed some.

    Whoever calls holds `lock` from the check of the others to the last change.

    Attributes:
        lock: Held while weights change, or while it is looked who has them.
    """

    def __init__(self, threads: Threads) -> None:
        """The reference's are in place."""
        self.lock = threading.RLock()
        self._threads = threads
        self._held: _Held | None = None
        self._calling = Counter[threading.Thread]()

    def put(self, variant: Variant, shell: Shell) -> None:
        """Put rebuilt weights in place, once all are rebuilt."""
        values = {
            name: variant.value(name).to(at[0].device, at[0].dtype)
            for name, at in changed(variant, shell).items()
        }
        self.put_back()
        self._held = _Held(threading.current_thread(), shell, frozenset(values))
        shell.put(values)

    def put_back(self) -> None:
        """Put the reference's weights in place, if others are."""
        if self._held is not None:
            shell = self._held.shell
            shell.put({name: shell.at_rest[name] for name in self._held.names})
            self._held = None

    def begin(self) -> None:
        """This thread computes with the weights as they are: others wait to change them."""
        with self.lock:
            self._calling[threading.current_thread()] += 1

    def end(self) -> None:
        """It computes no longer."""
        with self.lock:
            self._calling[threading.current_thread()] -= 1
            self._calling += Counter()  # keeps no thread that does not compute

    def check_free(self, what: str, *, weights_change: bool) -> None:
        """Check that no other thread needs the weights as they are.

        Args:
            what: This thread is about to do, in words.
            weights_change: Whether others that compute with the reference are in the way.

        Raises:
            WorkError: naming the thread that does.
        """
        here, held = threading.current_thread(), self._held
        remedy = 'or load the pack with mode="factored", in which each thread has its own task.'
        if held is not None and held.thread is not here and held.thread.is_alive():
            raise WorkError(
                f"Cannot {what}: thread '{held.thread.name}' has task "
                f"'{self._threads.task_of(held.thread)}' active, whose weights are in the model. "
                f"Deactivate it there, {remedy}"
            )
        busy = [thread for thread, calls in self._calling.items() if calls and thread is not here]
        if busy and weights_change:
            raise WorkError(
                f"Cannot {what}: thread '{busy[0].name}' computes with the model. "
                f"Wait for it, {remedy}"
            )
