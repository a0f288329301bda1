"""A learned method: experts that run, and data of their tasks, to one model or a routed one."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from personae.errors import Faults, MethodError
from personae.methods._batches import Batch
from personae.methods._experts import (
    Experts,
    Progress,
    Weights,
    evaluating,
    gather,
    probe,
    silent,
)
from personae.methods._method import Parameters
from personae.methods._routed import RoutedModel


class LearnedMethod(Parameters, ABC):
    """Learns from data how to merge; calling it is the function.

    No file is read, and no model is changed.
    """

    sees: ClassVar[str] = "unlabelled training inputs"
    """Which data it looks at."""
    needs_base: ClassVar[bool] = False
    """Whether it is relative to a base."""
    routed: ClassVar[bool] = False
    """Whether the result weighs the experts sample by sample, and so is not one model."""

    @abstractmethod
    def learn(self, experts: Experts) -> Any:
        """What is made of checked experts."""
        ...

    def faults(self, experts: Experts, scores: Mapping[str, Tensor], faults: Faults) -> None:
        """Note what the method cannot do with these; told before it starts.

        Args:
            experts: The experts.
            scores: Logits of each task's first batch.
            faults: Takes the faults.
        """

    def _learned(
        self,
        experts: Mapping[str, nn.Module],
        batches: Mapping[str, Iterable[Batch]],
        base: nn.Module | Weights | None,
        shared: Collection[str] | None,
        progress: Progress,
    ) -> Any:
        """Check everything, then learn.

        Raises:
            MethodError: all faults at once, before any work; or the result is not finite.
        """
        faults = Faults()
        self.check_experts(len(experts), faults, has_base=base is not None)
        if self.needs_base and base is None:
            faults.add(f"{self.name} is relative to the base. Give it as `base`.")
        gathered = None
        try:
            gathered = gather(experts, batches, base, shared)
        except MethodError as error:
            faults.take(error)
        faults.raise_if_any(MethodError)
        assert gathered is not None
        with evaluating(gathered.models.values()), torch.no_grad():
            scores = probe(gathered, faults)
            self.faults(gathered, scores, faults)
            faults.raise_if_any(MethodError)
            result = self.learn(replace(gathered, progress=progress))
            self._check_finite(result)
            return result

    def _check_finite(self, result: Any) -> None:
        """Refuse a result that no model can use.

        Raises:
            MethodError: naming what is NaN or infinite.
        """
        tensors = result.state_dict() if isinstance(result, nn.Module) else result
        for name, value in tensors.items():
            if isinstance(value, Tensor) and not value.isfinite().all():
                raise MethodError(
                    f"{self.name}: '{name}' comes out as NaN or infinite. Look for weights and "
                    "inputs that are very large, or lower the learning rate, if there is one."
                )


class LearnedMerge(LearnedMethod):
    """A learned method whose result is one model."""

    @abstractmethod
    def learn(self, experts: Experts) -> dict[str, Tensor]:
        """The merged parameters."""
        ...

    def __call__(
        self,
        experts: Mapping[str, nn.Module],
        batches: Mapping[str, Iterable[Batch]],
        base: nn.Module | Weights | None = None,
        *,
        shared: Collection[str] | None = None,
        progress: Progress = silent,
    ) -> dict[str, Tensor]:
        """Merge the experts.

        Args:
            experts: Task to model, each with its own head.
            batches: Task to batches: the arguments of the model's forward, by name.
            base: What the experts were fine-tuned from: a model, or its parameters by name.
            shared: Names of the parameters to merge; by default those that all experts (and the
                base) have in the same shape.
            progress: Told how far learning is, in steps of the method's own.

        Returns:
            The merged values of the shared parameters, in the dtypes of the first expert. Put each
            expert's own head beside them: `model.load_state_dict(merged, strict=False)`.

        Raises:
            MethodError: all faults at once, before any work.
        """
        return self._learned(experts, batches, base, shared, progress)


class LearnedRouting(LearnedMethod):
    """A learned method whose result weighs the experts sample by sample."""

    routed: ClassVar = True

    @abstractmethod
    def learn(self, experts: Experts) -> RoutedModel:
        """The routed model."""
        ...

    def __call__(
        self,
        experts: Mapping[str, nn.Module],
        batches: Mapping[str, Iterable[Batch]],
        base: nn.Module | Weights | None = None,
        *,
        shared: Collection[str] | None = None,
        progress: Progress = silent,
    ) -> RoutedModel:
        """Make one model that weighs the experts sample by sample.

        Args:
            experts: Task to model, each with its own head.
            batches: Task to batches: the arguments of the model's forward, by name.
            base: What the experts were fine-tuned from: a model, or its parameters by name.
            shared: Names of the parameters to merge; by default those that all experts (and the
                base) have in the same shape.
            progress: Told how far learning is, in steps of the method's own.

        Returns:
            A module: `routed(head=task, **batch)` gives logits.

        Raises:
            MethodError: all faults at once, before any work.
        """
        return self._learned(experts, batches, base, shared, progress)


def as_learned_function(method: type[LearnedMethod]) -> Callable[..., Any]:
    """The function of a class of methods: `fisher(experts, batches, examples=64)`."""

    def function(
        experts: Mapping[str, nn.Module],
        batches: Mapping[str, Iterable[Batch]],
        base: nn.Module | Weights | None = None,
        *,
        shared: Collection[str] | None = None,
        progress: Progress = silent,
        **parameters: Any,
    ) -> Any:
        own = method(**parameters)
        assert isinstance(own, LearnedMerge | LearnedRouting)
        return own(experts, batches, base, shared=shared, progress=progress)

    texts = [f"    {name}: {field.description}" for name, field in method.model_fields.items()]
    function.__name__ = function.__qualname__ = method.name
    function.__module__ = method.__module__
    function.__doc__ = "\n".join([f"{inspect.getdoc(method)}\n\nParameters:", *texts])
    *given, _ = inspect.signature(function).parameters.values()
    rest = inspect.signature(method).parameters.values()
    function.__signature__ = inspect.Signature([*given, *rest])  # type: ignore[attr-defined]
    return function
