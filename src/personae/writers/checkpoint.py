"""A streaming writer of safetensors checkpoints: headers first, values in any order.

Every offset is known before the first value, so tensors, or rows of them, go straight to their
place on disk from any thread, and none is held. The bytes depend only on the specs and the values.
"""

import json
import math
import os
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from personae._types import TensorSpec
from personae.errors import Faults, MethodError, WorkError
from personae.writers.atomic import output_errors, require_space
from personae.writers.syncing import Syncing

# Last first, this is the order of the format's own library: widest first, so that all are aligned.
_CODES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}
_MOST_AT_ONCE = 1 << 30  # some systems refuse 2 GiB
_REPLACED_AT_ONCE = 1 << 20
"""Bytes of a file that are read to write single values into them."""
_LAYOUT_ORDER = {dtype: -place for place, dtype in enumerate(_CODES)}

SHARD_BYTES = 5_000_000_000
"""Most bytes in one weight file, unless something else is asked for."""


class _Place(NamedTuple):
    """Where one tensor's bytes go, and which `(start, stop)` of them are there."""

    spec: TensorSpec
    file: BinaryIO
    offset: int
    written: list[tuple[int, int]]


def cast(tensor: Tensor, spec: TensorSpec, computed: bool) -> Tensor:
    """Cast to the dtype of the spec (to nearest, ties to even).

    Args:
        tensor: The values.
        spec: What they shall be.
        computed: Whether they are a result, which has to be finite, and not a copy.

    Raises:
        MethodError: if a finite value does not fit in it, or a computed one is not finite.
    """
    narrow = tensor.to(spec.dtype)
    if not narrow.is_floating_point() or (tensor.dtype == spec.dtype and not computed):
        return narrow
    wide = narrow.float() if narrow.dtype.itemsize == 1 else narrow
    # NaN passes through both extremes; fast, since nothing is copied.
    if all(map(math.isfinite, torch.stack(wide.aminmax()).tolist())):
        return narrow
    lost = ~wide.isfinite() if computed else tensor.isfinite() & ~wide.isfinite()
    if not bool(lost.any()):
        return narrow
    value = tensor[lost].flatten()[0].item()
    if math.isfinite(value):
        raise MethodError(
            f"Tensor '{spec.name}' holds {value:.6g}, but the largest {spec.dtype} is "
            f"{torch.finfo(spec.dtype).max:.6g}. Write another dtype, such as float32."
        )
    raise MethodError(
        f"Tensor '{spec.name}' comes out as {value} in {int(lost.sum())} place(s), although its "
        "inputs are finite: sums exceed the range of float32. Give smaller weights or scales, or "
        "leave the tensor out with 'skip'."
    )


