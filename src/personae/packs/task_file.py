"""tasks/NAME.safetensors: the coded tensors of one task.

The parts of all coded blocks are laid end to end, one safetensors tensor per part name ("section"),
so that the header stays a few hundred bytes however many tensors there are. Tensors follow each
other sorted by name, the blocks of one in the order of its record; private tensors are entries of
their own, `private/NAME`.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from personae._safetensors import open_safetensors
from personae._types import Parts
from personae.errors import OutputError, PackError
from personae.packs.manifest import FORMAT, BlockRecord, TaskRecord

PRIVATE = "private/"


def write_task_file(
    path: Path,
    blocks: list[Parts],
    private: Mapping[str, Tensor],
    metadata: Mapping[str, str | int],
) -> None:
    """Write the parts of all blocks, in this order, and the private tensors.

    Args:
        path: File to write (not atomic: give a temporary one).
        blocks: Parts of each coded block; a part name has one dtype throughout.
        private: The expert's name to the whole tensor (or its extra rows).
        metadata: What a stranger who finds the file should know (version, task, codec, reference).

    Raises:
        OutputError: if the disk is full or refuses.
    """
    gathered: dict[str, list[Tensor]] = {}
    for parts in blocks:
        for name, values in parts.items():
            gathered.setdefault(name, []).append(values.flatten())
    sections = {name: torch.cat(values) for name, values in gathered.items()}
    whole = {PRIVATE + name: tensor.contiguous() for name, tensor in private.items()}
    # One metadata key: the safetensors library writes several in random order.
    about = json.dumps({"format": FORMAT, **metadata})
    path.touch()
    mode = path.stat().st_mode  # the library's own file would be private to its owner
    try:
        save_file({**sections, **whole}, path, metadata={FORMAT: about})
    except SafetensorError as error:
        raise OutputError(
            f"Cannot write '{path}': {error}. Free some space, or write to another disk."
        ) from error
    path.chmod(mode)


class TaskFile:
    """Reads blocks and private tensors of one task file on demand; safe to share by threads."""

    def __init__(self, path: Path, record: TaskRecord) -> None:
        """Open the file and check that its sections have the lengths the manifest says.

        Raises:
            PackError: if the file is no safetensors file or does not fit its record.
        """
        self.path = path
        self.record = record
        try:
            self._file = open_safetensors(path)
        except (SafetensorError, OSError) as error:
            raise PackError(f"{path} cannot be read: {error}") from error
        self._offsets: dict[str, list[dict[str, tuple[int, int]]]] = {}
        totals = self._lay_out(record)
        keys = set(self._file.keys())
        found = {
            key: self._file.get_slice(key).get_shape()[0]
            for key in keys
            if not key.startswith(PRIVATE)
        }
        whole = {key.removeprefix(PRIVATE) for key in keys if key.startswith(PRIVATE)}
        if found != totals or whole != set(record.private):
            raise PackError(
                f"{path} does not fit its record in pack.json: sections {found}, expected "
                f"{totals}; private {sorted(whole)}, expected {sorted(record.private)}."
            )

    def _lay_out(self, record: TaskRecord) -> dict[str, int]:
        totals: dict[str, int] = {}
        for name in sorted(record.tensors):
            self._offsets[name] = []
            for block in record.tensors[name].blocks:
                spans: dict[str, tuple[int, int]] = {}
                for part, length in block.parts.items():
                    start = totals.get(part, 0)
                    spans[part] = (start, start + length)
                    totals[part] = start + length
                self._offsets[name].append(spans)
        return totals

    def blocks(self, name: str) -> Iterator[tuple[BlockRecord, Parts]]:
        """The coded blocks of one tensor, with their parts read from the file."""
        for block, spans in zip(self.record.tensors[name].blocks, self._offsets[name], strict=True):
            yield (
                block,
                {
                    part: self._file.get_slice(part)[start:stop]
                    for part, (start, stop) in spans.items()
                },
            )

    def private(self, name: str) -> Tensor:
        """One private tensor (or the extra rows of one), by the expert's name."""
        return self._file.get_tensor(PRIVATE + name)
