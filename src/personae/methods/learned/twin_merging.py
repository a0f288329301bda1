"""Twin-Merging (Lu et al. 2024): a shared expert, low-rank exclusive vectors, and a router.

θ* = θ_0 + λ Σ τ_n; v_n = SVD_r(θ_n − θ*); θ(x) = θ* + Σ w_n(x) v_n, w(x) a softmax over tasks that
an MLP learned from θ*'s last hidden states. What is no matrix is kept exactly. The weights are
those of each sample; the original code averages them over a batch of one task, which flatters it.

Not free of data: the router learns from examples of which it knows the task. Each sample costs an
assembly of the shared parameters.
"""

from typing import ClassVar

import torch
from pydantic import Field

from personae._types import RankFraction
from personae.methods._experts import Experts
from personae.methods._features import Pool, features_of_tasks
from personae.methods._learned import LearnedRouting, as_learned_function
from personae.methods._registry import learned_method
from personae.methods._routed import MixedModel
from personae.methods._routers import Perceptron
from personae.methods.codecs.svd import SVD


@learned_method(paper="arXiv:2406.15479")
class TwinMerging(LearnedRouting):
    """Add each expert's low-rank remainder to a shared expert, by what a trained router says."""

    needs_base: ClassVar = True

    scale: float = Field(default=0.3, description="Of the task vectors in the shared expert (λ).")
    rank_fraction: RankFraction = Field(
        default=0.1, description="Singular triplets kept, as a fraction of the smaller dimension."
    )
    examples: int = Field(default=1000, ge=2, description="Examples of each task for the router.")
    pool: Pool = Field(
        default="mean", description="Which states the router sees: of all tokens, or the first."
    )
    epochs: int = Field(default=50, ge=0, description="Epochs of the router.")
    batch_size: int = Field(default=1024, ge=2, description="Examples a step of the router.")
    learning_rate: float = Field(default=5e-4, gt=0, description="Of Adam.")
    seed: int = Field(default=0, ge=0, description="Of the router's weights, dropout and batches.")

    def learn(self, experts: Experts) -> MixedModel:
        """Train the router, and code what each expert differs by."""
        shared = experts.added(self.scale)
        found = features_of_tasks(experts, shared, self.examples, self.pool)
        seen = {task: one.cpu() for task, one in found.items()}
        width = next(iter(seen.values())).shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            router = Perceptron(tuple(seen), width)
            router.fit(
                seen,
                epochs=self.epochs,
                batch_size=self.batch_size,
                learning_rate=self.learning_rate,
            )
        codec = SVD(rank_fraction=self.rank_fraction)
        return MixedModel(experts, shared, codec, router.to(experts.device), self.pool)


twin_merging = as_learned_function(TwinMerging)
