"""Experts as models that run, with data of their tasks: checked before anything is learned."""

from collections.abc import Callable, Collection, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from personae.errors import Faults, MethodError, nearest
from personae.methods._batches import Batch, device_of, held, logits

Weights = Mapping[str, Tensor]
"""Names of parameters to their values."""
Progress = Callable[[int, int], None]
"""Called with how many steps are done, and how many there are."""


def silent(_done: int, _total: int) -> None:
    """Nobody watches."""


@dataclass(frozen=True)
class Experts:
    """Models fine-tuned from one base, each with its own head, and batches of their tasks.

    Attributes:
        models: Task to model, in order; in evaluation mode.
        batches: Task to what can be gone through again and again.
        shared: Names of the parameters that are merged; all others are private to their expert.
        base: The shared parameters of the base, if there is one.
        progress: Told how far learning is.
    """

    models: dict[str, nn.Module]
    batches: dict[str, Iterable[Batch]]
    shared: tuple[str, ...]
    base: dict[str, Tensor] | None = None
    progress: Progress = silent

    @property
    def first(self) -> nn.Module:
        """The first expert; results are of its dtypes, where it is."""
        return next(iter(self.models.values()))

    @property
    def device(self) -> torch.device:
        """Where results are."""
        return device_of(self.first)

    def weights(self, task: str) -> dict[str, Tensor]:
        """The shared parameters of an expert, detached."""
        own = dict(self.models[task].named_parameters())
        return {name: own[name].detach() for name in self.shared}

    def private(self, task: str) -> dict[str, Tensor]:
        """The parameters and buffers of an expert that are not shared: copies."""
        tied = {id(own) for name, own in self.models[task].named_parameters() if name in self.names}
        state = self.models[task].state_dict(keep_vars=True)
        return {name: own.detach().clone() for name, own in state.items() if id(own) not in tied}

    @property
    def names(self) -> frozenset[str]:
        """The shared names, to look up."""
        return frozenset(self.shared)

    def stacked(self, name: str) -> Float[Tensor, "expert ..."]:
        """One parameter of all experts, fp32."""
        found = [model.get_parameter(name).detach() for model in self.models.values()]
        return torch.stack([one.to(self.device, torch.float32) for one in found])

    def task_vectors(self, name: str) -> Float[Tensor, "expert ..."]:
        """The task vectors of one parameter, fp32."""
        assert self.base is not None
        return self.stacked(name) - self.base[name].to(self.device, torch.float32)

    def added(self, scale: float) -> dict[str, Tensor]:
        """Task arithmetic: base + scale · Σ τ_n, fp32."""
        assert self.base is not None
        return {
            name: self.base[name].to(self.device, torch.float32)
            + scale * self.task_vectors(name).sum(dim=0)
            for name in self.shared
        }

    def average(self, name: str) -> Float[Tensor, "..."]:
        """The plain average of one parameter, summed in fp64."""
        return self.stacked(name).double().mean(dim=0)

    def cast(self, merged: Weights) -> dict[str, Tensor]:
        """Merged values in the dtypes of the first expert, in the order of the parameters."""
        return {name: merged[name].to(self.first.get_parameter(name).dtype) for name in self.shared}


def gather(
    experts: Mapping[str, nn.Module],
    batches: Mapping[str, Iterable[Batch]],
    base: nn.Module | Weights | None,
    shared: Collection[str] | None,
) -> Experts:
    """Check models and batches against each other; no model has run yet.

    Args:
        experts: Task to model.
        batches: Task to batches.
        base: The base, as a model or by its parameters; others of it are not looked at.
        shared: Names of the parameters to be merged; by default those that all experts, and the
            base if it is given, have in the same shape.

    Raises:
        MethodError: all faults at once.
    """
    faults = Faults()
    if not experts:
        raise MethodError("There is no expert. Give one model a task, by the task's name.")
    models = dict(experts)
    for task in batches:
        if task not in models:
            faults.add(f"There are batches of '{task}', but no expert. {nearest(task, models)}")
    found = {task: held(batches.get(task, ())) for task in models}
    for task, given in found.items():
        if next(iter(given), None) is None:
            faults.add(f"There is no data of the task '{task}'. Give batches of it by this name.")
    owned = {task: dict(model.named_parameters()) for task, model in models.items()}
    of_base = _parameters(base)
    if shared is None:
        names = _alike(owned, of_base, faults)
    else:
        names = tuple(shared)
        _check_named(names, {**owned, **({"base": of_base} if of_base is not None else {})}, faults)
    devices = {task: str(device_of(model)) for task, model in models.items()}
    if len(set(devices.values())) > 1:
        listed = ", ".join(f"{task} on {device}" for task, device in devices.items())
        faults.add(f"The experts are on several devices: {listed}. Move them to one.")
    faults.raise_if_any(MethodError)
    kept = None if of_base is None else {name: of_base[name] for name in names}
    return Experts(models, found, names, kept)


