"""What a codec has to know before it codes: looks at an expert, and what all tasks share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from personae._types import TensorSpec
from personae.family.deltas import Deltas
from personae.methods import Block, Codec, Context, Facts, Look, Site, look
from personae.packs.shared_file import SharedFile
from personae.packs.writer import PackWriter
from personae.run import pool
from personae.run.costs import coding_bytes, sharing_bytes
from personae.run.scan import ExpertScan
from personae.run.work import Work
from personae.writers import CheckpointWriter


@dataclass(frozen=True)
class Known:
    """What is known of one expert beside its deltas.

    Attributes:
        task: Its name.
        shared: What all tasks share; None if they share nothing.
        facts: What the codec's looks told.
    """

    task: str
    shared: SharedFile | None = None
    facts: Facts | None = None

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
            found.append(Context(site, self.task, own, self.facts))
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


def coded_names(codec: Codec, deltas: Deltas, scan: ExpertScan) -> list[str]:
    """Reference names of the tensors that changed and are coded, sorted."""
    return [
        name
        for name in deltas.alignment.shared
        if scan.tensors[name].changed and codec.treats(deltas.reference.specs[name]) == "code"
    ]


def gather(codec: Codec, deltas: Deltas, scan: ExpertScan, known: Known, work: Work) -> Facts:
    """Take a codec's looks at one expert."""
    names = coded_names(codec, deltas, scan)

    def tally(one: Look, name: str) -> list[Tensor]:
        delta, spec = deltas.read(name), deltas.reference.specs[name]
        blocks = codec.blocks(spec) or (whole(spec),)
        pairs = zip(blocks, known.of(spec, blocks), strict=True)
        parts = ((cut_out(delta, block), context) for block, context in pairs)
        return [one.tally(part, context) for part, context in parts if part.any()]

    def take(one: Look) -> list[tuple[str, Tensor]]:
        told: dict[str, Tensor] = {}
        results = pool.run(
            names,
            partial(tally, one),
            cost=lambda name: coding_bytes([codec], deltas.reference.specs[name]),
            workers=work.threads,
            memory=work.memory,
        )
        for done, (name, shares) in enumerate(results, 1):
            for number, share in enumerate(shares):
                if one.each:
                    told[f"{name}/{number:06}"] = share
                else:  # whole numbers: the order does not matter
                    told[""] = told[""] + share if told else share
            work.progress(f"measuring {known.task} ({one.name})", done, len(names))
        return list(told.items())

    return look(codec.gather(), take)


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

    def fill(file: CheckpointWriter) -> None:
        def share(spec: TensorSpec) -> None:
            file.write(spec.name, codec.share([d.read(spec.name) for d in sharing[spec.name]]))

        results = pool.run(
            changed,
            share,
            cost=lambda spec: sharing_bytes(spec.numel, len(experts)),
            workers=work.threads,
            memory=work.memory,
        )
        for done, _ in enumerate(results, 1):
            work.progress("computing what all tasks share", done, len(changed))

    writer.add_shared(changed, 32 * sum(spec.numel for spec in specs.values()), fill)
