"""What hostile files hold, drawn by hypothesis; and the bounds within which each must be read."""

import copy
import functools
import operator
import resource
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import Phase
from hypothesis import strategies as st

Json = Any
Path = tuple[Any, ...]
"""Keys and numbers from the root of a document to a place in it."""

PHASES = (Phase.generate,)
"""Without shrinking: what is drawn is told, and is short."""

_LONGEST = 2.0
"""Seconds of this process's own time: beyond, it hangs.

The slowest of 4,000 edits of manifests took 0.1 s on a busy core of an AMD EPYC, as did the slowest
of recipes, headers and adapters.
"""
_FIRST, _FIRST_USES = 20.0, 3
"""What so many cases of a process may take, in which libraries are loaded and loops compiled."""
_slow: list[float] = []
_MOST = 1 << 29
"""Bytes, for files of kilobytes."""


@contextmanager
def within_bounds() -> Generator[None]:
    """Check that what is done takes neither long nor much memory."""
    began, held = time.process_time(), _peak()
    yield
    took = time.process_time() - began
    if took >= _LONGEST:
        _slow.append(took)
    assert took < _FIRST and len(_slow) <= _FIRST_USES
    assert _peak() - held < _MOST


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def places(node: Json, path: Path = ()) -> Iterator[Path]:
    """Every place in a document below its root."""
    listed = enumerate(node) if isinstance(node, list) else ()
    for key, value in node.items() if isinstance(node, dict) else listed:
        yield (*path, key)
        yield from places(value, (*path, key))


ODD: list[Json] = [
    *(None, True, False, "", [], {}, [[]], -1, 0, 1, 2, 3, 4, 7, 8, 16, 20, 2**31, 2**53, 2**63),
    *(10**30, -0.5, 0.5, 1e308, float("inf"), float("nan"), "1", "load", "__dict__", "float32"),
    *("int64", "complex64", "float8_e4m3fn", "base", "merged", "reference", "difference", "svd"),
    *("~nosuchuser/x", "/dev/zero", "../x", "tasks/x", "pack.json", "\0", "a" * 300, "\x1b[2J"),
    *([30000000, 32], [-4, -4], [0], [1] * 70, ["a"], {"a": "b"}, {"a": 1}, {"exact": 4}),
    *("layer.weight", "embed.weight", "head.weight", ["layer.weight"], ["layer.weight"] * 2),
    *({"layer.weight": "float16"}, {"layer.weight": "int8"}, {"x": "layer.weight"}),
    *({"x": "y", "y": "layer.weight"}, {"model.safetensors": {"stored_in": "task", "sha256": ""}}),
]


def edit(content: Json, data: st.DataObject, paths: list[Path]) -> Path:
    """Replace, remove, rename one of these places, or put another in it; returns which."""
    path = data.draw(st.sampled_from(paths), "path")
    parent = functools.reduce(operator.getitem, path[:-1], content)
    how = data.draw(
        st.sampled_from(["odd", "odd", "odd", "near", "other", "drop", "rename"]), "how"
    )
    value = parent[path[-1]]
    if how == "drop":
        del parent[path[-1]]
    elif how == "rename" and isinstance(parent, dict):
        parent[data.draw(st.sampled_from(["x", "head.weight", "scale", "rows", "é"]))] = parent.pop(
            path[-1]
        )
    elif how == "near" and isinstance(value, int):
        parent[path[-1]] = value + data.draw(st.sampled_from([-1, 1, 7, 8]), "by")
    elif how == "other":
        other = data.draw(st.sampled_from(paths), "from")
        source = functools.reduce(
            lambda node, key: node[key] if node is not None and _has(node, key) else None,
            other,
            content,
        )
        parent[path[-1]] = copy.deepcopy(source)
    else:
        parent[path[-1]] = copy.deepcopy(data.draw(st.sampled_from(ODD), "value"))
    return path


def _has(node: Json, key: Any) -> bool:
    return key in node if isinstance(node, dict) else isinstance(node, list) and key < len(node)
