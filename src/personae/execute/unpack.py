"""Rebuilds an expert from a pack and its reference, as an ordinary checkpoint directory."""

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from personae._types import Parts, TensorSpec
from personae.checkpoints import Checkpoint, open_checkpoint
from personae.checkpoints.naming import Renaming
from personae.errors import CheckpointError, Faults, PackError
from personae.execute import pool
from personae.execute.deltas import working_bytes
from personae.execute.plan import check_output
from personae.execute.reference import check_fingerprint
from personae.execute.scan import fingerprint
from personae.execute.work import Work
from personae.methods import CODECS, Codec, build, decode_block, lookup
from personae.packs.fingerprint import sha256_file
from personae.packs.manifest import TaskRecord
from personae.packs.reader import Pack
from personae.packs.shared_file import SharedFile
from personae.packs.task_file import TaskFile
from personae.writers import CheckpointWriter, output_directory, require_space

_CPU = torch.device("cpu")


class Rebuilt:
    """One expert as its pack tells it: specs from records, tensors decoded on demand.

    Attributes:
        specs: The expert's names to specs.
        record: The task's record.
        reference: What the task is relative to.
        reference_names: The expert's name to the reference's, of all that the reference has.
    """

    def __init__(
        self, pack: Pack, task: str, reference: Checkpoint, device: torch.device = _CPU
    ) -> None:
        """Check the task's files and lay out its tensors; decodes nothing yet.

        Tensors will be decoded on `device` and come back to the CPU.

        Raises:
            PackError: if the task is unknown, or its files are damaged or do not fit.
        """
        self.record = pack.task(task)
        self.reference = reference
        self._device = device
        self._file = pack.open_task(task)
        self._shared = pack.open_shared()
        entry = lookup(CODECS, pack.manifest.method)
        self._codec: Codec = build(entry, self.record.parameters)
        self._private = self.record.private
        self.reference_names = _expert_names(self.record, reference)
        self.specs: Mapping[str, TensorSpec] = self._lay_out()

    def _lay_out(self) -> dict[str, TensorSpec]:
        specs: dict[str, TensorSpec] = {}
        for name, ref_name in self.reference_names.items():
            spec = self.reference.specs[ref_name]
            dtype = getattr(torch, self.record.dtypes.get(ref_name, ""), spec.dtype)
            shape = spec.shape
            if ref_name in self.record.grown:
                shape = (shape[0] + self._private[name].shape[0], *shape[1:])
            specs[name] = TensorSpec(name, shape, dtype)
        for name, record in self._private.items():
            if name not in specs:
                specs[name] = TensorSpec(name, record.shape, getattr(torch, record.dtype))
        return specs

    def read(self, name: str) -> Tensor:
        """One tensor of the expert: fp32 if it is coded, else of its own dtype."""
        ref_name = self.reference_names.get(name)
        if ref_name is None:
            return self.private(name)
        tensor = self.reference.read(ref_name)
        if ref_name in self.record.tensors:
            tensor = self.delta(ref_name).add_(tensor)  # fp32, in place: θ + Δ = Δ + θ to the bit
            if self.specs[name].dtype == torch.float16:  # coding may overshoot what fp16 can hold
                tensor.clamp_(torch.finfo(torch.float16).min, torch.finfo(torch.float16).max)
        if ref_name in self.record.grown:
            tensor = torch.cat([tensor, self.private(name)])  # to the wider of both dtypes
        return tensor

    def private(self, name: str) -> Tensor:
        """One tensor (or the extra rows of one) kept whole, by the expert's name."""
        return self._file.private(name)

    def delta(self, ref_name: str) -> Tensor:
        """The decoded delta of one reference tensor, fp32; zeros if it is unchanged."""
        if ref_name not in self.record.tensors:
            return torch.zeros(self.reference.specs[ref_name].shape)
        return decode(self._codec, self._file, ref_name, self._shared, self._device)


def decode(
    codec: Codec,
    file: TaskFile,
    name: str,
    shared: SharedFile | None = None,
    device: torch.device = _CPU,
) -> Tensor:
    """The delta of one tensor, decoded on `device`: fp32, of the reference's shape, on the CPU."""
    record = file.record.tensors[name]
    shape = record.shape
    common = shared.read(name) if shared else None
    if not shape:
        ((_, parts),) = file.blocks(name)
        return _decode_block(codec, parts, shape, common, device)
    delta: Tensor | None = None
    for block, parts in file.blocks(name):
        length = block.stop - block.start
        cut = (*shape[: block.axis], length, *shape[block.axis + 1 :])
        own = None if common is None else common.narrow(block.axis, block.start, length)
        share = _decode_block(codec, parts, cut, own, device)
        if length == shape[block.axis]:
            return share
        delta = torch.zeros(shape) if delta is None else delta
        delta.narrow(block.axis, block.start, length).copy_(share)
    assert delta is not None
    return delta


