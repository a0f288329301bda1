"""A merge method: the task vectors of one tensor to one, after passes over the whole model."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import (
    Any,
    ClassVar,
    Concatenate,
    Literal,
    NamedTuple,
    ParamSpec,
    cast,
)

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from numpy.typing import NDArray
from torch import Tensor

from personae.errors import Faults, MethodError
from personae.methods._deltas import DeltaBlocks, block_entries, delta_blocks, joined
from personae.methods._entries import Undecided
from personae.methods._matrices import is_matrix
from personae.methods._method import Parameters, Pass, Passes, Scope, Statistics, statistics_of
from personae.methods._site import Site
from personae.ops.bases import joint_basis

Stack = Tensor | NDArray[np.floating] | Sequence[Tensor | NDArray[np.floating]]
"""Task vectors of one tensor, (expert, *shape), or one array an expert."""

Conventions = Literal["papers", "mergekit"]
"""Whose algorithm a name means, where two codes use one name for two."""

Side = Literal["none", "left", "right", "both"]
Factors = tuple[Float[Tensor, "out _"], Float[Tensor, "_ in"]]
"""Exact low-rank factors of one expert's task vector, left @ right."""


class Given(NamedTuple):
    """What a method is given of one tensor.

    Attributes:
        stack: The task vectors, as they are or in bases that all share.
        site: Which tensor.
        expand: What makes the merged task vector of the method's answer.
        reference: What the task vectors are relative to, fp32, where it was read with them.
    """

    stack: Float[Tensor, "expert ..."]
    site: Site
    expand: Callable[[Tensor], Tensor]
    reference: Float[Tensor, "..."] | None = None


def matrix_memory(site: Site, experts: int, *, stack: int = 0, entry: int, square: int = 0) -> int:
    """Peak memory of a method for matrices, the stack left out, in bytes.

    Args:
        site: Which matrix.
        experts: How many there are.
        stack: Bytes an entry of the stack.
        entry: Bytes an entry of one expert.
        square: Bytes an entry of the Gram matrix of the smaller side.
    """
    return (stack * experts + entry) * prod(site.shape) + square * min(site.shape) ** 2


def stacked_memory(site: Site, experts: int, *, stack: int, tall: int) -> int:
    """Peak memory of decomposing all matrices side by side, or one above the other, in bytes.

    Args:
        site: Which matrix.
        experts: How many there are.
        stack: Bytes an entry of the stack.
        tall: The same, where the matrices side by side are still taller than wide.
    """
    entries, short, long = prod(site.shape), min(site.shape), max(site.shape)
    side = min(long, experts * short)
    each = tall if long > experts * short else stack
    return max(each * experts * entries + 6 * entries, 36 * side * side + 8 * entries)


