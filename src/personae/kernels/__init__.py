"""Compiled loops over entries, in NumPy arrays: what row-wise methods are made of.

Numba is loaded when the first of them is used. Blocks of entries are to be few enough for the cache
of a core, and many beside the cost of a call, a microsecond.
"""

import importlib
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from personae.errors import MethodError

if TYPE_CHECKING:
    from personae.kernels.draws import drop
    from personae.kernels.magnitudes import (
        count_magnitudes,
        count_ties,
        drop_ties,
        sample,
        sum_magnitudes,
        trim,
    )
    from personae.kernels.ranks import drop_by_rank
    from personae.kernels.signs import (
        elect_by_count,
        elect_by_mass,
        max_agreeing,
        mean_agreeing,
        reduce_either,
        sum_agreeing,
        weighted_mean_agreeing,
    )
    from personae.kernels.stored import add_multiple, store, store_sum, subtract, widen
    from personae.kernels.sums import (
        add_inner_products,
        count_apart,
        deviations,
        keep_apart,
        keep_marked,
        multi_task_vector,
        weighted_sum,
    )
    from personae.kernels.trellis import follow, read_path, write_path

alone = False
"""Whether nothing else in this process uses Numba, so that it need not load SciPy for its BLAS."""

_HOMES = {
    "draws": ("drop",),
    "magnitudes": (
        "count_magnitudes",
        "count_ties",
        "drop_ties",
        "sample",
        "sum_magnitudes",
        "trim",
    ),
    "ranks": ("drop_by_rank",),
    "signs": (
        "elect_by_count",
        "elect_by_mass",
        "max_agreeing",
        "mean_agreeing",
        "reduce_either",
        "sum_agreeing",
        "weighted_mean_agreeing",
    ),
    "stored": ("add_multiple", "store", "store_sum", "subtract", "widen"),
    "sums": (
        "add_inner_products",
        "count_apart",
        "deviations",
        "keep_apart",
        "keep_marked",
        "multi_task_vector",
        "weighted_sum",
    ),
    "trellis": ("follow", "read_path", "write_path"),
}

__all__ = [
    "add_inner_products",
    "add_multiple",
    "count_apart",
    "count_magnitudes",
    "count_ties",
    "deviations",
    "drop",
    "drop_by_rank",
    "drop_ties",
    "elect_by_count",
    "elect_by_mass",
    "follow",
    "keep_apart",
    "keep_marked",
    "max_agreeing",
    "mean_agreeing",
    "multi_task_vector",
    "read_path",
    "reduce_either",
    "sample",
    "store",
    "store_sum",
    "subtract",
    "sum_agreeing",
    "sum_magnitudes",
    "trim",
    "weighted_mean_agreeing",
    "weighted_sum",
    "widen",
    "write_path",
]


def __getattr__(name: str) -> Any:
    """Find a loop, and keep it for the next time.

    Raises:
        AttributeError: if there is no such loop.
        ImportError: if something else than Numba cannot be loaded.
        MethodError: if Numba cannot be.
    """
    home = next((home for home, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module 'personae.kernels' has no attribute '{name}'")
    try:
        with _without_scipy():
            importlib.import_module("numba.np.arraymath")
        _refuse_plain_python()
        module = importlib.import_module(f"personae.kernels.{home}")
    except ImportError as error:
        if not (error.name or "").startswith(("numba", "llvmlite")):
            raise
        raise MethodError(
            f"This method runs in compiled loops, and Numba cannot be loaded: {error}. "
            "Install it with: pip install numba"
        ) from error
    globals()[name] = found = getattr(module, name)
    return found


def _refuse_plain_python() -> None:
    """Loops run compiled, or not at all.

    Raises:
        MethodError: if Numba is told not to compile.
    """
    numba: Any = sys.modules["numba"]
    if numba.config.DISABLE_JIT:
        raise MethodError(
            "This method runs in compiled loops, and NUMBA_DISABLE_JIT keeps Numba from compiling. "
            "Unset it."
        )


@contextmanager
def _without_scipy() -> Generator[None]:
    """Where Numba is ours alone, tell it that there is no SciPy: half of its time to load."""
    name = "scipy.linalg"
    if not alone or name in sys.modules:
        yield
        return
    modules: dict[str, Any] = sys.modules  # pyright: ignore[reportAssignmentType]
    modules[name] = None
    try:
        yield
    finally:
        modules.pop(name, None)
