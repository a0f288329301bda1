"""What the program settles before anything heavy loads: its streams, Ctrl-C, the working directory.

Work must not depend on who watches it: a closed stream must not give its number to a weight file, a
terminal that cannot show a letter shows its code instead, and notes that nobody can read are lost
alone. Until Ctrl-C is heard it interrupts with a traceback: only what is needed is imported.
"""

import contextlib
import io
import os
import signal
import sys

_STDOUT, _STDERR = 1, 2
_REFUSED, _INTERRUPTED = 2, 130


class _Lossy(io.RawIOBase):
    """Writes to a file descriptor, and drops what it refuses: a full disk, a reader that left."""

    def __init__(self, descriptor: int) -> None:
        """Write to this descriptor."""
        self._descriptor = descriptor

    def writable(self) -> bool:
        """It is made to be written."""
        return True

    def isatty(self) -> bool:
        """Whether a terminal shows it."""
        return os.isatty(self._descriptor)

    def fileno(self) -> int:
        """The descriptor."""
        return self._descriptor

    def write(self, data: object, /) -> int:
        """Write all of it, or as much as there is room for."""
        rest = memoryview(data)  # pyright: ignore[reportArgumentType]
        with contextlib.suppress(OSError):
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        return len(data)  # pyright: ignore[reportArgumentType]


def start() -> None:
    """Settle streams, Ctrl-C and the working directory; exits 2 where there is none."""
    signal.signal(signal.SIGINT, _interrupted)
    open_streams()
    try:
        os.getcwd()  # noqa: PTH109 - pathlib takes longer to load than all of this
    except OSError:
        sys.stderr.write("error: The working directory is gone. Change to one that is there.\n")
        sys.stderr.flush()
        os._exit(_REFUSED)


def open_streams() -> None:
    """Make the standard streams usable, whatever the caller gave.

    A closed one goes nowhere. Letters that an encoding lacks, and names that are no text, are
    written by their codes. What standard error cannot take is dropped.
    """
    while (handle := os.open(os.devnull, os.O_RDWR)) <= _STDERR:
        pass  # a closed stream's number, which the next file opened would get
    os.close(handle)
    if sys.stdout is None:  # pyright: ignore[reportUnnecessaryComparison]
        sys.stdout = open(_STDOUT, "w", closefd=False)
    sys.stdout.reconfigure(errors="backslashreplace")  # pyright: ignore
    encoding = sys.stderr.encoding if sys.stderr else sys.stdout.encoding  # pyright: ignore
    sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(_Lossy(_STDERR)),
        encoding=encoding,
        errors="backslashreplace",
        line_buffering=True,
    )


def _interrupted(*_: object) -> None:
    """End at once: while modules load, nothing has begun."""
    with contextlib.suppress(OSError):
        os.write(_STDERR, b"\nInterrupted before anything began.\n")
    os._exit(_INTERRUPTED)
