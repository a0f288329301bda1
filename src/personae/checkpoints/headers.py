"""The header of a safetensors file: read, checked, described.

Format: https://github.com/huggingface/safetensors#format
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from personae._small_files import Unfit, open_regular, parse_json
from personae._types import TensorSpec
from personae.checkpoints.specs import READABLE, dtype_faults
from personae.errors import Faults

LENGTH_BYTES = 8
_LFS = b"version https://git-lfs"
_LARGEST_HEADER = 100_000_000  # the format's own limit
_MOST_SIDES = 64  # torch's

Entry = tuple[str, tuple[int, ...], tuple[int, int]]
"""What a header says of one tensor: name of its dtype, shape, (begin, end) after the header."""


@dataclass(frozen=True)
class Header:
    """What one file says of its tensors: specs, where each begins after the header, ties."""

    specs: Mapping[str, TensorSpec]
    begins: Mapping[str, int]
    tied: Mapping[str, str]


def read_header(path: Path) -> tuple[Header, list[str]]:
    """Read and check one file's header; with any fault it comes back empty, beside the texts."""
    try:
        file = open_regular(path)
    except Unfit as error:
        return Header({}, {}, {}), [f"{path} {error}. Copy or download it again."]
    with file:
        size = os.fstat(file.fileno()).st_size
        header_bytes = int.from_bytes(file.read(LENGTH_BYTES), "little")
        readable = size >= LENGTH_BYTES and header_bytes <= min(_LARGEST_HEADER, size)
        text = file.read(header_bytes) if readable else b""
    try:
        content: Any = parse_json(text, _without_duplicates)
        metadata = as_metadata(content.pop("__metadata__", None))
        entries = {name: as_entry(**fields) for name, fields in content.items()}
    except (ValueError, TypeError, AttributeError):
        return Header({}, {}, {}), [unreadable(path)]
    return make_header(str(path), entries, metadata, size - LENGTH_BYTES - header_bytes)


def as_entry(dtype: object, shape: object, data_offsets: object) -> Entry:
    """Check the kind of each field of one tensor's entry.

    Raises:
        ValueError: A field is not of the kind the format prescribes.
    """
    sizes, places = _whole_numbers(shape), _whole_numbers(data_offsets)
    if not isinstance(dtype, str) or len(sizes) > _MOST_SIDES or len(places) != 2:
        raise ValueError("not the kind of field that the format prescribes")
    return dtype, sizes, (places[0], places[1])


def as_metadata(found: Any) -> dict[str, str]:
    """The `__metadata__` of a header, which is text by name; what is no text is left out.

    Raises:
        AttributeError: It is something else.
    """
    return {name: text for name, text in (found or {}).items() if isinstance(text, str)}


def _whole_numbers(values: object) -> tuple[int, ...]:
    """A list of sizes or places, none beyond what 64 bits hold.

    Raises:
        ValueError: It is not that.
    """
    if not isinstance(values, list | tuple) or not all(
        type(value) is int and 0 <= value < 2**63 for value in values
    ):
        raise ValueError("not a list of sizes or places")
    return tuple(values)


def make_header(
    where: str, entries: Mapping[str, Entry], metadata: Mapping[str, str], found_bytes: int | None
) -> tuple[Header, list[str]]:
    """Check a parsed header and describe its tensors.

    Args:
        where: The file, for texts.
        entries: By tensor name.
        metadata: The `__metadata__` entries; dropped shared tensors are mapped to kept ones there.
        found_bytes: Bytes after the header; None if not known.

    Returns:
        The header, empty if anything is wrong, and the texts of what is wrong.
    """
    faults = _entry_faults(where, entries, found_bytes)
    if faults:
        return Header({}, {}, {}), faults
    specs = {name: TensorSpec(name, e[1], READABLE[e[0]]) for name, e in entries.items()}
    begins = {name: begin for name, (_, _, (begin, _)) in entries.items()}
    tied = {name: kept for name, kept in metadata.items() if name not in specs and kept in specs}
    return Header(specs, begins, tied), []


def _entry_faults(where: str, entries: Mapping[str, Entry], found_bytes: int | None) -> list[str]:
    """Say what is wrong with dtypes, and with places, which must follow each other gaplessly."""
    faults = Faults()
    for fault in dtype_faults(where, {name: dtype for name, (dtype, _, _) in entries.items()}):
        faults.add(fault)
    expected = 0
    for name, (dtype, shape, (begin, end)) in sorted(entries.items(), key=lambda e: e[1][2]):
        known = READABLE.get(dtype)
        fits = known is None or end - begin == math.prod(shape) * known.itemsize
        if begin != expected or not fits:
            faults.add(f"{where} is damaged: the bytes of '{name}' do not fit its shape and place.")
        expected = end
    if found_bytes is not None and found_bytes != expected:
        faults.add(
            f"{where} is cut short or padded: {found_bytes} bytes of tensors found, {expected} "
            "expected. Copy or download it again."
        )
    return faults.messages


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is what a clone without git-lfs leaves in place of the weights."""
    with open_regular(path) as file:
        return file.read(len(_LFS)) == _LFS


def unreadable(path: Path) -> str:
    """What is to be said of a file that is no safetensors file."""
    if is_lfs_pointer(path):
        return f"{path} is a git-lfs pointer, not the weights. Fetch them: git lfs pull."
    return not_valid(str(path))


def not_valid(where: str) -> str:
    """What is to be said of a header that is none."""
    return (
        f"{where} is not a safetensors file, or is damaged: its header is not valid. Copy or "
        "download it again."
    )


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a dict from JSON pairs.

    Raises:
        ValueError: A name is given twice.
    """
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("duplicate names")
    return content
