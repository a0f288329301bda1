"""Results that are not one model: what weighs the experts sample by sample, and runs."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from personae._types import Parts
from personae.errors import MethodError, nearest
from personae.methods._batches import Batch, logits, rows
from personae.methods._codec import Codec
from personae.methods._experts import Experts, evaluating
from personae.methods._features import Pool, features
from personae.methods._routers import Router


class RoutedModel(nn.Module, ABC):
    """Experts mixed for each sample by itself, whatever else is in its batch.

    Its `state_dict` is all that was learned and is stored; the architecture is the experts'.

    Attributes:
        private: Task to the parameters and buffers that stay that expert's own, such as its head.
        reference: The shared parameters to which tasks are added.
    """

    def __init__(self, experts: Experts, reference: Mapping[str, Tensor]) -> None:
        """Take the architecture, each task's private part, and what all have in common."""
        super().__init__()
        self._model = (experts.first,)  # not a part of the state
        self.private = {task: experts.private(task) for task in experts.models}
        self.reference = dict(reference)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks, in order."""
        return tuple(self.private)

    @property
    def model(self) -> nn.Module:
        """The architecture, whose own weights do not count."""
        return self._model[0]

    def forward(self, head: str, **batch: Tensor) -> Float[Tensor, "sample *token output"]:
        """The logits that a task's own head gives for these samples.

        Raises:
            MethodError: if there is no such task.
        """
        if head not in self.private:
            raise MethodError(f"There is no task '{head}'. {nearest(head, self.private)}")
        with evaluating([self.model]):
            return self.scores(head, batch)

    @abstractmethod
    def scores(self, head: str, batch: Batch) -> Float[Tensor, "sample *token output"]:
        """See `forward`."""
        ...

    def run(self, head: str, batch: Batch, weights: Mapping[str, Tensor]) -> Tensor:
        """Logits with these shared parameters and a task's private ones."""
        fitted = {
            name: one.to(self.model.get_parameter(name).dtype) for name, one in weights.items()
        }
        return logits(self.model, batch, {**fitted, **self.private[head]})

    def stored(self) -> dict[str, Any]:
        """What it holds beside modules: nested dictionaries of tensors."""
        return {"private": self.private, "reference": self.reference}

    def restore(self, stored: dict[str, Any]) -> None:
        """Take what `stored` gave."""
        self.private, self.reference = stored["private"], stored["reference"]

    def get_extra_state(self) -> dict[str, Any]:
        """Part of the `state_dict`."""
        return self.stored()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Part of the `state_dict`."""
        self.restore(state)


class MixedModel(RoutedModel):
    """Coded deltas of all tasks, added to the reference by the weights that a router gives.

    θ(x) = reference + Σ w_n(x) δ_n: one assembly of weights for each group of samples that have
    the same. What it holds is a pack's: a reference, a codec's parts, and the router. While a
    batch runs, the deltas that it needs are decoded: memory of as many models.

    Attributes:
        codec: What decodes the deltas.
        parts: Task to parameter to parts.
        router: Features to weights.
    """

    def __init__(
        self,
        experts: Experts,
        reference: Mapping[str, Tensor],
        codec: Codec,
        router: Router,
        pool: Pool,
    ) -> None:
        """Code what each expert differs by from the reference.

        Args:
            experts: The experts.
            reference: What deltas are relative to, and features are taken from.
            codec: Codes each parameter by itself.
            router: A module.
            pool: How features are made of the states of tokens.
        """
        super().__init__(experts, reference)
        self.codec, self.router = codec, router
        self.pool: Pool = pool
        self.parts: dict[str, dict[str, Parts]] = {
            task: {
                name: codec.encode(own.to(reference[name]) - reference[name])
                for name, own in experts.weights(task).items()
            }
            for task in experts.models
        }

    def gates(self, batch: Batch) -> Float[Tensor, "sample task"]:
        """The weights of the tasks for each sample."""
        any_head = next(iter(self.private.values()))
        fitted = {n: one.to(self.model.get_parameter(n).dtype) for n, one in self.reference.items()}
        seen = features(self.model, batch, {**fitted, **any_head}, self.pool)
        return self.router.weights(seen)

    def weights(
        self, gates: Float[Tensor, " task"], deltas: Mapping[str, Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """The shared parameters for samples of these weights, fp32.

        Args:
            gates: A weight a task.
            deltas: What each task with a weight adds; see `delta`.
        """
        total = {name: one.clone() for name, one in self.reference.items()}
        for gate, task in zip(gates.tolist(), self.tasks, strict=True):
            for name, one in deltas[task].items() if gate else ():
                total[name] += gate * one
        return total

    def delta(self, task: str) -> dict[str, Tensor]:
        """What a task adds to the reference, decoded; without what is 0."""
        return {
            name: self.codec.decode(parts, tuple(self.reference[name].shape))
            for name, parts in self.parts[task].items()
            if parts
        }

    def scores(self, head: str, batch: Batch) -> Float[Tensor, "sample *token output"]:
        """See `RoutedModel.forward`."""
        groups, which = torch.unique(self.gates(batch), dim=0, return_inverse=True)
        used = [task for task, gates in zip(self.tasks, groups.T, strict=True) if gates.any()]
        deltas = {task: self.delta(task) for task in used}
        result: Tensor | None = None
        for number, gates in enumerate(groups):
            here = (which == number).nonzero().flatten()
            some = {**batch, **rows(batch, here.to(next(iter(batch.values())).device))}
            found = self.run(head, some, self.weights(gates, deltas))
            if result is None:
                result = found.new_empty(len(which), *found.shape[1:])
            result[here] = found
        assert result is not None
        return result

    def stored(self) -> dict[str, Any]:
        """With the parts."""
        return {**super().stored(), "parts": self.parts}

    def restore(self, stored: dict[str, Any]) -> None:
        """With the parts."""
        super().restore(stored)
        self.parts = stored["parts"]
