"""shared.safetensors: what all tasks share beside the reference, one fp32 tensor a name."""

from pathlib import Path

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
        found = {n: tuple(self._file.get_slice(n).get_shape()) for n in self._file.keys()}
        if found != record.tensors:
            raise PackError(f"{path} does not fit its record in pack.json: it holds {found}.")
        self._names = set(found)

    def read(self, name: str) -> Float[Tensor, "..."] | None:
        """The shared tensor of this reference name, fp32; None if there is none (it is zero)."""
        return self._file.get_tensor(name) if name in self._names else None
