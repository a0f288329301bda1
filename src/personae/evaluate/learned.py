"""Learned methods on checkpoints: experts opened as models, and what is made of them scored.

All experts are in memory at once, each with its own head: these methods run them side by side.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from personae._safetensors import load_safetensors
from personae._types import TensorSpec
from personae.checkpoints import open_checkpoint
from personae.checkpoints.naming import shown
from personae.checkpoints.published_renames import published_renames
from personae.checkpoints.tied import each_once
from personae.commands.accounting import Denominator, Share, amr_percent, cost
from personae.errors import CheckpointError
from personae.evaluate.learning import LearnSettings
from personae.evaluate.models import for_task, load_model
from personae.evaluate.tasks import Task
from personae.family.align import align
from personae.family.alignment import Alignment
from personae.methods import Bits, LearnedMerge, LearnedRouting, MixedModel, RoutedModel
from personae.writers import atomic_file


@dataclass(frozen=True)
class Learned:
    """What a learned method made.

    Attributes:
        models: Task to the model that answers it.
        amr_paper: Of a task, as the papers count; see `rates`.
        amr_on_disk: Of a task, by bytes.
    """

    models: Mapping[str, nn.Module]
    amr_paper: float = 0.0
    amr_on_disk: float = 0.0


def learn(
    base: Path,
    experts: Mapping[str, Path],
    tasks: Sequence[Task],
    settings: LearnSettings,
    *,
    heads: Sequence[str] = (),
    device: torch.device | None = None,
    kept: Path | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Learned:
    """Learn from data of the tasks how to merge their experts.

    Args:
        base: The base's checkpoint directory.
        experts: Task name to the expert's checkpoint directory.
        tasks: One an expert.
        settings: The method and its data.
        heads: Patterns of tensors that stay each expert's own; see `heads_of`.
        device: Where models are; by default the CPU.
        kept: A file of the merged parameters: taken from it if it is there, else put into it. Of
            routed models nothing is kept.
        progress: Told how far learning is.

    Raises:
        PersonaeError: if models, method and data do not fit.
    """
    reference = each_once(open_checkpoint(base))
    of = {task.name: task for task in tasks}
    opened = {name: open_checkpoint(path, base=reference) for name, path in experts.items()}
    aligned = align(reference, opened, private=heads)
    models: dict[str, nn.Module] = {}
    names: dict[str, dict[str, str]] = {}
    for name, path in experts.items():
        if name not in of:
            continue  # which the method tells
        loaded = load_model(path, of[name].model_class)
        models[name] = for_task(loaded, of[name]).to(device)
        names[name] = _parameters_of(loaded, models[name], aligned[name])
    shared = _same(names)
    weights = {own: reference.read(name) for name, own in shared.items()}
    given = {name: settings.batches_of(of[name]) for name in models}
    method = settings.learned()
    if isinstance(method, LearnedRouting):
        routed = method(models, given, weights, shared=[*weights], progress=progress)
        paper, on_disk = rates(routed)
        return Learned({name: _Headed(routed, name) for name in models}, paper, on_disk)
    assert isinstance(method, LearnedMerge)
    if kept is not None and kept.is_file():
        merged = load_safetensors(kept)
    else:
        merged = method(models, given, weights, shared=[*weights], progress=progress)
        if kept is not None:
            with atomic_file(kept) as partial:
                alone = {name: one.cpu().contiguous() for name, one in merged.items()}
                safetensors.torch.save_file(alone, partial)
    for model in models.values():
        model.load_state_dict(merged, strict=False)
    return Learned(models)


class _Headed(nn.Module):
    """A routed model under the head of one task, called as any model is."""

    def __init__(self, routed: RoutedModel, task: str) -> None:
        super().__init__()
        self.routed, self.architecture, self.task = routed, routed.model, task

    def forward(self, **batch: Tensor) -> Any:
        return SimpleNamespace(logits=self.routed(head=self.task, **batch))


def rates(routed: RoutedModel) -> tuple[float, float]:
    """AMR of a task: as the papers count it, and by the bytes of the `state_dict`.

    Heads and the reference are left out, as of packs; each task has its share of the router. The
    papers count a codec's bits by its own rule, and 32 bits a number of all else.
    """
    state, tasks = routed.stored(), len(routed.tasks)
    learned = [one for one in routed.state_dict().values() if isinstance(one, Tensor)]
    numbers, size = sum(one.numel() for one in learned), sum(one.nbytes for one in learned)
    specs = [TensorSpec(n, tuple(one.shape), one.dtype) for n, one in routed.reference.items()]
    coded = Bits(0, 0, 0)
    if isinstance(routed, MixedModel):
        coded = cost(routed.codec, specs)
    vectors = [*_tensors(state.get("vectors", {}))]
    stored = [*vectors, *_tensors(state.get("parts", {}))]
    numbers += sum(one.numel() for one in vectors)
    size += sum(one.nbytes for one in stored)
    share = Share(32 * numbers / tasks, 8 * size / tasks)
    found = amr_percent(coded._replace(stored=0), Denominator.of(specs), share)
    return found["amr_paper"], found["on_disk_native"]


def _tensors(nested: Any) -> Iterator[Tensor]:
    if isinstance(nested, Mapping):
        for inner in nested.values():
            yield from _tensors(inner)
    else:
        yield nested


def _parameters_of(loaded: nn.Module, model: nn.Module, own: Alignment) -> dict[str, str]:
    """The base's names of what an expert shares with it, to the model's names of these.

    Args:
        loaded: The expert as `transformers` opens it.
        model: The model that answers the task, of all or some of the same parameters.
        own: The expert, aligned with the base.

    Raises:
        CheckpointError: if parameters are called otherwise than the checkpoint calls them.
    """
    inner = dict(loaded.named_parameters(remove_duplicate=False))
    called = {id(one): name for name, one in model.named_parameters()}
    prefix = f"{getattr(loaded, 'base_model_prefix', '')}."

    renames = [*published_renames(own.checkpoint)]

    def found(*names: str) -> str | None:
        """The model's name of a tensor: loaders rename, and add and remove a head's prefix."""
        new = [*names, *(rename(name) for rename in renames for name in names)]
        tried = [form for n in new for form in (n, prefix + n, n.removeprefix(prefix))]
        return next((called.get(id(inner[name])) for name in tried if name in inner), None)

    shared = {
        name: parameter
        for name in own.shared
        if name not in own.grown
        and (parameter := found(own.files[name], own.renaming.expert_name(name))) is not None
    }
    stored = {found(name) for name in own.checkpoint.specs} | {*shared.values()}
    strange = [called[id(one)] for one in inner.values() if called.get(id(one), None) is not None]
    strange = [name for name in dict.fromkeys(strange) if name not in stored]
    if strange:
        raise CheckpointError(
            f"Expert '{own.name}': transformers has {len(strange)} parameter(s) that "
            f"{own.checkpoint.source} does not store by their names: {shown(strange)}. A learned "
            "method cannot tell what they share. Save the expert anew with this version of "
            "transformers, or leave the method out."
        )
    return shared


def _same(names: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """What all experts share, by the base's names, if they call it the same.

    Raises:
        CheckpointError: if they do not.
    """
    first_task, first = next(iter(names.items()))
    for task, own in names.items():
        odd = sorted(dict(first.items() ^ own.items()))
        if odd:
            raise CheckpointError(
                f"The experts '{first_task}' and '{task}' share other parameters with the base, or "
                f"call them otherwise: {shown(odd)}. Learned methods need models of one class."
            )
    return dict(first)