@contextmanager
def evaluating(models: Iterable[nn.Module]) -> Generator[None]:
    """Evaluation mode, and back to what each module was in."""
    were = [(module, module.training) for model in models for module in model.modules()]
    try:
        for module, _ in were:
            module.training = False
        yield
    finally:
        for module, training in were:
            module.training = training


def probe(experts: Experts, faults: Faults) -> dict[str, Tensor]:
    """The logits of each task's first batch; what is wrong with them is noted."""
    found: dict[str, Tensor] = {}
    for task, model in experts.models.items():
        batch = next(iter(experts.batches[task]))
        if any(len(one) == 0 for one in batch.values() if one.ndim):
            faults.add(f"The first batch of the task '{task}' has no sample. Leave it out.")
            continue
        try:
            with torch.no_grad():
                one = logits(model, batch)
        except MethodError as error:
            faults.add(f"The expert '{task}' cannot be used: {error}.")
            continue
        except Exception as error:  # whatever a model of the user's raises
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            faults.add(
                f"The expert '{task}' fails on its first batch ({', '.join(batch)}): {reason}. "
                "Give batches of the arguments that its forward takes."
            )
            continue
        if not one.isfinite().all():
            faults.add(
                f"The expert '{task}' gives logits that are NaN or infinite for its first batch. "
                "Repair the model, or its inputs."
            )
        found[task] = one
    return found


def _parameters(base: nn.Module | Weights | None) -> dict[str, Tensor] | None:
    if base is None:
        return None
    named = base.named_parameters() if isinstance(base, nn.Module) else base.items()
    return {name: value.detach() for name, value in named if value.is_floating_point()}


def _alike(
    owned: Mapping[str, Mapping[str, Any]], base: Weights | None, faults: Faults
) -> tuple[str, ...]:
    """The names that all have in one shape, if these are models of one architecture."""
    first_task, first = next(iter(owned.items()))
    everyone = [*owned.values(), *([base] if base is not None else [])]
    names = tuple(
        name
        for name in first
        if all(name in one and one[name].shape == first[name].shape for one in everyone)
    )
    for task, own in owned.items():
        lacking = sorted(first.keys() ^ own.keys())
        if lacking:
            faults.add(
                f"The experts '{first_task}' and '{task}' are of different architectures: "
                f"{len(lacking)} parameters stand in one of them alone, such as {lacking[0]}. Give "
                "models of one architecture, or say by `shared` which parameters to merge."
            )
    total, alike = (sum(first[name].numel() for name in some) for some in (first, names))
    if 2 * alike < total and not faults.messages:
        odd = next(name for name in first if name not in names)
        shapes = [str(tuple(one[odd].shape)) if odd in one else "none" for one in everyone]
        faults.add(
            f"Most parameters are not the same in all experts{' and the base' * bool(base)}: "
            f"{odd} is {', '.join(shapes)}. Give models of one architecture with the same names, "
            "or say by `shared` which parameters to merge."
        )
    return names


def _check_named(
    names: tuple[str, ...], everyone: Mapping[str, Mapping[str, Any]], faults: Faults
) -> None:
    if not names:
        faults.add("`shared` names no parameter. Name at least one, or leave it out.")
    for name in names:
        lacking = [whose for whose, own in everyone.items() if name not in own]
        if lacking:
            known = next(iter(everyone.values()))
            faults.add(
                f"`shared` names {name}, which {', '.join(lacking)} do not have. "
                f"{nearest(name, known)}"
            )
            continue
        shapes = {whose: tuple(own[name].shape) for whose, own in everyone.items()}
        if len(set(shapes.values())) > 1:
            listed = ", ".join(f"{whose} {shape}" for whose, shape in shapes.items())
            faults.add(f"`shared` names {name}, whose shapes differ: {listed}. Leave it private.")
