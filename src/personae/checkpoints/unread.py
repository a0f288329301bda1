"""A base of which only names and shapes are asked: what adapters add does not depend on it."""

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from personae._types import TensorSpec
from personae.checkpoints._protocol import Checkpoint


class Unread:
    """A checkpoint whose tensors of some names read as zeros: no file is opened for them.

    Attributes:
        model: The checkpoint as it is.
    """

    def __init__(self, model: Checkpoint, names: Collection[str]) -> None:
        """See a model without the values of these names."""
        self.model, self._names = model, frozenset(names)
        self.source, self.revision = model.source, model.revision
        self.specs: Mapping[str, TensorSpec] = model.specs
        self.tied, self.copies = model.tied, model.copies
        self.auxiliary_files: Mapping[str, Path] = model.auxiliary_files

    def read(self, name: str) -> Tensor:
        """Return one tensor; see `Checkpoint.read`."""
        if name not in self._names:
            return self.model.read(name)
        return torch.zeros(self.specs[name].shape, dtype=self.specs[name].dtype)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows `start:stop`; see `Checkpoint.read_rows`."""
        if name not in self._names:
            return self.model.read_rows(name, start, stop)
        spec = self.specs[name]
        return torch.zeros((stop - start, *spec.shape[1:]), dtype=spec.dtype)

    def factors(
        self, name: str
    ) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]] | None:
        """Return None: it is no adapter."""

    def same_as_base(self, name: str) -> bool:
        """Return False: it is no adapter."""
        return False

    def close(self) -> None:
        """Close the model."""
        self.model.close()
