"""The merged model a difference pack is relative to, streamed to disk tensor by tensor."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from personae._types import TensorSpec
from personae.execute import pool
from personae.execute.deltas import BYTES_PER_ELEMENT, Deltas
from personae.execute.family import Family
from personae.execute.work import Progress
from personae.methods import MergeMethod, Parameters
from personae.writers import CheckpointWriter, output_directory


def write_merged_reference(
    family: Family,
    method: MergeMethod,
    parameters: Parameters,
    directory: Path,
    *,
    workers: int,
    memory: int | None,
    progress: Progress,
) -> None:
    """Merge the tensors all experts share with the base; the others stay the base's.

    Deltas are formed and merged in fp32; the result is cast once, to the base's dtype.

    Args:
        family: Base and experts.
        method: Static merge method.
        parameters: Its parameters.
        directory: Where the checkpoint is written; replaced if it exists.
        workers: Tensors worked on at once.
        memory: Bound in bytes on their working memory.
        progress: Told after each tensor.
    """
    stacks = TaskVectors(family)
    statistics = gather(method, parameters, stacks, workers, memory, progress)
    specs = list(family.base.specs.values())

    def merged(spec: TensorSpec) -> None:
        tensor = family.base.read(spec.name)
        if spec.name in stacks.names:
            vector = method.merge(stacks.read(spec.name), parameters, statistics)
            tensor = tensor.float() + vector
        writer.write(spec.name, tensor)

    with (
        output_directory(directory, overwrite=True) as partial,
        CheckpointWriter(partial, specs, tied=family.base.tied) as writer,
    ):
        for done, _ in enumerate(
            pool.run(specs, merged, cost=stacks.cost, workers=workers, memory=memory), 1
        ):
            progress(f"merging the reference ({method.name})", done, len(specs))
        for relative, path in family.base.companions.items():
            (partial / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, partial / relative)


class TaskVectors:
    """The task vectors of all experts, stacked in recipe order, one tensor at a time."""

    def __init__(self, family: Family) -> None:
        """Take the tensors every expert shares with the base in full."""
        self._deltas = [Deltas(expert, family.base, True) for expert in family.experts.values()]
        shared = [set(d.alignment.shared) for d in self._deltas]
        self.names: Sequence[str] = sorted(set[str].intersection(*shared))
        self._specs = family.base.specs

    def read(self, name: str) -> Float[Tensor, "expert ..."]:
        """The task vectors of one tensor, fp32."""
        return torch.stack([deltas.read(name) for deltas in self._deltas])

    def cost(self, item: TensorSpec | str) -> int:
        """Peak bytes of merging one tensor."""
        spec = self._specs[item] if isinstance(item, str) else item
        return spec.numel * (4 * 4 * len(self._deltas) + BYTES_PER_ELEMENT)

    @property
    def experts(self) -> int:
        """Number of experts."""
        return len(self._deltas)


def gather(
    method: MergeMethod,
    parameters: Parameters,
    stacks: TaskVectors,
    workers: int,
    memory: int | None,
    progress: Progress,
) -> Mapping[str, Tensor]:
    """Run a method's streaming passes; returns its whole-model statistics by name."""
    statistics: dict[str, Tensor] = {}
    for step in method.passes(parameters):
        state = step.start(stacks.experts)
        read: Callable[[str], Tensor] = stacks.read
        stream = pool.run(stacks.names, read, cost=stacks.cost, workers=workers, memory=memory)
        for done, (_, vectors) in enumerate(stream, 1):
            state = step.update(state, vectors, parameters, statistics)
            progress(f"measuring ({step.name})", done, len(stacks.names))
        statistics[step.name] = step.finish(state, parameters, statistics)
    return statistics