class MergeMethod(Parameters, ABC):
    """A static method: a frozen object whose fields are its parameters; calling it merges.

    Subclasses are of one of three kinds: `Linear`, `RowWise`, `MatrixWise`.

    Examples:
        >>> from personae import TIES
        >>> TIES(density=0.5)(torch.tensor([[3.0, 1.0], [1.0, -2.0]])).tolist()
        [3.0, -2.0]
    """

    conventions: ClassVar[Conventions] = "papers"
    """Whose algorithm it is."""
    order_free: ClassVar[bool] = True
    """Whether the order of experts does not matter (beyond rounding)."""
    counts_experts: ClassVar[bool] = True
    """Whether a further task vector of zeros changes the result."""
    needs: ClassVar[Literal["deltas", "base", "adapters", "models", "experts", "either"]] = "deltas"
    """`deltas`: task vectors, or difference vectors where there is no base. `base`: task vectors
    alone. `adapters`: task vectors of LoRA adapters. `models`: the models themselves, the base
    first where there is one, and a model comes out. `experts`: the same without the base. `either`:
    task vectors where there is a base, and the models where there is none."""
    takes: ClassVar[int | None] = None
    """How many of these it takes; None for any number."""
    degenerates: ClassVar[str] = ""
    """On difference vectors, what it amounts to; empty if to nothing simpler."""
    multiplies: ClassVar[bool] = True
    """Whether it multiplies matrices: BLAS keeps memory for that."""
    usual_passes: ClassVar[int] = 0
    """How many passes it usually takes, without those that are answered late."""
    model_wide: ClassVar[tuple[str, ...]] = ()
    """Parameters that `passes` reads: while these are over the whole model, they cannot differ from
    tensor to tensor."""
    default_scope: ClassVar[Scope] = "model"
    """What its passes are over, unless a parameter `scope` says it."""
    can_decide_late: ClassVar[bool] = False
    """Whether it has a pass that may be answered late, and takes `undecided`."""
    whole_rows: ClassVar[bool] = False
    """Whether blocks that it is given hold whole rows (`Site.row_entries`), of any method that is
    given blocks."""
    rows: ClassVar[tuple[int, int]] = (4, 36)
    """Peak memory of merging rows, their stack left out: in bytes an entry of the stack, and beside
    that in bytes an entry of one expert (the reference's values and the cast result included). That
    of `Entrywise` methods follows from how models are stored."""

    def __call__(self, task_vectors: Stack, *, name: str = "") -> Any:
        """Merge the task vectors of one tensor, all in memory; reads and writes no file.

        Args:
            task_vectors: (expert, *shape), or one array an expert: tensors or numpy arrays of any
                floating dtype; computed in fp32. The models' own tensors where it needs those.
            name: The tensor's name, by which methods tell embeddings from linear layers and draw
                their masks.

        Returns:
            The merged task vector (or model), (*shape), in the dtype and of the kind of what was
            given.

        Raises:
            MethodError: These are no task vectors, or parameters are not one an expert.
        """
        stack = _stacked(self.name, task_vectors)
        faults = Faults()
        self.check_experts(len(stack), faults, has_base=not self.of_models())
        faults.raise_if_any(MethodError)
        site = Site(name, tuple(stack.shape[1:]))
        merged = self.apply(stack.float().contiguous(), site=site).to(stack.dtype)
        arrays = task_vectors if isinstance(task_vectors, Sequence) else [task_vectors]
        return merged.numpy() if isinstance(arrays[0], np.ndarray) else merged

    @abstractmethod
    def merge(
        self,
        task_vectors: Float[Tensor, "expert *shape"],
        statistics: Statistics,
        site: Site,
        undecided: Undecided | None = None,
    ) -> Float[Tensor, "*shape"]:
        """Apply the method to the stacked task vectors of one tensor, or of rows of it.

        Args:
            task_vectors: One an expert, in recipe order; fp32.
            statistics: What the method's passes found.
            site: Which tensor, and which rows.
            undecided: Where a method that `can_decide_late` tells of entries that it merged before
                it knew the majority; not given to others.

        Returns:
            The merged task vector, fp32, on the device of the input.
        """
        ...

    def passes(self, experts: int) -> Passes:
        """The passes it takes before it runs: over the whole model, or over each tensor alone.

        By default none.
        """
        yield from ()
        return {}

    def entrywise(self, site: Site) -> bool:
        """Whether an entry of the result depends on that entry of the task vectors alone.

        And on the statistics; rows can be cut apart then.
        """
        return True

    def row_entries(self, site: Site) -> int:
        """Entries that lie in one block, those of a row if it needs `whole_rows`."""
        return site.row_entries if self.whole_rows else 1

    def equivariant(self, site: Site) -> Side:
        """Whether turning all task vectors (matrices) from this side turns the result.

        By one orthogonal matrix. Adapters are then merged as small matrices, exactly.
        """
        return "none"

    def coefficients(self, experts: int) -> Sequence[float] | None:
        """c_n if the result is Σ c_n τ_n; else None.

        Where rounding in fp32 does not show, (1 - Σ c_n) θ₀ + Σ c_n θ_n is formed instead.
        """
        return None

    def is_late(self) -> bool:
        """Whether so few entries wait for its late passes that it is merged before them."""
        return False

    @classmethod
    def of_models(cls) -> bool:
        """Whether it is given models, and not difference vectors."""
        return cls.needs in ("models", "experts", "either")

    @classmethod
    def has_passes(cls) -> bool:
        """Whether it takes passes."""
        return cls.passes is not MergeMethod.passes

    @property
    def passes_over(self) -> Scope:
        """Whether its passes are over the whole model, or over each tensor alone."""
        return getattr(self, "scope", self.default_scope)

    def memory(self, site: Site, experts: int) -> int:
        """Peak memory in bytes of merging a matrix given whole, its stack left out.

        By default more than any needs.
        """
        return matrix_memory(site, experts, stack=64, entry=64, square=64)

    @classmethod
    def row_bytes(cls, entries: int, experts: int) -> int:
        """Peak memory of merging rows of so many entries, their stack included."""
        of_stack, of_one = cls.rows
        return ((4 + of_stack) * experts + of_one) * entries

    def whole_bytes(self, site: Site, experts: int) -> int:
        """Peak memory of merging a matrix given whole, its stack included."""
        entries = prod(site.shape)
        reading = 12 * entries  # the reference in fp32, and a model as it is stored
        return 4 * experts * entries + max(reading, self.memory(site, experts))

    def apply(
        self,
        task_vectors: Float[Tensor, "expert *shape"],
        statistics: Statistics | None = None,
        site: Site | None = None,
        undecided: Undecided | None = None,
    ) -> Float[Tensor, "*shape"]:
        """`merge`, by default with a nameless tensor and what passes over it alone find."""
        site = site or Site("", tuple(task_vectors.shape[1:]))
        if statistics is None:
            statistics = self.statistics([(site, task_vectors)])
        return self.merge(task_vectors, statistics, site, undecided)

    def merge_factors(
        self,
        factors: Sequence[Factors],
        statistics: Statistics | None = None,
        site: Site | None = None,
    ) -> Float[Tensor, "out in"]:
        """The same for the matrices of LoRA experts, one pair of exact factors an expert."""
        site = site or Site("", (factors[0][0].shape[0], factors[0][1].shape[1]))
        stack, site, expand, _ = self.in_bases(factors, site)
        return expand(self.apply(stack, statistics, site))

    def in_bases(self, factors: Sequence[Factors], site: Site) -> Given:
        """What the method is given of task vectors that are known as exact factors.

        Where it is `equivariant`, these are the task vectors in orthonormal bases of all left and
        right factors: matrices of Σ ranks rows or columns, or both. Elsewhere they are dense, as
        they are where the ranks add up to as many as a side has, for nothing would be saved. A
        method that needs adapters is about these bases, and has them at any rank.
        """
        side = self.equivariant(site)
        cores = self.needs == "adapters" and side == "both"
        lefts, rights = [left for left, _ in factors], [right for _, right in factors]
        ranks = sum(left.shape[1] for left in lefts)
        basis = cobasis = None
        if side in ("left", "both") and (cores or ranks < site.shape[0]):
            basis = joint_basis(lefts)[0].float()
            lefts = [basis.T @ left for left in lefts]
        if side in ("right", "both") and (cores or ranks < site.shape[1]):
            cobasis = joint_basis([right.T for right in rights])[0].float()
            rights = [right @ cobasis for right in rights]

        def expand(merged: Tensor) -> Tensor:
            merged = merged if basis is None else basis @ merged
            return merged if cobasis is None else merged @ cobasis.T

        stack = torch.stack([a @ b for a, b in zip(lefts, rights, strict=True)])
        return Given(stack, replace(site, cores=cores), expand)

    def statistics(self, stacks: Iterable[tuple[Site, Float[Tensor, "expert ..."]]]) -> Statistics:
        """What the method's passes find in tensors that are all in memory."""
        if not self.has_passes():
            return {}
        model = list(stacks)

        def take(one: Pass) -> Tensor:
            terms = [
                one.term(self.sampled(vectors, one.sample), self, site)
                for site, vectors in model
                if one.applies(self, site)
            ]
            return sum(terms[1:], terms[0]) if terms else torch.zeros(())

        return statistics_of(self.passes(len(model[0][1])), take)

    def sampled(self, task_vectors: Tensor, sample: int) -> Tensor:
        """One row in so many; the first at least, and a vector whole if rows are."""
        is_cut = task_vectors.ndim > 1 + self.whole_rows
        return task_vectors[:, ::sample] if sample > 1 and is_cut else task_vectors


