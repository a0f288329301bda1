"""The merged model a difference pack is relative to, streamed to disk tensor by tensor."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from personae._types import TensorSpec
from personae.checkpoints import open_checkpoint
from personae.checkpoints.family import align
from personae.errors import CheckpointError, Faults, PackError
from personae.execute import pool
from personae.execute.deltas import Deltas, working_bytes
from personae.execute.family import Family
from personae.execute.scan import fingerprint, uncoded
from personae.execute.work import Progress, Work
from personae.methods import MergeMethod, Parameters, Site, Statistics
from personae.packs.manifest import ReferenceRecord
from personae.packs.writer import REFERENCE
from personae.recipe import PackSettings
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
            vector = method.merge(
                stacks.read(spec.name),
                parameters,
                statistics or None,
                Site(spec.name, spec.shape),
            )
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
        return 16 * spec.numel * len(self._deltas) + working_bytes(spec.shape)

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
) -> Statistics:
    """Take a method's looks at the whole model."""
    if method.gather is None or getattr(parameters, "scope", "model") == "tensor":
        return {}
    looks = method.gather(parameters, stacks.experts)
    try:
        measure = next(looks)
        while True:
            read: Callable[[str], Tensor] = stacks.read
            total: Tensor | None = None
            stream = pool.run(stacks.names, read, cost=stacks.cost, workers=workers, memory=memory)
            for done, (name, vectors) in enumerate(stream, 1):
                site = Site(name, tuple(vectors.shape[1:]))
                share = measure.tally(vectors, parameters, site)
                total = share if total is None else total + share
                progress(f"measuring ({measure.name})", done, len(stacks.names))
            measure = looks.send(total if total is not None else torch.zeros(()))
    except StopIteration as done:
        return done.value


def make_reference(
    family: Family, base_fingerprint: str, settings: PackSettings, directory: Path, work: Work
) -> ReferenceRecord:
    """The record of the reference of a pack in `directory`; a merged one is written there first.

    Raises:
        CheckpointError: if the merged model holds values that are not finite.
    """
    base = family.base
    if settings.vector == "task":
        return ReferenceRecord(
            kind="base",
            source=base.source,
            revision=base.revision,
            fingerprint=base_fingerprint,
        )
    method, parameters = settings.merge()
    write_merged_reference(
        family,
        method,
        parameters,
        directory / REFERENCE,
        workers=work.threads,
        memory=work.memory,
        progress=work.progress,
    )
    faults = Faults()
    merged = open_checkpoint(directory / REFERENCE)
    found = fingerprint(
        merged,
        workers=work.threads,
        faults=faults,
        label="The merged reference",
        unchecked=uncoded(family),
    )
    merged.close()
    faults.raise_if_any(CheckpointError)
    return ReferenceRecord(
        kind="merged",
        source=REFERENCE,
        fingerprint=found,
        method=method.name,
        method_parameters=parameters.model_dump(mode="json"),
        experts=tuple(family.experts),
    )


def relative_to_merged(family: Family, directory: Path, settings: PackSettings) -> Family:
    """The same experts, aligned with the merged reference as it stands on disk."""
    merged = open_checkpoint(directory)
    experts = {name: expert.checkpoint for name, expert in family.experts.items()}
    return Family(merged, align(merged, experts, skip=settings.skip, private=settings.private))


def check_fingerprint(reference: ReferenceRecord, found: str, source: str) -> None:
    """Check that a checkpoint is the reference a pack was made from.

    Raises:
        PackError: if its weights are others.
    """
    if found != reference.fingerprint:
        raise PackError(
            f"{source} is not the reference this pack was made from: its fingerprint is {found}, "
            f"the pack was made from {reference.source} with {reference.fingerprint}. "
            "Give the right one with --base."
        )
