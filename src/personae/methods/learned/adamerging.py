"""AdaMerging (Yang et al. 2024): task arithmetic whose coefficients make outputs certain.

θ_l = θ_0l + Σ_n λ_nl τ_nl, and λ minimises Σ_n H(softmax f_n(x)), the entropy of what the merged
model says with task n's head about *test inputs* of task n. "Layer-wise" in the paper is one
coefficient for each parameter tensor. AdaMerging++ is `vectors="ties"`.

Transductive: it sees the inputs that it is then scored on. The original loop draws two batches a
task and step; here one. Memory beside the experts: N task vectors, the merged model twice, its
gradient, and what one backward pass holds.
"""

from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from personae._types import Density
from personae.errors import MethodError
from personae.methods._batches import endless, entropy, logits
from personae.methods._electing import Ballot
from personae.methods._experts import Experts
from personae.methods._learned import LearnedMerge, as_learned_function
from personae.methods._registry import learned_method
from personae.methods._site import Site
from personae.methods.merge.ties import TIES

Vectors = dict[str, Float[Tensor, "expert ..."]]


@learned_method(paper="arXiv:2310.02575")
class AdaMerging(LearnedMerge):
    """Add up task vectors with coefficients that minimise the entropy of test outputs.

    With 0 steps it is task arithmetic at the initial coefficient.
    """

    sees: ClassVar = "unlabelled test inputs (transductive)"
    needs_base: ClassVar = True

    coefficients: Literal["task", "tensor"] = Field(
        default="tensor",
        description='One coefficient a task, or a task and parameter tensor ("layer-wise").',
    )
    vectors: Literal["task", "ties"] = Field(
        default="task",
        description="Task vectors as they are, or what TIES leaves of each (AdaMerging++).",
    )
    density: Density = Field(
        default=0.2, description="Fraction of entries kept of each task vector, with ties."
    )
    initial: float = Field(default=0.3, description="Coefficient to start from.")
    clamp: bool = Field(
        default=True,
        description="Whether coefficients count as within [0, 1]; beyond, they no longer move.",
    )
    steps: int = Field(default=500, ge=0, description="Steps of Adam; each sees a batch a task.")
    learning_rate: float = Field(default=1e-3, gt=0, description="Of Adam.")

    def learn(self, experts: Experts) -> dict[str, Tensor]:
        """The sum with the coefficients found."""
        vectors = self.filtered({name: experts.task_vectors(name) for name in experts.shared})
        found = self.find(experts, vectors)
        return experts.cast(self.mixed(experts, vectors, found))

    def find(self, experts: Experts, vectors: Vectors) -> Float[Tensor, "expert _"]:
        """The coefficients, one column or one a tensor.

        Raises:
            MethodError: The entropy is not a finite number.
        """
        columns = len(vectors) if self.coefficients == "tensor" else 1
        found = torch.full((len(experts.models), columns), self.initial, device=experts.device)
        found.requires_grad_()
        optimiser = torch.optim.Adam([found], lr=self.learning_rate)
        streams = {task: endless(batches) for task, batches in experts.batches.items()}
        for step in range(self.steps):
            with torch.enable_grad():
                merged = self.mixed(experts, vectors, found)
            # A copy takes the gradients, so that the graph of one task is held at a time.
            leaves = {name: one.detach().requires_grad_() for name, one in merged.items()}
            for task, model in experts.models.items():
                batch = next(streams[task])
                with torch.enable_grad():
                    loss = entropy(logits(model, batch, experts.cast(leaves)), batch)
                if not loss.isfinite():
                    raise MethodError(
                        f"{self.name}: the entropy of '{task}' is {float(loss)} in step "
                        f"{step + 1}. Lower the learning rate, or look for values that overflow."
                    )
                loss.backward(inputs=[*leaves.values()])
            used = [name for name in merged if leaves[name].grad is not None]
            optimiser.zero_grad()
            torch.autograd.backward([merged[n] for n in used], [leaves[n].grad for n in used])
            optimiser.step()
            experts.progress(step + 1, self.steps)
        return found.detach()

    def mixed(
        self, experts: Experts, vectors: Vectors, coefficients: Float[Tensor, "expert _"]
    ) -> dict[str, Tensor]:
        """Base + Σ λ_n τ_n, fp32."""
        assert experts.base is not None
        if self.clamp:
            coefficients = coefficients.clamp(0, 1)
        each = coefficients.expand(-1, len(vectors)).unbind(dim=1)
        return {
            name: experts.base[name].to(own.device, own.dtype) + torch.tensordot(one, own, dims=1)
            for (name, own), one in zip(vectors.items(), each, strict=True)
        }

    def filtered(self, vectors: Vectors) -> Vectors:
        """With ties: what is kept of each task vector and has the elected sign."""
        if self.vectors == "task":
            return vectors
        ties = TIES(density=self.density)
        sites = {name: Site(name, tuple(one.shape[1:])) for name, one in vectors.items()}
        cpu = {name: one.cpu() for name, one in vectors.items()}
        found = ties.statistics((sites[name], one) for name, one in cpu.items())
        for name, one in cpu.items():
            flat = one.reshape(len(one), -1).numpy().copy()
            ties.fill(sites[name], len(one), found)(0, flat)
            ballot = Ballot(flat, ties.elect)
            ballot.give_undecided(int(found["majority"]))
            kept = torch.from_numpy(np.where(np.sign(flat) == ballot.signs, flat, np.float32(0)))
            cpu[name] = kept.reshape(one.shape).to(vectors[name].device)
        return cpu


adamerging = as_learned_function(AdaMerging)
