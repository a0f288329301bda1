"""Deltas of one expert against the reference, one tensor at a time."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from personae.checkpoints import Checkpoint
from personae.checkpoints.adapter import adapter_of
from personae.family.alignment import Alignment
from personae.family.chunks import rows_of


@dataclass(frozen=True)
class Deltas:
    """The deltas of one expert, read one tensor at a time.

    Attributes:
        alignment: The expert, matched with the reference.
        reference: What is subtracted.
        from_base: Whether the reference is the base the expert's adapter was opened on, so that
            its factors are the delta.
    """

    alignment: Alignment
    reference: Checkpoint
    from_base: bool

    def read(self, name: str) -> Float[Tensor, "..."]:
        """The delta of one shared tensor, fp32; rows the reference lacks are left out."""
        factors = self.factors(name)
        if factors is not None:
            return factors[0] @ factors[1]
        spec, checkpoint = self.reference.specs[name], self.alignment.checkpoint
        raw = self.alignment.files[name]
        if not spec.shape:
            return checkpoint.read(raw).float() - self.reference.read(name).float()
        delta = torch.empty(spec.shape)
        for rows in rows_of(spec):  # neither model is held whole beside it
            part = delta[rows.start : rows.stop]
            part.copy_(checkpoint.read_rows(raw, rows.start, rows.stop))
            part.sub_(self.reference.read_rows(name, rows.start, rows.stop).float())
        return delta

    def factors(
        self, name: str
    ) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]] | None:
        """The delta as exact factors, if it is that of an adapter and the tensor a matrix."""
        if not self.from_base:
            return None
        return self.alignment.checkpoint.factors(self.alignment.files[name])

    @property
    def is_stored(self) -> bool:
        """Whether the expert's values lie in its file as they are: it is no adapter."""
        return adapter_of(self.alignment.checkpoint) is None

    def read_dtype(self, name: str) -> torch.dtype:
        """What the expert's values are read in: the dtype stored, or an adapter's sums in fp32."""
        if self.factors(name) is not None:
            return torch.float32
        return self.alignment.spec(name).dtype

    def unchanged(self, name: str) -> bool:
        """Whether the delta is known to be zero without reading it."""
        return self.from_base and self.alignment.checkpoint.same_as_base(self.alignment.files[name])
