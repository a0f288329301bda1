"""Auto-Switch (arXiv:2412.00054): binarised task vectors, and the tasks of the nearest examples.

θ(x) = θ_0 + Σ w_n(x) s_n A_n ⊙ Q_n, with T-Switch's code of each task vector, and w_n(x) the share
of task n among the examples whose features in the base are nearest to x's. The released code
averages w over an evaluation batch of one task, which flatters it; here each sample has its own.
A pack that has a router runs the same: `Runtime.fit_router`.
"""

from typing import ClassVar

from pydantic import Field

from personae._types import Density
from personae.methods._experts import Experts
from personae.methods._features import features_of_tasks
from personae.methods._learned import LearnedRouting, as_learned_function
from personae.methods._registry import learned_method
from personae.methods._routed import MixedModel
from personae.methods._routers import NearestNeighbours, Voting
from personae.methods.codecs.t_switch import TSwitch


@learned_method(paper="arXiv:2412.00054")
class AutoSwitch(Voting, LearnedRouting):
    """Add binarised task vectors to the base by the tasks of a sample's nearest examples."""

    needs_base: ClassVar = True

    density: Density = Field(
        default=0.4, description="Fraction of each sign's entries kept of a task vector."
    )

    def learn(self, experts: Experts) -> MixedModel:
        """Keep the features of examples, and code the task vectors."""
        assert experts.base is not None
        base = {name: one.to(experts.device).float() for name, one in experts.base.items()}
        seen = features_of_tasks(experts, base, self.examples, self.pool)
        router = NearestNeighbours(seen, self.neighbours, self.mode)
        return MixedModel(experts, base, TSwitch(density=self.density), router, self.pool)


auto_switch = as_learned_function(AutoSwitch)
