"""Compiling loops with Numba: once for each signature, kept in the user's cache directory.

Loops run over entries innermost and without branches, so that they are vectorised. No flag lets the
compiler round otherwise than the code says: results are the same on every processor.
"""

import hashlib
import inspect
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core.caching import FunctionCache
from numba.extending import intrinsic as _intrinsic

Loop = TypeVar("Loop", bound=Callable[..., Any])
Number = float | np.float32
intrinsic: Any = _intrinsic
"""Makes an instruction of a function that gives its types and builds it; loops call it as typed."""

_CONFIG: Any = numba.config  # pyright: ignore[reportPrivateImportUsage]
_log = logging.getLogger(__name__)


def kernel(loop: Loop) -> Loop:
    """Compile a function at its first call; it runs without Python's lock."""
    plain = inspect.unwrap(loop)  # what checks types in tests cannot be compiled
    compiled: Any = numba.njit(nogil=True, error_model="numpy")(plain)
    if _cache_directory() is not None:
        compiled._cache = _kept(plain)
    return compiled


class _Kept(FunctionCache):
    """Compiled code on disk; a disk that refuses costs the time of compiling, not the work.

    So do files that are damaged: they are written anew.
    """

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Code from the disk; None if there is none that can be read."""
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # whatever unpickling or LLVM say of damaged code
            _log.debug("a loop is compiled again, as its code cannot be read: %s", error)
            with suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep code on the disk, if it can be."""
        with suppress(OSError):
            super().save_overload(sig, data)


def _kept(plain: Callable[..., Any]) -> FunctionCache:
    """Where the code of a function is kept; other users of Numba keep theirs where they like."""
    before = _CONFIG.CACHE_DIR
    _CONFIG.CACHE_DIR = _cache_directory()
    try:
        return _Kept(plain)
    finally:
        _CONFIG.CACHE_DIR = before


@cache
def _cache_directory() -> str | None:
    """A directory that can be written to, named after all loops' text; None if there is none."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    text = b"".join(source.read_bytes() for source in sources)
    try:
        home = Path(_CONFIG.CACHE_DIR) if _CONFIG.CACHE_DIR else _user_cache() / "personae"
        folder = home / f"kernels-{hashlib.sha256(text).hexdigest()[:16]}"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return str(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        _log.debug("loops are compiled in memory, for this run alone: %s", error)
        return None


def _user_cache() -> Path:
    """Where this system's programs keep what they can make again."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local")
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


@intrinsic
def as_bits(_: Any, value: Any) -> Any:
    """The bits of an fp32 number, as uint32."""

    def build(_: Any, builder: Any, __: Any, given: Any) -> Any:
        return builder.bitcast(given[0], ir.IntType(32))

    return types.uint32(types.float32), build


@intrinsic
def as_number(_: Any, bits: Any) -> Any:
    """The fp32 number that has these bits, a uint32."""

    def build(_: Any, builder: Any, __: Any, given: Any) -> Any:
        return builder.bitcast(given[0], ir.FloatType())

    return types.float32(types.uint32), build


@intrinsic
def fused(_: Any, one: Any, other: Any, summand: Any) -> Any:
    """One * other + summand in fp32, rounded once."""

    def build(_: Any, builder: Any, __: Any, given: Any) -> Any:
        return builder.fma(*given)

    return types.float32(types.float32, types.float32, types.float32), build


@intrinsic
def multiply_add(_: Any, high: Any, low: Any, other: Any, summand: Any) -> Any:
    """(high · 2⁶⁴ + low) · other + summand modulo 2¹²⁸, where these two are pairs of uint64."""
    pair = types.UniTuple(types.uint64, 2)

    def build(context: Any, builder: Any, _: Any, given: Any) -> Any:
        wide, half = ir.IntType(128), ir.IntType(64)

        def join(high: Any, low: Any) -> Any:
            shifted = builder.shl(builder.zext(high, wide), ir.Constant(wide, 64))
            return builder.or_(shifted, builder.zext(low, wide))

        def both(place: int) -> Any:
            return join(*(builder.extract_value(given[place], n) for n in (0, 1)))

        found = builder.add(builder.mul(join(given[0], given[1]), both(2)), both(3))
        parts = [builder.lshr(found, ir.Constant(wide, 64)), found]
        halves = [builder.trunc(part, half) for part in parts]
        return context.make_tuple(builder, pair, halves)

    return pair(types.uint64, types.uint64, pair, pair), build
