"""What something takes: seconds, and the memory of this process at its peak."""

import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Taken:
    """What it took.

    Attributes:
        seconds: Of the clock.
        peak_bytes: Of memory, above what was held before; None where the system does not tell.
    """

    seconds: float = 0.0
    peak_bytes: int | None = None


@contextmanager
def measured() -> Generator[Taken]:
    """Measure what happens in the block; what it took is known at its end.

    Yields:
        What is filled in then.
    """
    taken = Taken()
    before = _resident("VmRSS") if _reset_peak() else None
    start = time.perf_counter()
    try:
        yield taken
    finally:
        taken.seconds = time.perf_counter() - start
        peak = _resident("VmHWM")
        if before is not None and peak is not None:
            taken.peak_bytes = max(0, peak - before)


def _reset_peak() -> bool:
    """Let the system forget the peak so far; Linux alone can."""
    try:
        _RESET.write_text("5", "ascii")
    except OSError:
        return False
    return True


def _resident(key: str) -> int | None:
    try:
        lines = _STATUS.read_text("ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{key}:")]
    return 1024 * int(found[0]) if found else None
