"""WUDI-Merging (Cheng et al. 2025): minimise interference with every task, data-free.

A layer's inputs lie near the row space of its task vectors; so what the merged vector adds to task
n, τ − τ_n, should vanish on the rows of τ_n. The published model is not the minimum but what a
given number of steps of Adam reach, starting from the sum.

The gradient is written out: with G_n = τ_nᵀ τ_n / w_n it is 2 (τ Σ G_n − Σ τ_n G_n), one product
of matrices a step for any number of experts. Paper and code divide by the squared norm.
"""

from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from personae.methods._entries import Undecided, mean
from personae.methods._matrices import Tensors, is_matrix
from personae.methods._merge import MatrixWise, as_function, matrix_memory
from personae.methods._method import Statistics
from personae.methods._registry import merge_method
from personae.methods._site import Site

Steps = Annotated[int, Field(ge=0)]
LearningRate = Annotated[float, Field(gt=0)]


@merge_method(paper="arXiv:2503.08099")
class WUDI(MatrixWise):
    """Reduce the interference of the sum with each task vector by Adam.

    Adam on Σ_n ‖(τ − τ_n) τ_nᵀ‖² / w_n, starting at τ = Σ_n τ_n; experts without a change here
    have no part in it.
    """

    rows: ClassVar = (0, 20)
    needs: ClassVar = "base"

    learning_rate: LearningRate = Field(
        default=1e-5,
        description=(
            "Learning rate of Adam (for RoBERTa in the original code: 2e-5). No entry moves "
            "further than about `steps` times this."
        ),
    )
    steps: Steps = Field(
        default=300, description="Steps of Adam; with 0 a matrix is the sum of its task vectors."
    )
    normalise: Literal["squared", "norm"] = Field(
        default="squared", description="w_n: the squared norm of τ_n, or its norm."
    )
    tensors: Tensors = Field(
        default="linear",
        description=(
            "`linear`: all other tensors stay at the base, as in the original code. `matrices`: "
            "all with two axes are merged this way, the others are averaged."
        ),
    )

    def memory(self, site: Site, experts: int) -> int:
        """See `MergeMethod.memory`."""
        return matrix_memory(site, experts, stack=8, entry=34, square=5)

    def merge(
        self,
        task_vectors: Float[Tensor, "expert *shape"],
        statistics: Statistics,
        site: Site,
        undecided: Undecided | None = None,
    ) -> Float[Tensor, "*shape"]:
        """See `MergeMethod.merge`."""
        if not is_matrix(self.tensors, site):
            return (
                torch.zeros_like(task_vectors[0])
                if self.tensors == "linear"
                else mean(task_vectors)
            )
        # The rows of a weight (out, in) lie where its inputs do; Conv1D stores weights (in, out).
        matrices = task_vectors.mT if site.transposed else task_vectors
        matrices = matrices[matrices.flatten(1).any(dim=1)]
        merged = matrices.sum(dim=0)
        if len(matrices) > 1:  # a single one is the minimum: Adam would only amplify its rounding
            _descend(merged, _gradient(matrices, self.normalise), self.learning_rate, self.steps)
        return merged.T if site.transposed else merged


wudi = as_function(WUDI)


def _gradient(
    matrices: Float[Tensor, "expert out in"], normalise: str
) -> Callable[[Float[Tensor, "out in"]], Float[Tensor, "out in"]]:
    """The gradient of the loss, by matrices of at most as many entries as the task vectors."""
    norms = [float(matrix.norm()) for matrix in matrices]
    weights = [norm * norm if normalise == "squared" else norm for norm in norms]
    roots = [matrix / weight**0.5 for matrix, weight in zip(matrices, weights, strict=True)]
    target = torch.zeros_like(matrices[0])
    experts, out, into = matrices.shape
    if experts * out < into:
        rows = torch.cat(roots)
        for matrix, root in zip(matrices, roots, strict=True):
            target.addmm_(matrix @ root.T, root)
        return lambda merged: 2 * ((merged @ rows.T) @ rows - target)
    gram = matrices.new_zeros(into, into)
    for matrix, root in zip(matrices, roots, strict=True):
        share = root.T @ root
        gram += share
        target.addmm_(matrix, share)
    return lambda merged: 2 * (merged @ gram - target)


def _descend(
    merged: Float[Tensor, "out in"],
    gradient: Callable[[Float[Tensor, "out in"]], Float[Tensor, "out in"]],
    learning_rate: float,
    steps: int,
) -> None:
    """Take steps of Adam, in place."""
    adam = torch.optim.Adam([merged], lr=learning_rate)
    for _ in range(steps):
        merged.grad = gradient(merged)
        adam.step()
    merged.grad = None
