"""What every checkpoint reader offers: headers first, tensors and rows of them on demand."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from personae._types import TensorSpec


@runtime_checkable
class Checkpoint(Protocol):
    """One model, read lazily. Opening it reads headers only.

    Attributes:
        source: Where it came from, as the user wrote it: a path, a hub id, or a class name.
        revision: The hub commit it was resolved to; None for anything local.
        specs: Name to `TensorSpec`, sorted by name. Tied tensors appear once.
        tied: Dropped name to the kept name of the tensor it shares.
        copies: Names of `tied` under which the tensor is stored again, each with the dtype that it
            is stored in there (see `tied.WithCopies`).
        auxiliary_files: Relative file name to path of the small files beside the weights
            (configuration, tokenizer, processor, custom code), for copying.
    """

    source: str
    revision: str | None
    specs: Mapping[str, TensorSpec]
    tied: Mapping[str, str]
    copies: Mapping[str, torch.dtype]
    auxiliary_files: Mapping[str, Path]

    def read(self, name: str) -> Tensor:
        """Return one tensor, of the shape in `specs[name]`, on the CPU.

        Its dtype is that of the spec, or fp32 where the value is computed rather than stored
        (a weight with an adapter applied). The caller must not write into it.
        """
        ...

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows `start:stop` along the first axis of one tensor, without the others."""
        ...

    def factors(
        self, name: str
    ) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]] | None:
        """Return fp32 `(left, right)` with tensor = base tensor + left @ right, if exactly so.

        Only an adapter on top of a base has factors; every other reader returns None.
        """
        ...

    def same_as_base(self, name: str) -> bool:
        """Whether the tensor is known, without reading it, to be the base's own.

        Only an adapter on top of a base can say True; every other reader returns False.
        """
        ...

    def close(self) -> None:
        """Release files and mappings. The headers stay readable."""
        ...
