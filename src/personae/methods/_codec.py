"""What a codec is: deltas to parts and back, and what the parts cost.

A codec sees one tensor (or block of one) of one expert at a time, and what is decoded depends on
its parts, the shape and the shared tensor alone. Four hooks let it know more while it encodes, and
are called in this order; by default none does anything:

1. `treats(spec)`: which tensors it codes; the others are kept exact or left as in the reference.
2. `share(deltas)`: from all experts' deltas of a tensor, what all tasks share of it, stored once.
3. `passes()`: over all deltas of one expert; the statistics are given to `encode`.
4. `for_family(statistics)`, `for_task(name)`: parameters that depend on the family, or on the task,
   are filled in. What comes out is recorded with each task.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar, Literal, NamedTuple

from jaxtyping import Float
from torch import Tensor

from personae._types import SVD, Layout, Parts, TensorSpec
from personae.methods._method import Parameters, Pass, Passes, Statistics, numbers, statistics_of
from personae.methods._site import Block, Site, stacked_matrices
from personae.ops.chunks import chunk_bytes
from personae.ops.rows import restore_rows, touched_rows
from personae.ops.svd import svd_bytes, truncated_svd

Treatment = Literal["code", "exact", "skip"]
"""Of a tensor: coded, kept exact in fp32, or left as in the reference."""

Rest = Literal["exact", "skip"]
"""What becomes of tensors that a codec does not code."""

BYTES_PER_NUMBER = 14
"""Peak memory of the factors of a decomposition, a number of them: found, stored and restored."""


class Bits(NamedTuple):
    """What one tensor costs in a task file, before looking at its values.

    paper: bits by the papers' rule (methods.md 3.1: DTS masks at 3 bits an element).
    paper_lean: the same rule with the fewest bits that carry the code (2 for DTS).
    stored: bits this tool writes: codes with their padding, scales and singular values. Where
        that depends on the values, the most that a delta without exact zeros takes.
    """

    paper: int
    paper_lean: int
    stored: int


@dataclass(frozen=True)
class Context:
    """What a codec knows beside the values of the block it encodes.

    Attributes:
        site: The tensor it belongs to; of one matrix of a stack, that matrix and where it starts.
        task: Name of the task.
        shared: The same block of what `share` gave for the tensor; None if it is zero throughout.
        statistics: What `passes` returned for this expert.
    """

    site: Site
    task: str = ""
    shared: Float[Tensor, "..."] | None = None
    statistics: Statistics | None = None

    @property
    def numbers(self) -> dict[str, float]:
        """The statistics that are scalars."""
        return numbers(self.statistics)


class Codec(Parameters, ABC):
    """A lossy code for deltas; its fields are its parameters. Subclasses are pure and frozen.

    A decomposition asked for at a larger rank serves every smaller one, so that a sweep over ranks
    pays for one.
    """

    shares: ClassVar[bool] = False
    """Whether all tasks share a tensor, 32 bits an element by the papers' rule."""
    counts_stored: ClassVar[bool] = False
    """Whether the papers' rule is to count what is stored."""
    free: ClassVar[frozenset[str]] = frozenset()
    """Parameters in which packs may differ that share one decomposition of each delta."""
    bytes_per_entry: ClassVar[int] = 8
    """Peak memory of passes over, encoding and decoding what is not decomposed, an entry of it: by
    default of a copy and of what is decoded."""
    by_budget: ClassVar[str] = ""
    """The parameter that a budget sets: a rank fraction, or the bytes that a task's code takes at
    most; empty if none does."""
    of_family: ClassVar[tuple[str, ...]] = ()
    """Parameters that `for_family` fills in where they are None."""

    def treats(self, spec: TensorSpec) -> Treatment:
        """What becomes of this tensor; by default every tensor is coded."""
        return "code"

    def blocks(self, spec: TensorSpec) -> tuple[Block, ...]:
        """Slices of this tensor to be coded apart.

        By default the matrices of a stack, and any other tensor as one block.
        """
        whole = (Block(0, 0, spec.shape[0]),) if spec.shape else ()
        return stacked_matrices(spec.name, spec.shape) or whole

    def share(self, deltas: Sequence[Float[Tensor, "..."]]) -> Float[Tensor, "..."]:
        """What all tasks share of a tensor, fp32, if the codec `shares`.

        Args:
            deltas: Of one tensor: one an expert that has it, in recipe order; fp32.

        Raises:
            AssertionError: if the codec shares nothing.
        """
        raise AssertionError(f"{type(self).__name__} shares nothing")

    def passes(self) -> Passes:
        """The passes it takes over all deltas of one expert before it codes; by default none."""
        yield from ()
        return {}

    def for_family(self, statistics: Sequence[Statistics]) -> "Codec":
        """The codec with parameters filled in that depend on the family.

        Args:
            statistics: What the passes found, one an expert; empty ones in a plan.
        """
        return self

    def for_task(self, task: str) -> "Codec":
        """The codec with the parameters of this task.

        Raises:
            MethodError: if they are not given.
        """
        return self

    def degenerates(self, experts: int) -> str:
        """What difference vectors from the average of so many experts become; empty if no less."""
        return ""

    def rank(self, shape: tuple[int, ...]) -> int:
        """Rank wanted of a decomposition of a delta of this shape; 0 if it needs none."""
        return 0

    def decompose(self, delta: Float[Tensor, "..."], rank: int) -> SVD:
        """Truncated SVD of the delta, seen as a matrix, at this rank or its numerical rank.

        Rows of `u` that belong to rows without a change are exact zeros.
        """
        return decompose_touched(delta, rank)

    def working_bytes(self, shape: tuple[int, ...]) -> int:
        """Peak memory of passes over a block, encoding and decoding it, the block itself left out.

        Beside what is decoded stand the factors of a decomposition as found, stored and restored.
        """
        rank, numel = self.rank(shape), prod(shape)
        if not rank:
            return chunk_bytes(numel) + self.bytes_per_entry * numel
        decomposing = self.decomposing_bytes((shape[0], numel // shape[0]), rank)
        return chunk_bytes(numel) + max(decomposing, self.decoding_bytes(shape, rank))

    def decomposing_bytes(self, matrix: tuple[int, int], rank: int) -> int:
        """Peak memory of `decompose`, the delta itself left out."""
        return svd_bytes(matrix, rank)

    def decoding_bytes(self, shape: tuple[int, ...], rank: int) -> int:
        """Peak memory of decoding a block of this rank (0: not decomposed), the result included."""
        numel = prod(shape)
        if not rank:
            return self.bytes_per_entry * numel
        return 4 * numel + BYTES_PER_NUMBER * rank * (shape[0] + numel // shape[0])

    @abstractmethod
    def encode(
        self, delta: Float[Tensor, "..."], svd: SVD | None = None, context: Context | None = None
    ) -> Parts:
        """Code a delta (fp32).

        Args:
            delta: The delta of a tensor that is coded, or a block of it.
            svd: If given, it has at least `rank(delta.shape)` triplets, or its numerical rank.
            context: What else is known; by default `alone(delta)`.
        """
        ...

    @abstractmethod
    def decode(
        self,
        parts: Parts,
        shape: tuple[int, ...],
        shared: Float[Tensor, "..."] | None = None,
    ) -> Float[Tensor, "..."]:
        """Rebuild the delta (fp32, of this shape) from its parts and the shared block alone.

        It is where the parts are.
        """
        ...

    def triplets(self, parts: Parts, shape: tuple[int, ...]) -> SVD | None:
        """Decoded vectors and values of which `decode` gives the product, if the parts hold such.

        The vectors are as they come out of the code: neither orthogonal nor of length 1. They are
        the caller's to overwrite.
        """
        return None

    @abstractmethod
    def layout(self, shape: tuple[int, ...], rank: int | None = None) -> Layout:
        """The parts that a block of this shape has, if any; those in a pack are held to it.

        Args:
            shape: Shape of the tensor or block; it has elements.
            rank: Rank stored: elements of `singular_values`; None without decomposition. It may be
                any number; the layout says by the range of `singular_values` which there are.
        """
        ...

    @abstractmethod
    def bits(self, shape: tuple[int, ...], rank: int | None = None) -> Bits:
        """Size of the code of a delta of this shape without exact zeros.

        Args:
            shape: Shape of the tensor or block.
            rank: Rank stored; by default `rank(shape)`, that of a delta of full rank.
        """
        ...

    def most_bits(self) -> int | None:
        """Most bits of a whole task, where a parameter bounds them; else shapes tell."""
        return None

    def least_bits(self, shape: tuple[int, ...]) -> int:
        """Fewest bits of a delta of this shape that is not left out, if its size is free."""
        return 0

    def zero_bits(self, shape: tuple[int, ...]) -> int:
        """Most bits that exact zeros in a delta of this shape take beyond `bits`."""
        return 0

    def remark(self, coded: Iterable[tuple[tuple[int, ...], Parts]]) -> str:
        """What a person should know of a task that was coded, to be noted; empty if nothing.

        Args:
            coded: Shape and parts of each block that the codec coded and that changed.
        """
        return ""

    def alone(self, delta: Float[Tensor, "..."]) -> Context:
        """The context where this delta is the only one of the only expert."""
        shared = self.share([delta]) if self.shares else None
        context = Context(Site("", tuple(delta.shape)), "", shared)
        return replace(context, statistics=self.statistics([(delta, context)]))

    def statistics(self, blocks: Sequence[tuple[Float[Tensor, "..."], Context]]) -> Statistics:
        """What the codec's passes find in deltas of one expert that are all in memory."""

        def take(one: Pass) -> Any:
            terms = {str(n): one.term(*block) for n, block in enumerate(blocks)}
            return terms if one.apart else sum(terms.values())

        return statistics_of(self.passes(), take)


def decompose_touched(delta: Float[Tensor, "out ..."], rank: int, **options: Any) -> SVD:
    """Truncated SVD of the rows that changed; the other rows of `u` are exact zeros.

    Args:
        delta: Seen as a matrix (out, rest).
        rank: Triplets wanted.
        **options: Of `truncated_svd`.
    """
    matrix = delta.reshape(len(delta), -1)
    touched = touched_rows(matrix)
    if touched.all():
        return truncated_svd(matrix, rank, **options)
    svd = truncated_svd(matrix[touched], rank, overwrite=True, **options)
    return svd._replace(u=restore_rows(svd.u, touched))
