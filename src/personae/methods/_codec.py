"""What a codec is: deltas to parts and back, and what the parts cost."""

from abc import ABC, abstractmethod
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from personae._types import SVD, Parts, TensorSpec
from personae.methods._parameters import Parameters
from personae.methods._site import Block


class Bits(NamedTuple):
    """What one tensor costs in a task file, before looking at its values.

    counted: bits by the papers' rule (methods.md 3.1: DTS masks at 3 bits an element).
    counted_lean: the same rule with the fewest bits that carry the code (2 for DTS).
    stored: bits this tool writes: codes with their padding, scales and singular values.
    """

    counted: int
    counted_lean: int
    stored: int


class Codec(Parameters, ABC):
    """A lossy code for deltas; its fields are its parameters. Subclasses are pure and frozen.

    A codec sees one tensor (or block of one) at a time. A decomposition asked for at a larger rank
    serves every smaller one, so that a sweep over ranks pays for one.
    """

    def blocks(self, spec: TensorSpec) -> tuple[Block, ...]:
        """Slices of this tensor to be coded apart; by default the whole tensor is one block."""
        return (Block(0, 0, spec.shape[0]),) if spec.shape else ()

    @abstractmethod
    def rank(self, shape: tuple[int, ...]) -> int:
        """Rank wanted of a decomposition of a delta of this shape; 0 if it needs none."""
        ...

    @abstractmethod
    def decompose(self, delta: Float[Tensor, "..."], rank: int) -> SVD:
        """Truncated SVD of the delta, seen as a matrix, at this rank or its numerical rank."""
        ...

    @abstractmethod
    def encode(self, delta: Float[Tensor, "..."], svd: SVD | None = None) -> Parts:
        """Code a delta (fp32). `svd`, if given, has at least `rank(delta.shape)` triplets."""
        ...

    @abstractmethod
    def decode(self, parts: Parts, shape: tuple[int, ...]) -> Float[Tensor, "..."]:
        """Rebuild the delta (fp32, of this shape) from its parts alone, where they are."""
        ...

    @abstractmethod
    def bits(self, shape: tuple[int, ...], rank: int | None = None) -> Bits:
        """Size of the code of a delta of this shape without exact zeros.

        Args:
            shape: Shape of the tensor or block.
            rank: Rank stored; by default `rank(shape)`, that of a delta of full rank.
        """
        ...
