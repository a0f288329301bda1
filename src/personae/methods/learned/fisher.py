"""Fisher merging (Matena & Raffel 2022): average each parameter by how much outputs depend on it.

F_n = (1/S) Σ_x Σ_y p_n(y|x) (∂ log p_n(y|x) / ∂θ)², the diagonal of the Fisher information of
expert n; θ = Σ α_n F_n θ_n / Σ α_n F_n. The square is taken of the gradient of one example and one
class. The code that many later works copied squares the gradient of a sum over classes and over
the batch, so that cross terms stay in and the result depends on the batch size; it is here as
`estimator="batch_shortcut"`, to rebuild what was published with it.

Departs from the original code in one thing: the floor is that of normalised information. A floor
before makes the expert whose outputs are surest, of which all is at the floor, the heaviest.

Memory beside the models: three times a model's shared parameters in fp64, and `samples_at_once`
gradients.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.func import vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from personae.errors import Faults, MethodError
from personae.methods._batches import LABELS, Batch, limited, logits, rows, samples, token_mask
from personae.methods._experts import Experts
from personae.methods._learned import LearnedMerge, as_learned_function
from personae.methods._method import one_each
from personae.methods._registry import learned_method

Squares = dict[str, Tensor]


@learned_method(paper="arXiv:2111.09832")
class Fisher(LearnedMerge):
    """Average the experts, each parameter weighted by its diagonal Fisher information.

    A head of one output is a regression: the gradient squared is that of its squared error, and
    batches need `labels`. Parameters on which no output depends are averaged.
    """

    examples: int = Field(
        default=256, ge=1, description="Examples of each task that are looked at."
    )
    estimator: Literal["exact", "sampled", "batch_shortcut"] = Field(
        default="exact",
        description=(
            "The expectation over the model's own labels: over every class, a backward pass each; "
            "over one label drawn for each example, or token; or the widespread shortcut that "
            "squares one gradient a batch, which is not the Fisher diagonal."
        ),
    )
    weight: float | tuple[float, ...] = Field(
        default=1.0, description="Coefficient of each expert's Fisher information (α)."
    )
    floor: float = Field(
        default=1e-6,
        gt=0,
        description="Least Fisher information of a parameter, once it is normalised, before α.",
    )
    normalise: bool = Field(
        default=True,
        description="Whether each expert's Fisher information is divided by its Euclidean norm.",
    )
    samples_at_once: int = Field(
        default=1,
        ge=1,
        description=(
            "Examples whose gradients are held at once: memory of so many models. Models that "
            "cannot be vectorised take one at a time."
        ),
    )
    seed: int = Field(default=0, ge=0, description="Seed of the labels drawn.")

    def check(self, experts: int, has_base: bool) -> str:
        """Weights of which none is negative and not all are 0."""
        weights = one_each(self.weight, experts)
        if min(weights) < 0 or not any(weights):
            return f"weight = {self.weight} gives no average. Give weights from 0, not all 0."
        return ""

    def faults(self, experts: Experts, scores: Mapping[str, Tensor], faults: Faults) -> None:
        """Regressions need labels; every class of every token is too much."""
        for task, found in scores.items():
            if _is_regression(found) and LABELS not in next(iter(experts.batches[task])):
                faults.add(
                    f"The expert '{task}' has one output, a regression, and its batches have no "
                    f"`{LABELS}`. Give the values that it was trained on, by this name."
                )
            if found.ndim > 2 and self.estimator == "exact":
                faults.add(
                    f"The expert '{task}' gives logits for each token, of shape "
                    f"{tuple(found.shape)}: one backward pass for each class of each token. Take "
                    "estimator sampled."
                )

    def learn(self, experts: Experts) -> dict[str, Tensor]:
        """The weighted average."""
        weights = one_each(self.weight, len(experts.models))
        above, below, touched = {}, {}, set[str]()
        for n, (weight, task) in enumerate(zip(weights, experts.models, strict=True)):
            information = self.information(experts, task)
            experts.progress(n + 1, len(weights))
            touched |= {name for name, one in information.items() if one.any()}
            norm = 1.0
            if self.normalise:
                norm = (
                    sum(float(one.double().square().sum()) for one in information.values()) ** 0.5
                )
            for name, own in experts.weights(task).items():
                found = information.pop(name).double().div_(norm or 1.0)
                share = found.clamp_(min=self.floor).mul_(weight).to(experts.device)
                below[name] = below.get(name, 0) + share
                above[name] = above.get(name, 0) + share * own.double().to(experts.device)
        return experts.cast(
            {
                name: above[name] / below[name] if name in touched else experts.average(name)
                for name in experts.shared
            }
        )

    def information(self, experts: Experts, task: str) -> Squares:
        """The Fisher information of an expert's shared parameters, fp32.

        Raises:
            MethodError: A gradient is not finite.
        """
        model, weights = experts.models[task], experts.weights(task)
        total = {name: torch.zeros_like(own, dtype=torch.float32) for name, own in weights.items()}
        draws = torch.Generator().manual_seed(self.seed)
        seen = 0
        squares = self._squares(model, weights)
        for batch in limited(experts.batches[task], self.examples):
            with torch.no_grad():
                pulls = self._pulls(logits(model, batch), batch, draws)
            seen += samples(batch)
            for found in squares(batch, pulls):
                for name, one in found.items():
                    total[name] += one
        if not all(one.isfinite().all() for one in total.values()):
            raise MethodError(
                f"{self.name}: gradients of the expert '{task}' are NaN or infinite. Repair the "
                "model or its inputs, or compute in float32."
            )
        return {name: one / seen for name, one in total.items()}

    def _pulls(
        self, scores: Float[Tensor, "sample *token output"], batch: Batch, draws: torch.Generator
    ) -> list[Tensor]:
        """Gradients at the logits, of which those of the parameters follow: each is squared.

        Raises:
            MethodError: The logits are not finite.
        """
        scores = scores.float()
        if not scores.isfinite().all():
            raise MethodError(
                f"{self.name}: logits are NaN or infinite for some batch. Repair the model, or its "
                "inputs."
            )
        if _is_regression(scores):
            labels = batch[LABELS].to(scores).reshape(scores.shape)
            return [2 * (scores - labels)]
        p = scores.softmax(dim=-1)
        if self.estimator == "batch_shortcut":  # of Σ √p log p, √p held fixed
            return [_masked(p.sqrt() - p * p.sqrt().sum(dim=-1, keepdim=True), batch)]
        if self.estimator == "sampled":
            flat = p.reshape(-1, p.shape[-1]).cpu()
            drawn = torch.multinomial(flat, 1, generator=draws).reshape(p.shape[:-1])
            return [_masked(_one_hot(drawn.to(p.device), p) - p, batch)]
        classes = torch.arange(p.shape[-1], device=p.device)
        return [p[:, [y]].sqrt() * (_one_hot(classes[y], p) - p) for y in classes.tolist()]

    def _squares(
        self, model: nn.Module, weights: dict[str, Tensor]
    ) -> Callable[[Batch, list[Tensor]], Iterator[Squares]]:
        """What squares the gradients of a batch."""
        if self.estimator == "batch_shortcut":
            return lambda batch, pulls: iter([_squared(model, weights, batch, pulls)])
        vectorised = self.samples_at_once > 1

        def squares(batch: Batch, pulls: list[Tensor]) -> Iterator[Squares]:
            nonlocal vectorised
            for start in range(0, samples(batch), self.samples_at_once):
                here = slice(start, start + self.samples_at_once)
                some, own = rows(batch, here), [pull[here] for pull in pulls]
                if vectorised:
                    try:
                        yield _squared_at_once(model, weights, some, own)
                        continue
                    except (RuntimeError, ValueError):
                        vectorised = False  # control flow, or no memory: the same, one by one
                for n in range(samples(some)):
                    one = slice(n, n + 1)
                    yield _squared(model, weights, rows(some, one), [pull[one] for pull in own])

        return squares


def _is_regression(scores: Tensor) -> bool:
    return scores.shape[-1] == 1


def _one_hot(index: Tensor, like: Tensor) -> Tensor:
    return nn.functional.one_hot(index, like.shape[-1]).to(like)


def _masked(pull: Tensor, batch: Batch) -> Tensor:
    """Without what padding adds, where there are logits for each token."""
    mask = token_mask(batch, tuple(pull.shape[:-1]))
    return pull if mask is None else pull * mask.to(pull.device).unsqueeze(-1)


def _squared(
    model: nn.Module, weights: dict[str, Tensor], batch: Batch, pulls: list[Tensor]
) -> Squares:
    """Σ over pulls of the squared gradient of the whole batch."""
    leaves = {name: own.clone().requires_grad_() for name, own in weights.items()}
    with torch.enable_grad():
        scores = logits(model, batch, leaves)
    total: Squares = {}
    for pull in pulls:
        found = torch.autograd.grad(
            scores, [*leaves.values()], pull.to(scores), retain_graph=True, allow_unused=True
        )
        for name, one in zip(leaves, cast("tuple[Tensor | None, ...]", found), strict=True):
            if one is not None:
                square = one.float().square()
                total[name] = total[name].add_(square) if name in total else square
    return total


def _squared_at_once(
    model: nn.Module, weights: dict[str, Tensor], batch: Batch, pulls: list[Tensor]
) -> Squares:
    """Σ over samples and pulls of the squared gradient of one sample."""
    count = samples(batch)
    each = {name: one for name, one in batch.items() if one.ndim and len(one) == count}
    same = {name: one for name, one in batch.items() if name not in each}

    def of_one(sample: dict[str, Tensor], own: list[Tensor]) -> Squares:
        one = {name: value.unsqueeze(0) for name, value in sample.items()}
        scores, pull_back = cast(Any, vjp(lambda w: logits(model, {**one, **same}, w), weights))
        total: Squares = {}
        for pull in own:
            for name, gradient in pull_back(pull.unsqueeze(0).to(scores))[0].items():
                square = gradient.float().square()
                total[name] = total[name] + square if name in total else square
        return total

    # Attention in plain operations: fused kernels run sample by sample, with a warning of each.
    with sdpa_kernel(SDPBackend.MATH):
        return {name: one.sum(dim=0) for name, one in vmap(of_one)(each, pulls).items()}


fisher = as_learned_function(Fisher)
