"""A static method: the task vectors of one tensor to one, after looks at the whole model."""

import inspect
import keyword
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from personae.methods._parameters import Parameters
from personae.methods._site import Site
from personae.methods._undecided import Undecided
from personae.ops.bases import joint_basis

Statistics = Mapping[str, Tensor]
"""What a method has to know beyond the entries it is given, by name."""

Side = Literal["none", "left", "right", "both"]
Scope = Literal["model", "tensor"]
Factors = tuple[Float[Tensor, "out _"], Float[Tensor, "_ in"]]
"""Exact low-rank factors of one expert's task vector, left @ right."""


class Given(NamedTuple):
    """What a method is given of one tensor.

    Attributes:
        stack: The task vectors, as they are or in bases that all share.
        site: Which tensor.
        expand: What makes the merged task vector of the method's answer.
    """

    stack: Float[Tensor, "expert ..."]
    site: Site
    expand: Callable[[Tensor], Tensor]


def _everywhere(_: Any, __: Site) -> bool:
    return True


class Measure(NamedTuple):
    """One look at the tensors a statistic is about.

    Attributes:
        name: What is measured, for progress and records.
        tally: `tally(task_vectors, parameters, site)`, the share of the entries given; shares are
            summed over all tensors, and over blocks of rows where the method is entry-wise.
            int64, or floating (then summed in the order of tensors and rows).
        applies: Whether a tensor is looked at.
        sample: Looks at about one row in so many, spread over all tensors: enough for a guess.
        late: Whether it may be answered by None: the method merges all the same, telling in an
            `Undecided` what of its result depends on it.
    """

    name: str
    tally: Callable[[Tensor, Any, Site], Tensor]
    applies: Callable[[Any, Site], bool] = _everywhere
    sample: int = 1
    late: bool = False


Gathering = Generator[Measure, Any, Statistics]
"""Yields what to measure, is sent the sum over all tensors, returns the statistics."""


def gathered(gathering: Gathering, answer: Callable[[Measure], Tensor | None]) -> Statistics:
    """The statistics, once `answer` has told the sum of each measure."""
    told: Any = None
    while True:
        try:
            measure = gathering.send(told)
        except StopIteration as done:  # of the gathering alone: an answer's would be a fault
            return done.value
        told = answer(measure)


