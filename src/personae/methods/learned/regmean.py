"""RegMean (Jin et al. 2023) and RegMean++ (2025): linear layers that answer as each expert's did.

Of a layer with weights W_n and Gram matrices G_n = X_nᵀ X_n / T of its inputs on task n, the
minimum of Σ_n ‖X_n (W − W_n)ᵀ‖² is Wᵀ = (Σ G_n)⁻¹ Σ G_n W_nᵀ. Everything that is no linear layer is
averaged. With `inputs="merged"` (RegMean++) blocks are merged one after the other, and X_n is what
a block is given when task n's data has run through the blocks that are merged already.

Departs from the original code in two things: padding is left out of the Gram matrices, by the
batch's attention mask; and a pull towards the plain average stands in for the inverse of what is
singular.

Memory beside the experts: of each linear layer two Gram matrices and two copies of its weight in
fp64; of all layers at once, or with RegMean++ of those of one block. RegMean++ runs each example up
to each block: half as many full passes as there are blocks.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from personae.errors import MethodError
from personae.methods._batches import Batch, limited, run, token_mask
from personae.methods._experts import Experts, Progress, silent
from personae.methods._layers import LinearLayer, block_of, linear_layers, watched
from personae.methods._learned import LearnedMerge, as_learned_function
from personae.methods._registry import learned_method

Gram = Float[Tensor, "in in"]


@learned_method(paper="arXiv:2212.09849")
class RegMean(LearnedMerge):
    """Merge linear layers so that their outputs on each task are closest to its expert's."""

    examples: int = Field(
        default=256, ge=1, description="Examples of each task that are looked at."
    )
    inputs: Literal["expert", "merged"] = Field(
        default="expert",
        description=(
            "Inputs of a layer inside its expert, or behind the blocks that are merged already "
            "(RegMean++, arXiv:2508.03121)."
        ),
    )
    shrink: float = Field(
        default=0.9,
        ge=0,
        le=1,
        description="Multiplier on what is off the diagonal of Gram matrices (α); 1 leaves them.",
    )
    ridge: float = Field(
        default=1e-6,
        gt=0,
        description="Pull towards the plain average, as a fraction of a Gram matrix's diagonal.",
    )

    def learn(self, experts: Experts) -> dict[str, Tensor]:
        """Solve for every linear layer."""
        merged = {name: experts.average(name) for name in experts.shared}
        layers = [one for one in linear_layers(experts.first) if one.weight in experts.names]
        if self.inputs == "expert":
            self._solve_all(experts, layers, merged, {}, progress=experts.progress)
            return experts.cast(merged)
        order = self._calls(experts, layers)
        stages = list(dict.fromkeys(layer.block for layer in order))
        done = {name: one for name, one in merged.items() if block_of(name) not in stages}
        for n, stage in enumerate(stages):
            here = [layer for layer in layers if layer.block == stage]
            calls = sum(layer.block == stage for layer in order)
            self._solve_all(experts, here, merged, done, calls)
            done |= {name: merged[name] for name in merged if block_of(name) == stage}
            experts.progress(n + 1, len(stages))
        return experts.cast(merged)

    def _solve_all(
        self,
        experts: Experts,
        layers: list[LinearLayer],
        merged: dict[str, Tensor],
        done: Mapping[str, Tensor],
        calls: int | None = None,
        progress: Progress = silent,
    ) -> None:
        """Put solutions in place of averages, in layers that some expert runs."""
        grams: dict[LinearLayer, Gram] = {}
        rights: dict[LinearLayer, Tensor] = {}
        for n, (task, model) in enumerate(experts.models.items()):
            for layer, own in self._grams(experts, task, layers, done, calls).items():
                gram = self.shrink * own + (1 - self.shrink) * own.diag().diag()
                right = gram @ layer.matrix(model.get_parameter(layer.weight).detach().double())
                grams[layer] = grams[layer].add_(gram) if layer in grams else gram
                rights[layer] = rights[layer].add_(right) if layer in rights else right
            progress(n + 1, len(experts.models))
        for layer, gram in grams.items():
            average = layer.matrix(merged[layer.weight])  # a view
            average.copy_(solved(gram, rights[layer], average, self.ridge))

    def _grams(
        self,
        experts: Experts,
        task: str,
        layers: list[LinearLayer],
        done: Mapping[str, Tensor],
        calls: int | None,
    ) -> dict[LinearLayer, Gram]:
        """The Gram matrices of what an expert's layers are given, some of it merged already.

        Raises:
            MethodError: if they are not finite.
        """
        model, count = experts.models[task], dict.fromkeys(layers, 0)
        weights = {name: one.to(model.get_parameter(name).dtype) for name, one in done.items()}
        found: dict[LinearLayer, Gram] = {}
        batch: Batch = {}
        left = 0

        def given(layer: LinearLayer, inputs: Tensor) -> None:
            nonlocal left
            tokens = _unpadded(inputs.detach(), batch).double()
            gram = tokens.T @ tokens
            found[layer] = found[layer].add_(gram) if layer in found else gram
            count[layer] += len(tokens)
            left -= 1
            if left == 0:
                raise _Enough

        with watched(model, layers, given):
            for batch in limited(experts.batches[task], self.examples):
                left = calls or 0
                try:
                    run(model, batch, weights)
                except _Enough:
                    continue
        odd = [layer.weight for layer, gram in found.items() if not gram.isfinite().all()]
        if odd:
            raise MethodError(
                f"{self.name}: inputs of {odd[0]} are NaN or infinite on the task '{task}'. Repair "
                "the expert or its batches."
            )
        return {layer: gram / max(count[layer], 1) for layer, gram in found.items()}

    def _calls(self, experts: Experts, layers: list[LinearLayer]) -> list[LinearLayer]:
        """The layers in the order in which a model runs them, as often as it does."""
        order: list[LinearLayer] = []
        task, model = next(iter(experts.models.items()))
        with watched(model, layers, lambda layer, _: order.append(layer)):
            run(model, next(iter(experts.batches[task])))
        return order


class _Enough(Exception):
    """The last layer that is looked at has been given its inputs."""


def solved(
    gram: Gram,
    right: Float[Tensor, "in out"],
    average: Float[Tensor, "in out"],
    ridge: float,
) -> Float[Tensor, "in out"]:
    """(Σ G_n)⁻¹ Σ G_n W_nᵀ, pulled a little towards the average; that where nothing is known."""
    pull = ridge * float(gram.trace()) / len(gram) or 1.0
    known = gram + pull * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(known, right + pull * average)


def _unpadded(inputs: Tensor, batch: Batch) -> Float[Tensor, "token in"]:
    """The inputs of a layer, token by token, without padding."""
    flat = inputs.reshape(-1, inputs.shape[-1])
    mask = token_mask(batch, tuple(inputs.shape[:-1]))
    return flat if mask is None else flat[mask.reshape(-1).to(flat.device)]


regmean = as_learned_function(RegMean)