def _decode_block(
    codec: Codec,
    parts: Parts,
    shape: tuple[int, ...],
    shared: Tensor | None,
    device: torch.device,
) -> Tensor:
    there = {name: part.to(device) for name, part in parts.items()}
    shared = None if shared is None else shared.to(device)
    return decode_block(codec, there, shape, shared).cpu()


def unpack(
    pack: str | Path,
    task: str,
    out: str | Path,
    *,
    base: Any = None,
    overwrite: bool = False,
    shard_bytes: int = 5_000_000_000,
    work: Work | None = None,
) -> Path:
    """Rebuild one expert as a checkpoint directory that `transformers` loads.

    Args:
        pack: The pack's directory.
        task: Which expert.
        out: Directory to write; must not exist, or be empty.
        base: Where the reference is, if not where the pack says.
        overwrite: Replace `out` if it exists.
        shard_bytes: Most bytes in one weight file.
        work: Workers, memory bound, device of the decoding, progress.

    Returns:
        The directory written.

    Raises:
        PersonaeError: if the pack, its reference or the output is not what it should be.
    """
    work = work or Work()
    device = work.torch_device
    out = Path(out).absolute()
    opened = Pack(Path(pack))
    opened.task(task)
    check_output(out, overwrite, inputs=[opened.directory, opened.reference_source(base)])
    reference = open_reference(opened, base, work)
    rebuilt = Rebuilt(opened, task, reference, device)
    specs = list(rebuilt.specs.values())
    require_space(out, sum(spec.nbytes for spec in specs))
    with (
        output_directory(out, overwrite=overwrite) as partial_out,
        CheckpointWriter(
            partial_out, specs, shard_bytes=shard_bytes, tied=rebuilt.record.tied
        ) as writer,
    ):
        copy_companions(opened, task, reference, partial_out)
        write = partial(_write, rebuilt, writer)
        results = pool.run(specs, write, cost=_cost, workers=work.threads, memory=work.memory)
        for done, _ in enumerate(results, 1):
            work.progress(f"unpacking {task}", done, len(specs))
    reference.close()
    return out


def open_reference(pack: Pack, base: Any, work: Work) -> Checkpoint:
    """Open the reference of a pack and check its fingerprint.

    Raises:
        PackError: if it is not found, or its weights are others.
    """
    try:
        reference = open_checkpoint(pack.reference_source(base))
    except CheckpointError as error:
        raise PackError(
            f"The reference of {pack.directory} cannot be opened: {error} "
            "Say where it is with --base."
        ) from error
    found = fingerprint(
        reference,
        workers=work.threads,
        faults=Faults(),
        label="The reference",
        unchecked=reference.specs,  # the weights that were packed have been looked at then
    )
    check_fingerprint(pack.manifest.reference, found, reference.source)
    return reference


def _write(rebuilt: Rebuilt, writer: CheckpointWriter, spec: TensorSpec) -> None:
    writer.write(spec.name, rebuilt.read(spec.name))


def _cost(spec: TensorSpec) -> int:
    return working_bytes(spec.shape)


def _expert_names(record: TaskRecord, reference: Checkpoint) -> dict[str, str]:
    """The expert's name of each reference tensor it has, other than those kept whole."""
    rule = Renaming(
        add=record.renaming.add,
        strip=record.renaming.strip,
        plain=frozenset(record.renaming.plain),
    )
    names: dict[str, str] = {}
    absent, grown = set(record.absent), set(record.grown)
    for ref_name in reference.specs:
        name = rule.expert_name(ref_name)
        if ref_name not in absent and (name not in record.private or ref_name in grown):
            names[name] = ref_name
    return names


def copy_companions(pack: Pack, task: str, reference: Checkpoint, out: Path) -> None:
    """Copy the expert's small files from where they are.

    Raises:
        PackError: if one of the reference's is not what it was.
    """
    for relative, companion in pack.task(task).companions.items():
        source = (
            pack.companion(task, relative)
            if companion.stored_in == "task"
            else reference.companions.get(relative)
        )
        if source is None and not reference.companions:
            continue  # bare weights were given this time: the caller has no such files to copy
        if source is None:
            raise PackError(
                f"{reference.source} has no '{relative}', which '{task}' shares with it. "
                "Restore it, or give a complete copy with --base."
            )
        if sha256_file(source) != companion.sha256:
            raise PackError(
                f"{source} is not the one that '{task}' was packed with: it changed since. "
                "Restore it, or give an unchanged copy with --base."
            )
        target = out / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
