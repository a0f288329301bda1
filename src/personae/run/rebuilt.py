"""An expert as its pack tells it: every tensor decoded when it is asked for."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from personae._types import Parts, TensorSpec
from personae.checkpoints import Checkpoint
from personae.checkpoints.naming import shown
from personae.checkpoints.tied import as_stored, copies_written
from personae.errors import PackError
from personae.family.finite import is_finite
from personae.methods import Block, Codec, decode_block
from personae.ops.factors import balanced
from personae.packs.manifest import TaskRecord, dtype_of
from personae.packs.reader import Pack
from personae.packs.shared_file import SharedFile
from personae.packs.soundness import check_fit, expert_names, stored_names
from personae.packs.task_file import TaskFile
from personae.run.costs import rebuilding_bytes

_CPU = torch.device("cpu")


class Rebuilt:
    """One expert as its pack tells it: specs from records, tensors decoded on demand.

    Attributes:
        specs: The expert's names to specs.
        record: The task's record.
        reference: What the task is relative to, as it is stored.
        reference_names: The expert's name to the reference's, of all that the reference has.
        copies: Names that are tied to others and that the reference stores: written again, each in
            this dtype.
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
        self.reference = reference = as_stored(reference)
        check_fit(pack.directory, task, self.record, reference.specs)
        self._device = device
        self._file = pack.open_task(task)
        self._shared = pack.open_shared()
        self._codec: Codec = pack.codec(task)
        self._private = self.record.private
        self.reference_names = expert_names(self.record, reference.specs)
        self.specs: Mapping[str, TensorSpec] = self._lay_out()
        known = stored_names(self.record, reference.specs)
        self.copies = copies_written(self.record.tied, self.specs, known, reference.specs)

    def _lay_out(self) -> dict[str, TensorSpec]:
        specs: dict[str, TensorSpec] = {}
        for name, ref_name in self.reference_names.items():
            spec = self.reference.specs[ref_name]
            told = self.record.dtypes.get(ref_name)
            dtype = dtype_of(told) if told else spec.dtype
            shape = spec.shape
            if ref_name in self.record.grown:
                shape = (shape[0] + self._private[name].shape[0], *shape[1:])
            specs[name] = TensorSpec(name, shape, dtype)
        for name, record in self._private.items():
            if name not in specs:
                specs[name] = TensorSpec(name, record.shape, dtype_of(record.dtype))
        return specs

    @property
    def coded(self) -> set[str]:
        """Names of tensors to which a delta is added."""
        names = self.reference_names.items()
        return {name for name, ref_name in names if ref_name in self.record.tensors}

    def codes(self, copies: Collection[str]) -> bool:
        """Whether stored copies of tensors have codes of their own, as in packs of old."""
        return any(name in self.record.tensors for name in copies)

    def read(self, name: str) -> Tensor:
        """One tensor of the expert: fp32 if it is coded, else of its own dtype."""
        ref_name = self.reference_names.get(name)
        if ref_name is None:
            return self.private(name)
        tensor = self.reference.read(ref_name)
        if ref_name in self.record.tensors:
            tensor = self.delta(ref_name).add_(tensor)  # fp32, in place: θ + Δ = Δ + θ to the bit
            tensor = held(tensor, self.specs[name].dtype)
        if ref_name in self.record.grown:
            tensor = torch.cat([tensor, self.private(name)])  # to the wider of both dtypes
        return tensor

    def private(self, name: str) -> Tensor:
        """One tensor (or the extra rows of one) kept whole, by the expert's name."""
        return self._file.private(name)

    def cost(self, ref_name: str) -> int:
        """Peak memory of `read` of the tensor that goes by this name in the reference."""
        spec, record = self.reference.specs.get(ref_name), self.record.tensors.get(ref_name)
        if spec is None:  # kept whole: read from a file that is mapped
            return 0
        ranks = [] if record is None else [block.rank or 0 for block in record.blocks]
        return rebuilding_bytes(self._codec, spec, ranks)

    def delta(self, ref_name: str) -> Tensor:
        """The decoded delta of one reference tensor, fp32; zeros if it is unchanged.

        Raises:
            PackError: if its parts do not fit, or make numbers that are not finite.
        """
        if ref_name not in self.record.tensors:
            return torch.zeros(self.reference.specs[ref_name].shape)
        delta = decode(self._codec, self._file, ref_name, self._shared, self._device)
        if not is_finite(delta):
            raise PackError(
                f"{self._file.path}: the parts of '{ref_name}' make numbers that are not finite. "
                "The pack was damaged or changed: fetch it again."
            )
        return delta

    def factors(self, ref_name: str, device: torch.device = _CPU) -> tuple[Tensor, Tensor] | None:
        """The decoded delta as a product of two factors, if its code holds such; fp32.

        They are decoded on `device`, and are there.
        """
        record = self.record.tensors.get(ref_name)
        if record is None or len(record.shape) != 2:
            return None
        pairs: list[tuple[Tensor, Tensor]] = []
        for block, parts in self._file.blocks(ref_name):
            cut = Block(block.axis, block.start, block.stop).shape_in(record.shape)
            found = self._codec.triplets(_on(device, parts), cut)
            if found is None:
                return None
            pairs.append(balanced(found, overwrite=True))
        if len(pairs) == 1:
            return pairs[0]
        lefts, rights = zip(*pairs, strict=True)
        if record.blocks[0].axis == 0:
            return torch.block_diag(*lefts), torch.cat(rights)
        return torch.cat(lefts, dim=1), torch.block_diag(*rights)


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
        cut = Block(block.axis, block.start, block.stop).shape_in(shape)
        own = None
        if common is not None:
            own = common.narrow(block.axis, block.start, length).reshape(cut)
        share = _decode_block(codec, parts, cut, own, device)
        if length == shape[block.axis]:
            return share
        delta = torch.zeros(shape) if delta is None else delta
        place = delta.narrow(block.axis, block.start, length)
        place.copy_(share.view(place.shape))
    assert delta is not None
    return delta


def _decode_block(
    codec: Codec,
    parts: Parts,
    shape: tuple[int, ...],
    shared: Tensor | None,
    device: torch.device,
) -> Tensor:
    shared = None if shared is None else shared.to(device)
    return decode_block(codec, _on(device, parts), shape, shared).cpu()


def _on(device: torch.device, parts: Parts) -> Parts:
    return {name: part.to(device) for name, part in parts.items()}


def left_in_words(record: TaskRecord) -> str:
    """Which changed tensors a task has as in the reference, and what that loses; empty if none."""
    left = record.left
    if not left:
        return ""
    share = f"{100 * sum(left.values()):.2g} % of the squared norm of the delta"
    return f"left as in the reference: {shown(list(left))} ({len(left)} in all, {share})"


def held(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor, clamped in place to what fp16 can hold if it will be cast to it.

    Coding may overshoot that, where the expert itself stays inside.
    """
    if dtype == torch.float16:
        tensor.clamp_(torch.finfo(dtype).min, torch.finfo(dtype).max)
    return tensor
