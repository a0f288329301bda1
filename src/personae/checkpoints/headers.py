"""The header of a safetensors file: read, checked, described.

Format: https://github.com/huggingface/safetensors#format
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from personae._types import TensorSpec
from personae.checkpoints.specs import READABLE, dtype_fault
from personae.errors import Faults

LENGTH_BYTES = 8
_LARGEST_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class Header:
    """What one file says of its tensors: specs, where each begins after the header, ties."""

    specs: Mapping[str, TensorSpec]
    begins: Mapping[str, int]
    tied: Mapping[str, str]


def read_header(path: Path) -> tuple[Header, list[str]]:
    """Read and check one file's header; with any fault it comes back empty, beside the texts."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(LENGTH_BYTES), "little")
        readable = size >= LENGTH_BYTES and header_bytes <= min(_LARGEST_HEADER, size)
        text = file.read(header_bytes) if readable else b""
    try:
        content: Any = json.loads(text, object_pairs_hook=_without_duplicates)
        metadata: dict[str, str] = content.pop("__metadata__", None) or {}
        entries = {
            str(name): (
                str(e["dtype"]),
                tuple(map(int, e["shape"])),
                tuple(map(int, e["data_offsets"])),
            )
            for name, e in content.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        fault = f"{path} is not a safetensors file, or is damaged: its header makes no sense."
        return Header({}, {}, {}), [fault]
    found = size - LENGTH_BYTES - header_bytes
    return make_header(str(path), entries, metadata, found)


def make_header(
    where: str,
    entries: Mapping[str, tuple[str, tuple[int, ...], tuple[int, ...]]],
    metadata: Mapping[str, str],
    found_bytes: int | None,
) -> tuple[Header, list[str]]:
    """Check a parsed header and describe its tensors.

    Args:
        where: The file, for texts.
        entries: Name to (dtype name, shape, (begin, end)).
        metadata: The `__metadata__` entries; dropped shared tensors are mapped to kept ones there.
        found_bytes: Bytes after the header; None if not known.

    Returns:
        The header, empty if anything is wrong, and the texts of what is wrong.
    """
    faults = Faults()
    expected = 0
    for name, (dtype, shape, (begin, *rest)) in sorted(entries.items(), key=lambda e: e[1][2]):
        fault = dtype_fault(where, name, dtype)
        if fault:
            faults.add(fault)
        nbytes = rest[0] - begin if len(rest) == 1 else -1
        fits = fault or nbytes == math.prod(shape) * READABLE[dtype].itemsize
        if begin != expected or nbytes < 0 or not fits:
            faults.add(f"{where} is damaged: the bytes of '{name}' do not fit its shape and place.")
        expected = begin + max(nbytes, 0)
    if found_bytes is not None and found_bytes != expected:
        faults.add(
            f"{where} is cut short or padded: {found_bytes} bytes of tensors found, {expected} "
            "expected. Copy or download it again."
        )
    if faults.messages:
        return Header({}, {}, {}), faults.messages
    header = Header(
        {
            name: TensorSpec(name, shape, READABLE[dtype])
            for name, (dtype, shape, _) in entries.items()
        },
        {name: offsets[0] for name, (_, _, offsets) in entries.items()},
        {name: kept for name, kept in metadata.items() if name not in entries and kept in entries},
    )
    return header, []


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a dict from JSON pairs.

    Raises:
        ValueError: A name is given twice.
    """
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("duplicate names")
    return content
