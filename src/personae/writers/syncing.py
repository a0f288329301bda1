"""Hands written bytes to the disk while more are computed, so that little is left at the end."""

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from personae.writers.atomic import output_errors

_AT_ONCE = 64 << 20
"""Bytes that are written before the disk is given them."""


class Syncing:
    """Syncs files beside the threads that write them; `finish` syncs what is left."""

    def __init__(self, files: Sequence[BinaryIO]) -> None:
        """Nothing is written yet; files may still be added to the sequence."""
        self._files = files
        self._bytes = 0
        self._lock = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopped = False
        self._error: OSError | None = None
        self._failed: Path | None = None

    def wrote(self, count: int) -> None:
        """So many bytes more were written; from any thread.

        Raises:
            OutputError: if the disk refused what was written before.
        """
        self._raise_if_refused()
        with self._lock:
            self._bytes += count
            if self._bytes < _AT_ONCE:
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="personae-sync", daemon=True)
                self._thread.start()
            self._lock.notify()

    def stop(self) -> None:
        """Sync no more; returns when nothing is under way."""
        with self._lock:
            self._stopped = True
            self._lock.notify()
        if self._thread is not None:
            self._thread.join()

    def finish(self) -> None:
        """Sync what is left, and end.

        Raises:
            OutputError: if the disk is full or refuses, now or before.
        """
        self.stop()
        # A file tells of an error once: the sync at the end would not hear of it again.
        if self._error is None:
            self._sync()
        self._raise_if_refused()

    def _raise_if_refused(self) -> None:
        if self._error is not None:
            assert self._failed is not None
            with output_errors(self._failed):
                raise self._error

    def _run(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._stopped or self._bytes >= _AT_ONCE)
                if self._stopped:
                    return
                self._bytes = 0
            if not self._sync():
                return

    def _sync(self) -> bool:
        """Sync all files; whether the disk took them."""
        for file in self._files:
            try:
                os.fsync(file.fileno())
            except OSError as error:
                self._failed, self._error = Path(file.name), error  # in this order: others look
                return False
        return True
