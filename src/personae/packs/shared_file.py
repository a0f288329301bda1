"""shared.safetensors: what all tasks share beside the reference, one fp32 tensor a name."""

from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from personae._safetensors import open_safetensors
from personae.errors import PackError
from personae.packs.manifest import SharedRecord


class SharedFile:
    """Reads shared tensors on demand; safe to share by threads."""

    def __init__(self, path: Path, record: SharedRecord) -> None:
        """Open the file and check that it holds what the manifest says.

        Raises:
            PackError: if the file is no safetensors file or does not fit its record.
        """
        try:
            self._file = open_safetensors(path)
        except (SafetensorError, OSError) as error:
            raise PackError(f"{path} cannot be read: {error}") from error
        slices = {name: self._file.get_slice(name) for name in self._file.keys()}
        found = {name: tuple(one.get_shape()) for name, one in slices.items()}
        if found != record.tensors or any(one.get_dtype() != "F32" for one in slices.values()):
            raise PackError(
                f"{path} does not fit its record in pack.json: it holds other tensors, or not in "
                "fp32. Restore it from a copy."
            )
        self._names = set(found)
        self._path = path

    def read(self, name: str) -> Float[Tensor, "..."] | None:
        """The shared tensor of this reference name, fp32; None if there is none (it is zero).

        Raises:
            PackError: if it holds a number that is not finite.
        """
        if name not in self._names:
            return None
        values = self._file.get_tensor(name)
        if values.numel() and not torch.stack(values.aminmax()).isfinite().all():
            raise PackError(
                f"{self._path}: '{name}' holds a number that is not finite. The pack was damaged "
                "or changed: fetch it again."
            )
        return values
