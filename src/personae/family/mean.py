"""The average of several experts, offered as a checkpoint: the reference where there is no base."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from personae._types import TensorSpec
from personae.checkpoints._protocol import Checkpoint
from personae.checkpoints.tied import still_tied
from personae.family.alignment import Alignment


class MeanOf:
    """A `Checkpoint` whose floating tensors are (1/N) Σ θ_n of those all experts have in one shape.

    Names, dtypes, other tensors and small files are the first expert's. Tensors of which another
    expert has none, or one of another shape (heads), are left out, unless they are the first's on
    request.
    """

    def __init__(
        self,
        first: Checkpoint,
        others: Sequence[Alignment],
        is_left: Callable[[str], bool] = lambda _: False,
    ) -> None:
        """Combine headers; `others` are aligned with `first`, whose own is what `is_left` says."""
        self.source = f"the average of {first.source} and {len(others)} more"
        self.revision: str | None = None
        self.auxiliary_files: Mapping[str, Path] = first.auxiliary_files
        self._first, self._others = first, others
        alike = [{*other.shared} - {*other.grown} for other in others]
        self.merged = {
            name
            for name, spec in first.specs.items()
            if spec.is_floating and not is_left(name) and all(name in names for names in alike)
        }
        buffers = set(first.specs).intersection(*(other.buffers for other in others))
        skipped = set(first.specs).intersection(*(other.skipped for other in others))
        self.specs: Mapping[str, TensorSpec] = {
            name: spec
            for name, spec in first.specs.items()
            if name in self.merged or name in buffers | skipped or is_left(name)
        }
        self.tied: Mapping[str, str] = {
            dropped: kept for dropped, kept in first.tied.items() if kept in self.specs
        }
        self.copies: Mapping[str, torch.dtype] = still_tied(first.copies, self.tied)

    def read(self, name: str) -> Tensor:
        """Return one tensor, fp32 where it is a mean; see `Checkpoint.read`."""
        if name not in self.merged:
            return self._first.read(name)
        others = (other.checkpoint.read(other.files[name]) for other in self._others)
        return mean([self._first.read(name), *others])

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows `start:stop`; see `Checkpoint.read_rows`."""
        if name not in self.merged:
            return self._first.read_rows(name, start, stop)
        others = (o.checkpoint.read_rows(o.files[name], start, stop) for o in self._others)
        return mean([self._first.read_rows(name, start, stop), *others])

    def factors(self, name: str) -> None:
        """Return None: a mean has no factors."""

    def same_as_base(self, name: str) -> bool:
        """Return False: there is no base."""
        return False

    def close(self) -> None:
        """Do nothing: the experts are their openers'."""


def mean(tensors: Sequence[Tensor]) -> Float[Tensor, "..."]:
    """The mean of the experts' values, summed in fp32 in the order given."""
    return torch.stack([tensor.float() for tensor in tensors]).mean(dim=0)