class Entrywise(MergeMethod):
    """Each entry of the result from that entry of the task vectors, and statistics."""

    multiplies: ClassVar[bool] = False

    def working(self, experts: int) -> int:
        """Bytes that an entry of a block takes beside its deltas and the reference's value.

        While it is merged, or counted in a pass: sums, elected signs, places.
        """
        return 28

    def block_bytes(
        self, site: Site, entries: int, experts: int, *, has_reference: bool = True
    ) -> int:
        """Memory of one block of a chunk of so many entries, what is beside it included.

        Args:
            site: Which tensor.
            entries: Those of the chunk.
            experts: Models that the method is given.
            has_reference: Whether these are deltas, so that the reference's values are beside them.
        """
        block = min(entries, block_entries(experts, self.row_entries(site)))
        return block * (4 * experts + 4 * has_reference + self.working(experts))

    @abstractmethod
    def merge_blocks(
        self,
        blocks: DeltaBlocks,
        statistics: Statistics,
        site: Site,
        undecided: Undecided | None = None,
    ) -> Iterator[Float[ndarray, " entry"]]:
        """As `merge`, a block of entries at a time.

        Args:
            blocks: The task vectors; the method may work in them.
            statistics: What the method's passes found.
            site: Which tensor, and where in it the first entry is.
            undecided: As for `merge`.

        Returns:
            The merged blocks in order, fp32. Each is taken before the next one is asked for.
        """
        ...

    def merge(
        self,
        task_vectors: Float[Tensor, "expert *shape"],
        statistics: Statistics,
        site: Site,
        undecided: Undecided | None = None,
    ) -> Float[Tensor, "*shape"]:
        """See `MergeMethod.merge`."""
        blocks = delta_blocks(task_vectors, self.row_entries(site))
        return joined(self.merge_blocks(blocks, statistics, site, undecided), task_vectors)


