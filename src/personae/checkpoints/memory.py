"""Models and mappings that are in memory already, offered as a checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from personae._types import TensorSpec
from personae.checkpoints.specs import by_name, check_rows, dtype_faults, find_tied, no_such_tensor
from personae.errors import CheckpointError, Faults


class InMemory:
    """A `Checkpoint` over tensors in memory; reading shares their storage.

    Of a module these are its parameters and persistent buffers. Modules on the meta device give
    headers, and refuse to be read.
    """

    copies: Mapping[str, torch.dtype] = MappingProxyType({})

    def __init__(self, tensors: nn.Module | Mapping[str, Any]) -> None:
        """Take names, shapes and ties; copy nothing.

        Raises:
            CheckpointError: Something in it is not a readable tensor; every fault at once.
        """
        self.source = type(tensors).__name__
        self.revision: str | None = None
        self.auxiliary_files: Mapping[str, Path] = {}
        # keep_vars: tied parameters are then one object, which also holds on the meta device.
        found = (
            tensors.state_dict(keep_vars=True) if isinstance(tensors, nn.Module) else dict(tensors)
        )
        faults = Faults()
        for fault in tensor_faults(self.source, found):
            faults.add(fault)
        faults.raise_if_any(CheckpointError)
        self.tied: Mapping[str, str] = find_tied(found)
        self._tensors: dict[str, Tensor] = {n: t for n, t in found.items() if n not in self.tied}
        self.specs: Mapping[str, TensorSpec] = by_name(
            TensorSpec(name, tuple(tensor.shape), tensor.dtype)
            for name, tensor in self._tensors.items()
        )

    def read(self, name: str) -> Shaped[Tensor, "..."]:
        """Return one tensor; see `Checkpoint.read`.

        Raises:
            CheckpointError: No such tensor, or it is on the meta device.
        """
        return self._values(name).cpu()

    def read_rows(self, name: str, start: int, stop: int) -> Shaped[Tensor, "rows *rest"]:
        """Return rows `start:stop`; see `Checkpoint.read_rows`.

        Raises:
            CheckpointError: No such tensor or rows, or it is on the meta device.
        """
        values = self._values(name)
        check_rows(self.source, self.specs[name], start, stop)
        return values[start:stop].cpu()

    def factors(self, name: str) -> None:
        """Return None: a stored tensor has no factors."""

    def same_as_base(self, name: str) -> bool:
        """Return False: only values could tell."""
        return False

    def close(self) -> None:
        """Do nothing: the tensors are the caller's."""

    def _values(self, name: str) -> Tensor:
        if name not in self.specs:
            no_such_tensor(self.source, name, self.specs)
        tensor = self._tensors[name].detach()
        if tensor.is_meta:
            raise CheckpointError(
                f"{self.source}: '{name}' is on the meta device and has no values. Load the model "
                "with its weights to merge or pack it."
            )
        return tensor


def tensor_faults(where: str, entries: Mapping[Any, Any]) -> list[str]:
    """Say why entries of a mapping cannot be read as tensors."""
    odd = {name: fault for name, value in entries.items() if (fault := _fault(where, name, value))}
    dtypes = {name: value.dtype for name, value in entries.items() if name not in odd}
    return [*odd.values(), *dtype_faults(where, dtypes)]


def _fault(where: str, name: object, value: object) -> str | None:
    if not isinstance(name, str):
        return f"{where}: the name {name!r} is not text. Names must be str."
    if not isinstance(value, Tensor):
        return (
            f"{where}: '{name}' is a {type(value).__name__}, not a tensor. Remove it, or pass the "
            "mapping of tensors alone."
        )
    if value.layout is not torch.strided or value.is_nested or value.is_quantized:
        return f"{where}: '{name}' is sparse, nested or quantised. Make it dense first."
    return None