class CheckpointWriter:
    """Writes one checkpoint into a directory: `model.safetensors`, or shards and their index.

    Use it as a context manager: leaving the block normally is `close`. It writes final names, so
    give it the directory of `output_directory`.

    Attributes:
        files: The weight files, in order of their numbers.
    """

    def __init__(
        self,
        directory: Path,
        specs: Iterable[TensorSpec],
        *,
        shard_bytes: int = SHARD_BYTES,
        tied: Mapping[str, str] | None = None,
        copies: Mapping[str, torch.dtype] | None = None,
        again: bool = False,
        stem: str = "model",
        folders: Iterable[str] = (),
        computed: Collection[str] = (),
    ) -> None:
        """Write the headers and reserve the files.

        Args:
            directory: An existing directory without weight files.
            specs: Every tensor to be written, with the dtype to write it in; their order is free.
            shard_bytes: Most bytes of values in one file; a larger tensor gets its own file.
            tied: Dropped name to the kept name (one of `specs`) it shares storage with; noted in
                the header of the file that holds the kept one, as safetensors does.
            copies: Names of `tied` that are not noted but written out again, each with its tensor:
                its values as they are stored, cast to the copy's dtype.
            stem: What the weight files are called.
            folders: Folders with files of their own: a tensor FOLDER/NAME is NAME in FOLDER's.
            computed: Names of tensors whose values were computed: they must be finite. Others are
                copied as they are.
            again: Goes on with the files that an earlier run of the same specs may have reserved;
                `mark` says what it wrote.

        Raises:
            OutputError: if the disk lacks the space or refuses.
        """
        tied, copies = tied or {}, copies or {}
        self._copies = {copy: tied[copy] for copy in copies}
        ordered = sorted(with_copies(specs, tied, copies), key=lambda spec: spec.name)
        self._directory = directory
        self.files: list[Path] = []
        self._handles: list[BinaryIO] = []
        self._syncing = Syncing(self._handles)
        self._places: dict[str, _Place] = {}
        self._computed = frozenset(computed)
        shards = _by_file(ordered, shard_bytes, stem, sorted(folders))
        self.files += [directory / file for file in shards]
        if not (again and all(path.exists() for path in self.files)):
            require_space(directory, sum(spec.nbytes for spec in ordered))
        noted = {dropped: kept for dropped, kept in tied.items() if dropped not in self._copies}
        for path, shard in zip(self.files, shards.values(), strict=True):
            self._reserve(path, shard, noted, again)
        assert len(self._places) == len(ordered), "two specs of one name"
        assert self._places.keys() >= set(tied.values()), "a tied name without its kept one"

    def _reserve(
        self, path: Path, shard: list[TensorSpec], tied: Mapping[str, str], again: bool
    ) -> None:
        """Write one file's header and give the file its full length."""
        header, offsets, size = _layout(shard, tied, self._prefix(path))
        with output_errors(path):
            path.parent.mkdir(exist_ok=True, parents=True)
            file = path.open("r+b" if again and path.exists() else "x+b", buffering=0)
            self._handles.append(file)
            _write_at(file, header, 0)
            os.ftruncate(file.fileno(), size)
        for spec in shard:
            self._places[spec.name] = _Place(spec, file, offsets[spec.name], [])

    def _prefix(self, path: Path) -> str:
        """What names have before those in this file's header."""
        folder = path.parent.relative_to(self._directory).as_posix()
        return "" if folder == "." else f"{folder}/"

    def mark(self, name: str, start: int, stop: int) -> None:
        """Note rows `start:stop` (of a scalar: 0:1) as written by an earlier run."""
        for place in self._everywhere(name):
            rows = place.spec.shape[0] if place.spec.shape else 1
            row_bytes = place.spec.nbytes // max(rows, 1)
            place.written.append((start * row_bytes, stop * row_bytes))

    def write(self, name: str, tensor: Tensor, *, finite: bool = False) -> None:
        """Write one whole tensor, cast to the dtype of its spec (to nearest, ties to even).

        Args:
            name: Which.
            tensor: Its values.
            finite: Whether they are of that dtype and known to be finite.

        Raises:
            OutputError: if the disk is full or refuses.
            MethodError: if a value does not fit in that dtype, or is computed and not finite.
        """
        self._put(name, 0, tensor, self._places[name].spec.shape, finite)

    def write_rows(self, name: str, start: int, tensor: Tensor, *, finite: bool = False) -> None:
        """Write rows `start:start + len(tensor)` along the first axis; see `write`.

        Raises:
            OutputError: if the disk is full or refuses.
            MethodError: if a value does not fit in that dtype, or is computed and not finite.
        """
        shape = self._places[name].spec.shape
        assert 0 <= start <= start + len(tensor) <= shape[0], f"{name}: rows from {start}"
        self._put(name, start, tensor, (len(tensor), *shape[1:]), finite)

    def replace(
        self, name: str, entries: Int64[Tensor, " some"], values: Float[Tensor, " some"]
    ) -> None:
        """Write single values of one tensor again, where they are written already; see `write`.

        Args:
            name: Which tensor.
            entries: Flat indices in it, ascending, at least one.
            values: Their new values.

        Raises:
            OutputError: if the disk refuses.
            MethodError: if a value does not fit in that dtype, or is computed and not finite.
        """
        own = self._places[name].spec
        for spec, file, offset, _ in self._everywhere(name):
            size, start = spec.dtype.itemsize, 0
            while start < len(entries):
                first = int(entries[start])
                stop = int(torch.searchsorted(entries, first + _REPLACED_AT_ONCE // size))
                places, start = slice(start, stop), stop
                at = offset + first * size
                with output_errors(Path(file.name)):
                    held = _read_at(file, (int(entries[stop - 1]) + 1 - first) * size, at)
                    there = torch.frombuffer(held, dtype=spec.dtype)
                    stored = cast(values[places], own, name in self._computed)
                    there[entries[places] - first] = cast(stored, spec, computed=False)
                    _write_at(file, held, at)

    def _everywhere(self, name: str) -> list[_Place]:
        """The places of one tensor: its own, and those of its copies."""
        copies = [copy for copy, kept in self._copies.items() if kept == name]
        return [self._places[one] for one in (name, *copies)]

    def _put(self, name: str, row: int, tensor: Tensor, shape: Sequence[int], finite: bool) -> None:
        """Write rows of a tensor at its own place, and as they are there at those of its copies."""
        spec = self._places[name].spec
        assert tuple(tensor.shape) == tuple(shape), f"{spec.name}: {tuple(tensor.shape)}"
        if not tensor.numel():
            return
        assert tensor.dtype == spec.dtype or (tensor.is_floating_point() and spec.is_floating)
        values = tensor.detach().cpu()
        if not (finite and values.dtype == spec.dtype):
            values = cast(values, spec, spec.name in self._computed)
        for place in self._everywhere(name):
            self._put_at(place, row, cast(values, place.spec, computed=False))

    def _put_at(self, place: _Place, row: int, values: Tensor) -> None:
        """Write rows that have the dtype of their place."""
        stored = values.contiguous().reshape(-1).view(torch.uint8)
        start = row * (place.spec.nbytes // place.spec.shape[0]) if row else 0
        with output_errors(Path(place.file.name)):
            _write_at(place.file, stored.numpy().data, place.offset + start)
        self._syncing.wrote(stored.numel())
        place.written.append((start, start + stored.numel()))

    def close(self) -> None:
        """Check that every byte was written once, write the index, and sync to disk.

        Raises:
            OutputError: if the disk is full or refuses.
            WorkError: naming every tensor that was not written completely, or not once.
        """
        faults = Faults()
        for name, place in sorted(self._places.items()):
            reached = 0
            for start, stop in sorted(place.written):
                reached = stop if start == reached else -1
            if reached != place.spec.nbytes:
                total = sum(stop - start for start, stop in place.written)
                found = f"{total:,} bytes written of {place.spec.nbytes:,}"
                faults.add(f"Tensor '{name}' was not written exactly once: {found}.")
        faults.raise_if_any(WorkError)
        for folder in {path.parent for path in self.files}:
            self._write_index(folder)
        self._syncing.finish()
        for file in self._handles:
            with output_errors(Path(file.name)):
                file.close()

    def _write_index(self, folder: Path) -> None:
        """Write the index of a folder with several files."""
        files = [path for path in self.files if path.parent == folder]
        if len(files) == 1:
            return
        prefix = self._prefix(files[0])
        held = {n: p for n, p in self._places.items() if Path(p.file.name).parent == folder}
        index = {
            "metadata": {"total_size": sum(p.spec.nbytes for p in held.values())},
            "weight_map": {
                name.removeprefix(prefix): Path(p.file.name).name for name, p in held.items()
            },
        }
        path = folder / f"{files[0].name.split('-')[0]}.safetensors.index.json"
        with output_errors(path):
            path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def __enter__(self) -> "CheckpointWriter":
        """Return the writer."""
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Close, or after an error only release the files."""
        try:
            if error is None:
                self.close()
        finally:
            self._syncing.stop()
            for file in self._handles:
                file.close()


def file_bytes(specs: Iterable[TensorSpec]) -> int:
    """Bytes of one file of these tensors, its header included."""
    return _layout(list(specs), {}, "")[2]


def with_copies(
    specs: Iterable[TensorSpec], tied: Mapping[str, str], copies: Mapping[str, torch.dtype]
) -> list[TensorSpec]:
    """Specs, and those of copies: what `tied` says they are written from, in their own dtypes."""
    written = list(specs)
    named = {spec.name: spec for spec in written}
    return written + [
        replace(named[tied[copy]], name=copy, dtype=copies[copy]) for copy in sorted(copies)
    ]


def _by_file(
    specs: list[TensorSpec], shard_bytes: int, stem: str, folders: Sequence[str]
) -> dict[str, list[TensorSpec]]:
    """Relative file name to what goes into it, which is in the order of the specs."""
    parts: dict[str, list[TensorSpec]] = {}
    for spec in specs:
        folder = next((f for f in folders if spec.name.startswith(f"{f}/")), "")
        parts.setdefault(folder, []).append(spec)
    files: dict[str, list[TensorSpec]] = {}
    for folder, held in (parts or {"": list[TensorSpec]()}).items():
        shards = _shards(held, shard_bytes)
        for number, shard in enumerate(shards):
            name = _file_name(number, len(shards), "model" if folder else stem)
            files[f"{folder}/{name}" if folder else name] = shard
    return files


def _shards(specs: list[TensorSpec], shard_bytes: int) -> list[list[TensorSpec]]:
    """Fill shards one after the other in the order of the specs."""
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    return shards


def _file_name(number: int, count: int, stem: str) -> str:
    return (
        f"{stem}-{number + 1:05}-of-{count:05}.safetensors" if count > 1 else f"{stem}.safetensors"
    )


def hollow_checkpoint(
    directory: Path,
    specs: Iterable[TensorSpec],
    *,
    tied: Mapping[str, str],
    copies: Mapping[str, torch.dtype],
) -> None:
    """A weight file with its header and no values: of its full length, which takes no room.

    Only the first entries are there of each tensor: no two are equal, as copies are.

    Args:
        directory: An existing directory.
        specs: As for `CheckpointWriter`.
        tied: As for it.
        copies: As for it.

    Raises:
        OutputError: if the disk refuses.
    """
    ordered = sorted(with_copies(specs, tied, copies), key=lambda spec: spec.name)
    noted = {dropped: kept for dropped, kept in tied.items() if dropped not in copies}
    header, starts, size = _layout(ordered, noted, "")
    path = directory / "model.safetensors"
    numbers = {spec.name: number for number, spec in enumerate(ordered, 1)}
    with output_errors(path), path.open("xb") as file:
        file.write(header)
        file.truncate(size)
        for spec in ordered:
            number = numbers[tied[spec.name] if spec.name in copies else spec.name]
            digits = [number >> 3 * place & 7 for place in range(min(8, spec.numel))]
            marks = torch.tensor(digits).to(spec.dtype)  # which holds them, whatever it is
            file.seek(starts[spec.name])
            file.write(marks.view(torch.uint8).numpy().data)


def _layout(
    specs: list[TensorSpec], tied: Mapping[str, str], prefix: str
) -> tuple[bytes, dict[str, int], int]:
    """Give one file's header, where in the file each tensor starts, and the file's length."""
    names = {spec.name for spec in specs}
    notes = {
        dropped.removeprefix(prefix): kept.removeprefix(prefix)
        for dropped, kept in sorted(tied.items())
        if kept in names
    }
    header: dict[str, object] = {"__metadata__": {"format": "pt", **notes}}
    starts: dict[str, int] = {}
    end = 0
    for spec in sorted(specs, key=lambda spec: (_LAYOUT_ORDER[spec.dtype], spec.name)):
        starts[spec.name] = end
        end += spec.nbytes
        header[spec.name.removeprefix(prefix)] = {
            "dtype": _CODES[spec.dtype],
            "shape": spec.shape,
            "data_offsets": [starts[spec.name], end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = 8 + len(text)
    offsets = {name: data + start for name, start in starts.items()}
    return len(text).to_bytes(8, "little") + text, offsets, data + end


def _read_at(file: BinaryIO, count: int, offset: int) -> bytearray:
    """Read so many bytes, which are there; the system may give fewer at once."""
    data = bytearray(count)
    view = memoryview(data)
    while view:
        got = os.preadv(file.fileno(), [view[:_MOST_AT_ONCE]], offset)
        assert got, "values are replaced where some were written"
        view, offset = view[got:], offset + got
    return data


def _write_at(file: BinaryIO, data: bytes | bytearray | memoryview, offset: int) -> None:
    """Write all of `data`; the system may take less than offered at once."""
    view = memoryview(data)
    while view:
        count = os.pwrite(file.fileno(), view[:_MOST_AT_ONCE], offset)
        view, offset = view[count:], offset + count


def write_auxiliary_files(files: Mapping[str, Path | bytes], directory: Path) -> None:
    """Write small files, given by relative name as a file to copy or as content."""
    for relative, content in files.items():
        target = directory / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            target.write_bytes(content)
        else:
            shutil.copyfile(content, target)