@dataclass(frozen=True)
class MergeMethod:
    """A registered static method; what it computes is `merge`.

    Attributes:
        name: Its name in recipes.
        summary: One line.
        paper: Where it is from.
        parameters: Their model.
        function: `function(task_vectors, **parameters)`. If it takes `statistics`, `site` or
            `undecided`, it is given them.
        order_free: Whether the order of experts does not matter (beyond rounding).
        gather: `gather(parameters, experts)`, the looks it takes before it runs: over the whole
            model, or over each tensor alone (see `scope_of`).
        late: `late(parameters)`: whether so few entries wait for its late looks that it is merged
            before them.
        scope: What its looks are at, unless a parameter `scope` says it.
        entrywise: `entrywise(parameters, site)`: whether an entry of the result depends on that
            entry of the task vectors and the statistics alone, so that rows can be cut apart.
        equivariant: `equivariant(parameters, site)`: whether turning all task vectors (matrices)
            by one orthogonal matrix from this side turns the result. Adapters are then merged as
            small matrices, exactly.
        coefficients: `coefficients(parameters, experts)`: c_n if the result is Σ c_n τ_n; or None.
            Where rounding in fp32 does not show, (1 - Σ c_n) θ₀ + Σ c_n θ_n is formed instead.
        needs: "deltas": task vectors, or difference vectors where there is no base. "base": task
            vectors alone. "adapters": task vectors of LoRA adapters, as cores (`in_bases`).
        degenerates: On difference vectors, what it amounts to; empty if to nothing simpler.
        looks: How many looks it usually takes, without those that are answered late.
        model_wide: Parameters that `gather` reads: while it looks at the whole model, they cannot
            differ from tensor to tensor.
        bytes_per_entry: Peak working memory, in bytes an entry of the stack, itself included.
    """

    name: str
    summary: str
    paper: str
    parameters: type[Parameters]
    function: Callable[..., Tensor]
    order_free: bool
    gather: Callable[[Any, int], Gathering] | None
    late: Callable[[Any], bool]
    scope: Scope
    entrywise: Callable[[Any, Site], bool]
    equivariant: Callable[[Any, Site], Side]
    coefficients: Callable[[Any, int], Sequence[float] | None]
    needs: Literal["deltas", "base", "adapters"]
    degenerates: str
    looks: int
    model_wide: tuple[str, ...]
    bytes_per_entry: int

    def merge(
        self,
        task_vectors: Float[Tensor, "expert *shape"],
        parameters: Parameters,
        statistics: Statistics | None = None,
        site: Site | None = None,
        undecided: Undecided | None = None,
    ) -> Float[Tensor, "*shape"]:
        """Apply the method to the stacked task vectors of one tensor, or of rows of it.

        Args:
            task_vectors: One an expert, in recipe order; fp32.
            parameters: As `build` made them.
            statistics: What the method's looks told; by default they look at these alone.
            site: Which tensor, and which rows; by default a nameless one.
            undecided: Where a method that `can_decide_late` tells of entries that it merged before
                it knew the majority; not given to others.

        Returns:
            The merged task vector, fp32, on the device of the input.
        """
        site = site or Site("", tuple(task_vectors.shape[1:]))
        given: dict[str, Any] = {}
        if "site" in self._takes:
            given["site"] = site
        if "statistics" in self._takes:
            given["statistics"] = (
                self.statistics([(site, task_vectors)], parameters)
                if statistics is None
                else statistics
            )
        if self.can_decide_late:
            given["undecided"] = undecided
        for name, value in parameters:
            given[f"{name}_" if keyword.iskeyword(name) else name] = value
        return self.function(task_vectors, **given)

    @property
    def can_decide_late(self) -> bool:
        """Whether it has a look that may be answered late, and takes `undecided`."""
        return "undecided" in self._takes

    def scope_of(self, parameters: Parameters) -> Scope:
        """Whether its looks are at the whole model, or at each tensor alone."""
        return getattr(parameters, "scope", self.scope)

    def merge_factors(
        self,
        factors: Sequence[Factors],
        parameters: Parameters,
        statistics: Statistics | None = None,
        site: Site | None = None,
    ) -> Float[Tensor, "out in"]:
        """The same for the matrices of LoRA experts, one pair of exact factors an expert."""
        site = site or Site("", (factors[0][0].shape[0], factors[0][1].shape[1]))
        stack, site, expand = self.in_bases(factors, parameters, site)
        return expand(self.merge(stack, parameters, statistics, site))

    def in_bases(self, factors: Sequence[Factors], parameters: Parameters, site: Site) -> Given:
        """What the method is given of task vectors that are known as exact factors.

        Where it is `equivariant`, these are the task vectors in orthonormal bases of all left and
        right factors: matrices of Σ ranks rows or columns, or both. Elsewhere they are dense, as
        they are where the ranks add up to as many as a side has, for nothing would be saved. A
        method that needs adapters is about these bases, and has them at any rank.
        """
        side = self.equivariant(parameters, site)
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

    def statistics(
        self, stacks: Iterable[tuple[Site, Float[Tensor, "expert ..."]]], parameters: Parameters
    ) -> Statistics:
        """What the method's looks tell of tensors that are all in memory."""
        if self.gather is None:
            return {}
        model = list(stacks)

        def answer(measure: Measure) -> Tensor:
            shares = [
                measure.tally(one_row_in(measure.sample, vectors), parameters, site)
                for site, vectors in model
                if measure.applies(parameters, site)
            ]
            return sum(shares[1:], shares[0]) if shares else torch.zeros(())

        return gathered(self.gather(parameters, len(model[0][1])), answer)

    @cached_property
    def _takes(self) -> set[str]:
        return set(inspect.signature(self.function).parameters)


def one_row_in(sample: int, task_vectors: Tensor) -> Tensor:
    """One row in so many; the first at least."""
    return task_vectors[:, ::sample] if sample > 1 and task_vectors.ndim > 1 else task_vectors