class Linear(Entrywise):
    """Σ c_n τ_n, with coefficients for the whole tensor."""

    def working(self, experts: int) -> int:
        """The sum."""
        return 4

    @abstractmethod
    def coefficients(self, experts: int) -> Sequence[float] | None:
        """c_n; None where the sum must be rounded as `merge` does it."""
        ...


class RowWise(Entrywise):
    """Any other: what it is depends on the entries themselves."""


class MatrixWise(MergeMethod):
    """Whole matrices, decomposed; other tensors entry by entry, by default as an average."""

    side: ClassVar[Side] = "none"
    """From which side it is `equivariant`, where that is one for all tensors and parameters."""

    def entrywise(self, site: Site) -> bool:
        """On all but the tensors that its parameter `tensors` names, or the linear layers."""
        return not is_matrix(getattr(self, "tensors", "linear"), site)

    def equivariant(self, site: Site) -> Side:
        """See `MergeMethod.equivariant`."""
        return self.side


P = ParamSpec("P")


def as_function(method: Callable[P, MergeMethod]) -> Callable[Concatenate[Stack, P], Any]:
    """The function of a class of methods: `ties(task_vectors, density=0.2)`."""
    cls = cast("type[MergeMethod]", method)

    def function(task_vectors: Stack, *args: P.args, **parameters: P.kwargs) -> Any:
        return method(*args, **parameters)(task_vectors)

    texts = [f"    {name}: {field.description}" for name, field in cls.model_fields.items()]
    function.__name__ = function.__qualname__ = cls.name
    function.__module__ = cls.__module__
    function.__doc__ = "\n".join([f"{inspect.getdoc(cls)}\n\nParameters:", *texts])
    own = inspect.Parameter("task_vectors", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    rest = inspect.signature(cls).parameters.values()
    function.__signature__ = inspect.Signature([own, *rest])  # type: ignore[attr-defined]
    return function


def _stacked(method: str, task_vectors: Stack) -> Tensor:
    """Task vectors of one tensor as one tensor.

    Raises:
        MethodError: They are of several shapes, are no floating task vectors, or hold NaN or Inf.
    """
    if isinstance(task_vectors, Sequence):
        tensors = [torch.as_tensor(array) for array in task_vectors]
        shapes = {tuple(tensor.shape) for tensor in tensors}
        if len(shapes) != 1:
            raise MethodError(
                f"{method}: task vectors of one tensor have one shape; found "
                f"{sorted(shapes) or 'none'}. Give those of one tensor, one an expert."
            )
        stack = torch.stack(tensors)
    else:
        stack = torch.as_tensor(task_vectors)
    if stack.ndim < 1 or not len(stack) or not stack.is_floating_point():
        raise MethodError(
            f"{method}: found a {stack.dtype} tensor of shape {tuple(stack.shape)}. Give "
            "floating task vectors of shape (expert, *shape), of one expert at least."
        )
    odd = [n for n, one in enumerate(stack) if not one.isfinite().all()]
    if odd:
        raise MethodError(
            f"{method}: task vectors {', '.join(map(str, odd))} of {len(stack)} (counted from 0) "
            "hold NaN or infinite values. Repair the models, or leave the tensor out."
        )
    return stack
