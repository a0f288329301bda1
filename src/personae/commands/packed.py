"""A pack in Python: its tasks with their sizes and errors, and each expert as a lazy state dict."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from personae._types import Characteristics
from personae.checkpoints import Checkpoint
from personae.commands.accounting import task_amr_percent
from personae.commands.unpack import unpack
from personae.packs import reader
from personae.packs.manifest import MANIFEST_NAME
from personae.packs.soundness import parse_manifest
from personae.run.rebuilt import Rebuilt
from personae.run.reference import open_reference
from personae.run.work import Work
from personae.writers import cast


@dataclass(frozen=True)
class AMR:
    """What one task costs beyond the shared model, in % of it; private tensors are left out.

    Attributes:
        paper: As the papers count: 3 bits an element and 32 a singular value, over 32 bits a
            parameter of the reference.
        paper_lean: The same with the fewest bits that carry the code.
        on_disk: Bytes stored over the reference's own bytes.
        on_disk_fp32: Bytes stored over the reference's bytes if it were in fp32.
    """

    paper: float
    paper_lean: float
    on_disk: float
    on_disk_fp32: float


@dataclass(frozen=True)
class PackedTask:
    """One task of a pack.

    Attributes:
        name: Its name.
        amr: What it costs, in %.
        bytes: Of its file, private tensors included.
        relative_error: ‖τ − τ̂‖² / ‖τ‖² over the tensors that changed.
        parameters: The codec's, as used for this task.
        private: Names of tensors that are kept whole, such as heads.
        characteristics: What the task is about: class names, or a description.
        source: Where the expert was.
    """

    name: str
    amr: AMR
    bytes: int
    relative_error: float
    parameters: Mapping[str, Any]
    private: tuple[str, ...]
    characteristics: tuple[str, ...]
    source: str


class Pack(reader.Pack):
    """A pack on disk, and what can be done with it. Opening it reads pack.json alone.

    Attributes:
        directory: Where it is.
        manifest: What pack.json says.
    """

    def __init__(self, directory: str | Path) -> None:
        """Open a pack.

        Raises:
            PackError: if the directory holds no readable pack of this format.
        """
        super().__init__(Path(directory))

    @cached_property
    def tasks(self) -> Mapping[str, PackedTask]:
        """Every task, by name."""
        return {name: self._told(name) for name in self.manifest.tasks}

    def state_dict(self, task: str, *, base: Any = None, work: Work | None = None) -> "LazyExpert":
        """One expert as a mapping of names to tensors, each decoded when it is looked up.

        The reference is read once, whole, to check that it is the one the pack was made from.

        Args:
            task: Which expert.
            base: Where the reference is, if not where the pack says.
            work: Workers for checking the reference, device of the decoding.

        Raises:
            PackError: if the pack has no such task, its files are damaged, or the reference is
                another or missing.
        """
        work = work or Work()
        device = work.torch_device
        self._read_again()  # others may have added or removed tasks
        self.task(task)
        reference = open_reference(self, base, work)
        return LazyExpert(Rebuilt(self, task, reference, device), reference)

    def unpack(self, task: str, out: str | Path, **options: Any) -> Path:
        """Rebuild one expert as a checkpoint directory; options as for `personae.unpack`.

        Raises:
            PersonaeError: if the pack, its reference or the output is not what it should be.
        """
        return unpack(self.directory, task, out, **options)

    def add(
        self,
        experts: Mapping[str, Any],
        *,
        base: Any = None,
        characteristics: Characteristics | None = None,
        work: Work | None = None,
    ) -> None:
        """Add experts, with the pack's codec, parameters and reference; see `add_tasks`.

        Raises:
            PackError: if the pack has such a task already, or its reference is another.
            CheckpointError: if an expert cannot be read or does not fit.
        """
        from personae.commands.pack import add_tasks

        add_tasks(self.directory, experts, base=base, characteristics=characteristics, work=work)
        self._read_again()

    def remove(self, task: str) -> None:
        """Remove one task and its files.

        Raises:
            PackError: if the pack has no such task.
        """
        from personae.commands.pack import remove_task

        remove_task(self.directory, task)
        self._read_again()

    def _read_again(self) -> None:
        self.manifest = parse_manifest(self.directory / MANIFEST_NAME)
        self.__dict__.pop("tasks", None)

    def _told(self, name: str) -> PackedTask:
        record = self.manifest.tasks[name]
        percent = task_amr_percent(record, self.manifest)
        amr = AMR(
            paper=percent["amr_paper"],
            paper_lean=percent["amr_paper_lean"],
            on_disk=percent["on_disk_native"],
            on_disk_fp32=percent["on_disk_fp32"],
        )
        return PackedTask(
            name,
            amr,
            record.bytes,
            record.relative_error,
            record.parameters,
            tuple(record.private),
            record.characteristics,
            record.source,
        )


class LazyExpert(Mapping[str, Tensor]):
    """An expert of a pack as a lazy state dict: a tensor is decoded when it is looked up.

    Names are those in the expert's files, tied ones too, so that a module that names its tensors
    likewise takes it as `load_state_dict(dict(expert))`. Nothing is kept: looking a tensor up
    twice decodes it twice.
    """

    def __init__(self, rebuilt: Rebuilt, reference: Checkpoint) -> None:
        """Take what is there; reads no tensor."""
        self._rebuilt, self._reference = rebuilt, reference

    def __getitem__(self, name: str) -> Tensor:
        """One tensor, in the expert's own dtype.

        Raises:
            KeyError: The expert has no tensor of that name.
        """
        kept = self._rebuilt.record.tied.get(name, name)
        spec, computed = self._rebuilt.specs[kept], kept in self._rebuilt.coded
        tensor = cast(self._rebuilt.read(kept), spec, computed=computed)
        return tensor if computed else tensor.clone()  # not the reference's own, nor a file's

    def __iter__(self) -> Iterator[str]:
        """Every name, tied ones last."""
        yield from self._rebuilt.specs
        yield from self._rebuilt.record.tied

    def __len__(self) -> int:
        """Number of names."""
        return len(self._rebuilt.specs) + len(self._rebuilt.record.tied)

    def __enter__(self) -> "LazyExpert":
        """Use it in a `with` statement."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Release the reference's files."""
        self._reference.close()
