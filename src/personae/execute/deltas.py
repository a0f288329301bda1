"""Deltas of one expert against the reference, one tensor at a time."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from personae.checkpoints import Checkpoint
from personae.checkpoints.family import Alignment

BYTES_PER_ELEMENT = 32
"""Working memory of one coded element: two reads, the delta, its decomposition, its decoding."""


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
        expert = self.alignment.checkpoint.read(self.alignment.files[name])
        reference = self.reference.read(name)
        if name in self.alignment.grown:
            expert = expert[: reference.shape[0]]
        return expert.float() - reference.float()

    def factors(
        self, name: str
    ) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]] | None:
        """The delta as exact factors, if it is that of an adapter and the tensor a matrix."""
        if not self.from_base:
            return None
        return self.alignment.checkpoint.factors(self.alignment.files[name])

    def unchanged(self, name: str) -> bool:
        """Whether the delta is known to be zero without reading it."""
        return self.from_base and self.alignment.checkpoint.same_as_base(self.alignment.files[name])

    def cost(self, name: str) -> int:
        """Peak bytes of working on one tensor."""
        return self.alignment.spec(name).numel * BYTES_PER_ELEMENT
