"""Safetensors, one file or many: headers at opening, bytes by position afterwards.

Nothing is mapped: each read fills one fresh tensor from its place in the file. Memory is then
exactly the tensors the caller holds, and any number of threads may read. A few files stay open
from their first read until `close`.
"""

import math
import os
import threading
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import torch
from jaxtyping import Shaped
from torch import Tensor

from personae._memory import uninitialised
from personae._types import TensorSpec
from personae.checkpoints.folders import AuxiliaryFiles, Folder, read_weight_map, warn_of_absent
from personae.checkpoints.headers import LENGTH_BYTES, Header
from personae.checkpoints.specs import by_name, check_rows, no_such_tensor
from personae.errors import CheckpointError, Faults

_HEADERS_AT_ONCE = 8
_KEPT_OPEN = 16
_MOST_AT_ONCE = 1 << 30  # a system call moves at most 2 GiB


class SafetensorsFiles:
    """A `Checkpoint` of one or more safetensors files.

    Args:
        source: What the user wrote.
        headers: File name to its header.
        locate: File name to its path on this machine, which may download it.
        auxiliary_files: See `Checkpoint`.
        revision: See `Checkpoint`.
    """

    copies: Mapping[str, torch.dtype] = MappingProxyType({})

    def __init__(
        self,
        source: str,
        headers: Mapping[str, Header],
        locate: Callable[[str], Path],
        auxiliary_files: AuxiliaryFiles,
        revision: str | None = None,
    ) -> None:
        """Join the headers; no file is touched."""
        self.source = source
        self.revision = revision
        self.auxiliary_files: Mapping[str, Path] = auxiliary_files
        self.specs: Mapping[str, TensorSpec] = by_name(
            spec for header in headers.values() for spec in header.specs.values()
        )
        self.tied: Mapping[str, str] = {
            dropped: kept for header in headers.values() for dropped, kept in header.tied.items()
        }
        self._places = {
            name: (file, begin)
            for file, header in headers.items()
            for name, begin in header.begins.items()
        }
        self._locate = locate
        self._open: dict[str, tuple[int, int]] = {}
        self._opening = threading.Lock()

    def read(self, name: str) -> Shaped[Tensor, "..."]:
        """Return one tensor; see `Checkpoint.read`.

        Raises:
            CheckpointError: No such tensor, or its file changed since it was opened.
        """
        spec = self._spec(name)
        return self._read_bytes(spec, 0, spec.shape)

    def read_rows(self, name: str, start: int, stop: int) -> Shaped[Tensor, "rows *rest"]:
        """Return rows `start:stop`; see `Checkpoint.read_rows`.

        Raises:
            CheckpointError: No such tensor or rows, or its file changed since it was opened.
        """
        spec = self._spec(name)
        check_rows(self.source, spec, start, stop)
        row_bytes = math.prod(spec.shape[1:]) * spec.dtype.itemsize
        return self._read_bytes(spec, start * row_bytes, (stop - start, *spec.shape[1:]))

    def factors(self, name: str) -> None:
        """Return None: a stored tensor has no factors."""

    def same_as_base(self, name: str) -> bool:
        """Return False: only values could tell."""
        return False

    def close(self) -> None:
        """Close what is open. Reading opens it again."""
        with self._opening:
            for handle, _ in self._open.values():
                os.close(handle)
            self._open.clear()

    def __del__(self) -> None:
        """Close what is open."""
        self.close()

    def _spec(self, name: str) -> TensorSpec:
        return self.specs.get(name) or no_such_tensor(self.source, name, self.specs)

    def _read_bytes(self, spec: TensorSpec, skip: int, shape: tuple[int, ...]) -> Tensor:
        file, begin = self._places[spec.name]
        tensor = uninitialised(shape, spec.dtype)
        left = tensor.reshape(-1).view(torch.uint8).numpy().data
        with self._handle(file) as (handle, data_start):
            offset = data_start + begin + skip
            while len(left) > 0:
                count = os.preadv(handle, [left[:_MOST_AT_ONCE]], offset)
                if not count:
                    raise CheckpointError(
                        f"{self.source}: {file} ended inside '{spec.name}', so it was changed or "
                        "cut short after it was opened. Run again with the complete file."
                    )
                left, offset = left[count:], offset + count
        return tensor

    @contextmanager
    def _handle(self, file: str) -> Generator[tuple[int, int]]:
        """An open file and where its values start; the first few files stay open."""
        kept = self._open.get(file)
        if kept is not None:
            yield kept
            return
        handle = os.open(self._locate(file), os.O_RDONLY | os.O_NONBLOCK)  # no pipe makes it wait
        opened = handle, LENGTH_BYTES + int.from_bytes(os.pread(handle, LENGTH_BYTES, 0), "little")
        with self._opening:
            if len(self._open) < _KEPT_OPEN and file not in self._open:
                self._open[file] = kept = opened
        try:
            yield opened
        finally:
            if kept is None:
                os.close(handle)


def open_safetensors(folder: Folder, file: str) -> SafetensorsFiles:
    """Open a single file, or the shards an index names, checking that index and shards agree.

    Raises:
        CheckpointError: Shards are absent or damaged, or the index does not fit them; every
            fault at once.
    """
    faults = Faults()
    weight_map = read_weight_map(folder, file) if file.endswith(".json") else None
    wanted = [file] if weight_map is None else sorted(set(weight_map.values()))
    present = [shard for shard in wanted if folder.has(shard, file, faults)]
    # Headers of a hub model are one request each, so they are fetched side by side.
    with ThreadPoolExecutor(_HEADERS_AT_ONCE) as pool:
        read = list(pool.map(folder.header, present))
    headers: dict[str, Header] = {}
    for shard, (header, messages) in zip(present, read, strict=True):
        headers[shard] = header
        for message in messages:
            faults.add(message)
        if weight_map is not None and not messages:
            _compare_with_index(folder.where(file), weight_map, shard, header, faults)
    faults.raise_if_any(CheckpointError)
    return SafetensorsFiles(
        folder.source, headers, folder.locate, folder.auxiliary_files, folder.revision
    )


def _compare_with_index(
    index: str, weight_map: Mapping[str, str], shard: str, header: Header, faults: Faults
) -> None:
    """Note every tensor that only the shard knows of; warn of those that only the index does."""
    listed = {name for name, file in weight_map.items() if file == shard}
    warn_of_absent(index, shard, listed - set(header.specs) - set(header.tied))
    for name in sorted(set(header.specs) - listed):
        faults.add(f"{shard} holds '{name}', which {index} does not place there. Save it again.")
