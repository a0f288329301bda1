"""State dicts in the legacy pickle format: read without running any code, or refused.

Zip files (torch 1.6 and later) are mapped, and mapped anew after every 128 MiB read, so that what
was read does not stay resident. The older format cannot be mapped: it is held in memory whole
from opening until `close`.
"""

import logging
import re
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from personae._small_files import Unfit, open_regular
from personae._types import TensorSpec
from personae.checkpoints.folders import AuxiliaryFiles, Folder, read_weight_map, warn_of_absent
from personae.checkpoints.headers import is_lfs_pointer, unreadable
from personae.checkpoints.memory import tensor_faults
from personae.checkpoints.specs import by_name, check_rows, find_tied, no_such_tensor
from personae.errors import CheckpointError, Faults

_NESTED_UNDER = ("state_dict", "model_state_dict", "model")
_ZIP_MAGIC = b"PK\x03\x04"
_MAPPED_BYTES = 128 << 20
_log = logging.getLogger(__name__)


class Pickles:
    """A `Checkpoint` of one or more pickled state dicts.

    A state dict one level down, under `state_dict`, `model_state_dict` or `model`, is found, and
    a warning says what beside it is left out. Beside tensors, plain numbers, texts and None are
    left out too (they are no weights); any other entry is a fault.

    Args:
        source: What the user wrote.
        paths: The files; no name may be in two of them.
        auxiliary_files: See `Checkpoint`.
        revision: See `Checkpoint`.
    """

    copies: Mapping[str, torch.dtype] = MappingProxyType({})

    def __init__(
        self,
        source: str,
        paths: list[Path],
        auxiliary_files: AuxiliaryFiles,
        revision: str | None = None,
    ) -> None:
        """Unpickle every file once, for its headers.

        Raises:
            CheckpointError: A file holds code, is damaged, or holds what is no tensor.
        """
        self.source = source
        self.revision = revision
        self.auxiliary_files: Mapping[str, Path] = auxiliary_files
        self._paths: dict[str, Path] = {}
        self._lock = threading.Lock()
        self._loaded: dict[Path, dict[str, Tensor]] = {}
        self._touched_bytes = 0
        specs: list[TensorSpec] = []
        tied: dict[str, str] = {}
        faults = Faults()
        for path in paths:
            tensors = _load(path, faults, warn=True)
            tied |= find_tied(tensors)
            for name in tensors.keys() & self._paths.keys():
                faults.add(f"'{name}' is in both {self._paths[name]} and {path}. Remove one.")
            self._paths |= dict.fromkeys(tensors, path)
            specs += [TensorSpec(n, tuple(t.shape), t.dtype) for n, t in tensors.items()]
            if not _is_zip(path):
                self._loaded[path] = tensors
        faults.raise_if_any(CheckpointError)
        self.tied: Mapping[str, str] = tied
        self.specs: Mapping[str, TensorSpec] = by_name(s for s in specs if s.name not in tied)

    def read(self, name: str) -> Shaped[Tensor, "..."]:
        """Return one tensor; see `Checkpoint.read`.

        Raises:
            CheckpointError: No such tensor, or its file changed since it was opened.
        """
        return self._view(name).clone(memory_format=torch.contiguous_format)

    def read_rows(self, name: str, start: int, stop: int) -> Shaped[Tensor, "rows *rest"]:
        """Return rows `start:stop`; see `Checkpoint.read_rows`.

        Raises:
            CheckpointError: No such tensor or rows, or its file changed since it was opened.
        """
        return self._view(name, start, stop).clone(memory_format=torch.contiguous_format)

    def factors(self, name: str) -> None:
        """Return None: a stored tensor has no factors."""

    def same_as_base(self, name: str) -> bool:
        """Return False: only values could tell."""
        return False

    def close(self) -> None:
        """Drop mappings and what old-format files made us hold; reading again loads again."""
        self._loaded.clear()

    def _view(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return a tensor, or rows of it, as a view of what is loaded, to be copied at once.

        Raises:
            CheckpointError: No such tensor or rows, or its file changed since it was opened.
        """
        spec = self.specs.get(name) or no_such_tensor(self.source, name, self.specs)
        if stop is not None:
            check_rows(self.source, spec, start, stop)
        path = self._paths[name]
        found = self._load_once(path, spec.nbytes).get(name)
        if found is None or tuple(found.shape) != spec.shape:
            raise CheckpointError(f"{path} was changed after it was opened. Run again.")
        return found.detach() if stop is None else found.detach()[start:stop]

    def _load_once(self, path: Path, touched_bytes: int) -> dict[str, Tensor]:
        with self._lock:
            self._touched_bytes += touched_bytes
            if self._touched_bytes > _MAPPED_BYTES:
                # Pages read stay resident while mapped. Readers at work keep theirs till done.
                self._loaded = {p: t for p, t in self._loaded.items() if not _is_zip(p)}
                self._touched_bytes = touched_bytes
            if path not in self._loaded:
                self._loaded[path] = _load(path, Faults(), warn=False)
            return self._loaded[path]


def open_pickles(folder: Folder, file: str) -> Pickles:
    """Open a single file, or the shards an index names, checking that index and shards agree.

    Pickles have no header apart from their tensors: those of a hub model are downloaded whole.

    Raises:
        CheckpointError: Files are absent, damaged or hold code, or the index does not fit them.
    """
    faults = Faults()
    weight_map = read_weight_map(folder, file) if file.endswith(".json") else None
    wanted = [file] if weight_map is None else sorted(set(weight_map.values()))
    for shard in wanted:
        folder.has(shard, file, faults)
    faults.raise_if_any(CheckpointError)
    paths = [folder.locate(shard) for shard in wanted]
    opened = Pickles(folder.source, paths, folder.auxiliary_files, folder.revision)
    if weight_map is not None:
        present = opened.specs.keys() | opened.tied.keys()
        for shard in wanted:
            listed = {name for name, place in weight_map.items() if place == shard}
            warn_of_absent(folder.where(file), shard, listed - present)
        for name in sorted(present - weight_map.keys()):
            faults.add(f"{folder.where(file)} does not list '{name}', which a shard holds.")
        faults.raise_if_any(CheckpointError)
    return opened


def _load(path: Path, faults: Faults, *, warn: bool) -> dict[str, Tensor]:
    """Unpickle one state dict without running code; note what is no tensor."""
    content = _unpickle(path)
    if not isinstance(content, Mapping):
        faults.add(
            f"{path} holds a {type(content).__name__}, not a state dict (names to tensors). "
            "Save model.state_dict() instead."
        )
        return {}
    entries: Mapping[Any, Any] = content
    for key in _NESTED_UNDER:
        if isinstance(content.get(key), Mapping):
            entries = content[key]
            beside = ", ".join(sorted(str(k) for k in content if k != key))
            if warn:
                _log.warning("%s: tensors taken from '%s'; left out: %s.", path, key, beside or "-")
            break
    plain = (int, float, str, type(None))
    left_out = [str(name) for name, value in entries.items() if isinstance(value, plain)]
    if left_out and warn:
        _log.warning("%s: left out, because they are not tensors: %s.", path, ", ".join(left_out))
    held = {name: value for name, value in entries.items() if not isinstance(value, plain)}
    found = tensor_faults(str(path), held)
    for name, value in held.items():
        if isinstance(value, Tensor) and value.is_meta:
            found += [f"{path}: '{name}' has no values (meta device). Save the model once loaded."]
    for fault in found:
        faults.add(fault)
    return {} if found else held


def _unpickle(path: Path) -> Any:
    """Load with `weights_only=True`, mapped where the format allows.

    Raises:
        CheckpointError: The file holds code, or is damaged.
        OSError: It may not be read.
    """
    mapped = _is_zip(path)
    try:
        with warnings.catch_warnings():  # a protocol that torch does not write is read or refused
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError:
        raise
    except Exception as error:  # a damaged file can make the unpickler fail anyhow
        text = str(error)
        wanted = re.search(r"GLOBAL ([\w.]+)", text)
        if wanted or "torchscript" in text.lower():
            what = f"'{wanted[1]}'" if wanted else "TorchScript code"
            raise CheckpointError(
                f"{path} is a pickle that would run {what} when loaded; it is refused and nothing "
                "was run. If you trust it, load it yourself and save its tensors as safetensors."
            ) from error
        if is_lfs_pointer(path):
            raise CheckpointError(unreadable(path)) from error
        raise CheckpointError(
            f"{path} is not a readable torch file: damaged, cut short, or another format. "
            "Copy or download it again, or save it as safetensors."
        ) from error


def _is_zip(path: Path) -> bool:
    """Whether the file has the zip format, which alone can be mapped.

    Raises:
        CheckpointError: It is no regular file.
    """
    try:
        with open_regular(path) as file:
            return file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
    except Unfit as error:
        raise CheckpointError(f"{path} {error}. Copy or download it again.") from error
