"""tasks/NAME.safetensors: the coded tensors of one task.

The parts of all coded blocks are laid end to end, one safetensors tensor per part name ("section"),
so that the header stays a few hundred bytes however many tensors there are. Tensors follow each
other sorted by name, the blocks of one in the order of its record; private tensors are entries of
their own, `private/NAME`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from personae._safetensors import open_safetensors
from personae._types import Parts, dtype_name
from personae.checkpoints.specs import READABLE
from personae.errors import OutputError, PackError
from personae.methods import Codec, block_layout
from personae.packs.manifest import FORMAT, BlockRecord, TaskRecord, dtype_of
from personae.packs.soundness import block_shape

PRIVATE = "private/"

_Entry = tuple[torch.dtype | None, tuple[int, ...]]
_MOST_TOLD = 4


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

    def __init__(self, path: Path, record: TaskRecord, codec: Codec) -> None:
        """Open the file and check that it holds what the manifest says.

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
        expected = self._lay_out(record, codec)
        for name, kept in record.private.items():
            expected[PRIVATE + name] = (dtype_of(kept.dtype), kept.shape)
        found: dict[str, _Entry] = {}
        for key in self._file.keys():
            entry = self._file.get_slice(key)
            found[key] = (READABLE.get(entry.get_dtype()), tuple(entry.get_shape()))
        wrong = sorted(key for key in {*found, *expected} if found.get(key) != expected.get(key))
        if wrong:
            raise PackError(
                f"{path} does not fit its record in pack.json: {_told(wrong, found, 'found')}; "
                f"{_told(wrong, expected, 'expected')}. Restore it or pack the task again."
            )

    def _lay_out(self, record: TaskRecord, codec: Codec) -> dict[str, _Entry]:
        """Note where the parts of each block lie; dtype and shape of each section."""
        totals: dict[str, int] = {}
        dtypes: dict[str, torch.dtype] = {}
        for name in sorted(record.tensors):
            self._offsets[name] = []
            for block in record.tensors[name].blocks:
                shape = block_shape(record.tensors[name].shape, block)
                layout = block_layout(codec, block.parts, shape, block.rank)
                spans: dict[str, tuple[int, int]] = {}
                for part, length in block.parts.items():
                    start = totals.get(part, 0)
                    spans[part] = (start, start + length)
                    totals[part] = start + length
                    dtypes[part] = layout[part].dtype
                self._offsets[name].append(spans)
        return {part: (dtypes[part], (length,)) for part, length in totals.items()}

    def blocks(self, name: str) -> Iterator[tuple[BlockRecord, Parts]]:
        """The coded blocks of one tensor, with their parts read from the file.

        Raises:
            PackError: if a part holds a number that is not finite.
        """
        for block, spans in zip(self.record.tensors[name].blocks, self._offsets[name], strict=True):
            parts = {
                part: self._file.get_slice(part)[start:stop]
                for part, (start, stop) in spans.items()
            }
            for part, values in parts.items():
                if values.is_floating_point() and not values.isfinite().all():
                    raise PackError(
                        f"{self.path}: part '{part}' of '{name}' holds a number that is not "
                        "finite. The pack was damaged or changed: fetch it again."
                    )
            yield block, parts

    def private(self, name: str) -> Tensor:
        """One private tensor (or the extra rows of one), by the expert's name."""
        return self._file.get_tensor(PRIVATE + name)


def _told(keys: Sequence[str], entries: Mapping[str, _Entry], word: str) -> str:
    """Dtype and shape of the first of these."""
    texts: list[str] = []
    for key in keys[:_MOST_TOLD]:
        dtype, shape = entries.get(key, (None, None))
        kind = "of no dtype here" if dtype is None else dtype_name(dtype)
        texts.append(f"no {key[:60]}" if shape is None else f"{key[:60]} {kind} {list(shape)[:8]}")
    return f"{word} {', '.join(texts)}"
