"""What a codec knows of an expert beside its deltas: what all tasks share, and statistics."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from personae._types import TensorSpec
from personae.family.deltas import Deltas
from personae.methods import Block, Codec, Context, Site, Statistics
from personae.packs.shared_file import SharedFile
from personae.packs.writer import PackWriter
from personae.run.costs import sharing_bytes
from personae.run.scan import ExpertScan
from personae.run.work import Work
from personae.writers import CheckpointWriter


@dataclass(frozen=True)
class Known:
    """What is known of one expert beside its deltas.

    Attributes:
        task: Its name.
        shared: What all tasks share; None if they share nothing.
        statistics: What the codec's passes found.
    """

    task: str
    shared: SharedFile | None = None
    statistics: Statistics | None = None

    def of(self, spec: TensorSpec, blocks: Sequence[Block]) -> list[Context]:
        """The context of each block of one tensor."""
        shared = self.shared.read(spec.name) if self.shared else None
        found: list[Context] = []
        for block in blocks:
            site = Site(spec.name, spec.shape)
            shape = block.shape_in(spec.shape)
            if len(shape) < len(spec.shape):  # one matrix of a stack
                site = Site(spec.name, shape, block.start * prod(shape))
            own = None if shared is None else cut_out(shared, block)
            found.append(Context(site, self.task, own, self.statistics))
        return found


def whole(spec: TensorSpec) -> Block:
    """All of a tensor as one block."""
    return Block(0, 0, spec.shape[0] if spec.shape else 1)


def cut_out(tensor: Float[Tensor, "..."], block: Block) -> Float[Tensor, "..."]:
    """One block of a tensor, in its own shape."""
    if tensor.ndim == 0:
        return tensor
    cut = tensor.narrow(block.axis, block.start, block.stop - block.start)
    return cut.reshape(block.shape_in(tuple(tensor.shape))).contiguous()


def write_shared(
    codec: Codec,
    experts: Sequence[Deltas],
    scans: Mapping[str, ExpertScan],
    writer: PackWriter,
    work: Work,
) -> None:
    """Compute what all tasks share, a tensor at a time, and write it into the pack."""
    sharing: dict[str, list[Deltas]] = {}
    for deltas in experts:
        for name in deltas.alignment.shared:
            if codec.treats(deltas.reference.specs[name]) == "code":
                sharing.setdefault(name, []).append(deltas)
    specs = {
        name: TensorSpec(name, having[0].reference.specs[name].shape, torch.float32)
        for name, having in sorted(sharing.items())
    }
    changed = [
        specs[name]
        for name, having in sorted(sharing.items())
        if any(scans[deltas.alignment.name].tensors[name].changed for deltas in having)
    ]

    kept = sum(deltas.alignment.kept_bytes for deltas in experts)

    def fill(file: CheckpointWriter) -> None:
        def share(spec: TensorSpec) -> None:
            file.write(spec.name, codec.share([d.read(spec.name) for d in sharing[spec.name]]))

        work.each(
            changed,
            share,
            cost=lambda spec: kept + sharing_bytes(spec.numel, len(experts)),
            stage="computing what all tasks share",
        )

    writer.add_shared(changed, 32 * sum(spec.numel for spec in specs.values()), fill)
