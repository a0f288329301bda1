"""Writes a pack task by task; each task is on disk and in pack.json before the next begins."""

import hashlib
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from personae._types import Parts, TensorSpec, dtype_name
from personae.methods import Choice, Pool
from personae.packs.fingerprint import sha256_file
from personae.packs.manifest import (
    MANIFEST_NAME,
    ROUTER,
    SHARED,
    TASKS,
    AuxiliaryRecord,
    BlockRecord,
    Manifest,
    PrivateRecord,
    RouterRecord,
    SharedRecord,
    TaskRecord,
    TensorRecord,
)
from personae.packs.reader import Pack
from personae.packs.soundness import own_path, parse_manifest
from personae.packs.task_file import write_task_file
from personae.writers import (
    CheckpointWriter,
    atomic_file,
    clear,
    note,
    remove,
    require_place,
    resume,
    write_auxiliary_files,
)


@dataclass(frozen=True)
class CodedTensor:
    """One coded tensor: its record's numbers, the parts of its blocks, and whether they show.

    They do not where all that is decoded rounds to the reference's own values.
    """

    shape: tuple[int, ...]
    blocks: Sequence[tuple[int, int, int]]
    parts: tuple[Parts, ...]
    ranks: tuple[int | None, ...]
    energy: float
    relative_error: float
    shows: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes of all its parts."""
        return sum(v.numel() * v.itemsize for parts in self.parts for v in parts.values())

    @property
    def treatment(self) -> str:
        """See `TensorRecord`."""
        return self.record().treatment

    def record(self) -> TensorRecord:
        """The manifest's record of this tensor."""
        return TensorRecord(
            shape=self.shape,
            blocks=tuple(
                BlockRecord(
                    axis=axis,
                    start=start,
                    stop=stop,
                    rank=rank,
                    parts={name: values.numel() for name, values in parts.items()},
                )
                for (axis, start, stop), parts, rank in zip(
                    self.blocks, self.parts, self.ranks, strict=True
                )
            ),
            bytes=self.nbytes,
            energy=self.energy,
            relative_error=self.relative_error,
        )


class PackWriter:
    """Grows a pack in a directory: adds and removes tasks, each change whole or not at all."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        """Go on with what is in the directory, or begin with this manifest.

        The caller holds the directory: what killed runs had begun in it is removed.

        Raises:
            PackError: if a link stands where its files go.
        """
        self.directory = directory
        self.manifest = manifest
        own_path(directory, TASKS).mkdir(exist_ok=True)
        clear(directory)

    def add_task(
        self,
        name: str,
        coded: Mapping[str, CodedTensor],
        private: Mapping[str, Tensor],
        auxiliary_files: Mapping[str, Path | bytes],
        reference_auxiliary_files: Mapping[str, Path],
        **about: Any,
    ) -> None:
        """Write one task's weights and auxiliary files, then its record.

        Args:
            name: The task.
            coded: Reference name to coded tensor.
            private: The expert's name to a tensor kept whole.
            auxiliary_files: The expert's small files, or their content, by relative name.
            reference_auxiliary_files: The reference's; equal files are not stored twice.
            about: Further fields of `TaskRecord`.

        Raises:
            PackError: if a link stands where its files go.
        """
        file, _ = self._places(name)
        newer = about.get("characteristics") or about.get("spared")
        newer = newer or any(tensor.record().is_stack for tensor in coded.values())
        metadata = {
            "format_version": 2 if newer else self.manifest.format_version,
            "task": name,
            "method": self.manifest.method,
            "reference": self.manifest.reference.fingerprint,
        }
        with atomic_file(file) as partial:
            blocks = [parts for key in sorted(coded) for parts in coded[key].parts]
            write_task_file(partial, blocks, private, metadata)
        record = TaskRecord(
            file=f"{TASKS}/{file.name}",
            sha256=sha256_file(file),
            bytes=file.stat().st_size,
            tensors={key: tensor.record() for key, tensor in coded.items()},
            private={key: _private_record(tensor) for key, tensor in private.items()},
            companions=self._keep_auxiliary_files(name, auxiliary_files, reference_auxiliary_files),
            **about,
        )
        self._save(self.manifest.tasks | {name: record})

    def add_shared(
        self,
        specs: Sequence[TensorSpec],
        counted_bits: int,
        fill: Callable[[CheckpointWriter], None],
    ) -> None:
        """Write what all tasks share, then its record.

        Args:
            specs: Of its tensors, by reference name; fp32.
            counted_bits: See `SharedRecord`.
            fill: Writes every tensor.
        """
        file = self._write_whole(SHARED, specs, fill)
        record = SharedRecord(
            file=SHARED,
            sha256=sha256_file(file),
            bytes=file.stat().st_size,
            tensors={spec.name: spec.shape for spec in specs},
            counted_bits=counted_bits,
        )
        self.manifest = self.manifest.model_copy(update={"shared": record})
        self.save()

    def set_router(
        self,
        examples: Mapping[str, Float[Tensor, "example dim"]],
        *,
        neighbours: int,
        mode: Choice,
        pool: Pool,
    ) -> None:
        """Write the router in place of any that was there: no record stands while its file changes.

        Args:
            examples: Task to the features of its examples; all of one width.
            neighbours: See `RouterRecord`, as for the others.
            mode: See there.
            pool: See there.
        """
        self._save(self.manifest.tasks, router=None)
        specs = [TensorSpec(name, tuple(examples[name].shape), torch.float32) for name in examples]

        def fill(writer: CheckpointWriter) -> None:
            for name, features in examples.items():
                writer.write(name, features.float().cpu())

        file = self._write_whole(ROUTER, specs, fill)
        record = RouterRecord(
            file=ROUTER,
            sha256=sha256_file(file),
            bytes=file.stat().st_size,
            examples={name: len(features) for name, features in examples.items()},
            width=specs[0].shape[1],
            neighbours=neighbours,
            mode=mode,
            pool=pool,
        )
        self._save(self.manifest.tasks, router=record)

    def _write_whole(
        self, name: str, specs: Sequence[TensorSpec], fill: Callable[[CheckpointWriter], None]
    ) -> Path:
        """Write one file beside the tasks', whole or not at all."""
        file, folder = own_path(self.directory, name), self.directory / f"{name}.partial"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        with CheckpointWriter(folder, specs, shard_bytes=sys.maxsize) as writer:
            fill(writer)
        writer.files[0].replace(file)
        folder.rmdir()
        return file

    def left_of(self, name: str) -> list[Path]:
        """Files of a task that has no record: a killed run wrote them, or did not remove them."""
        if name in self.manifest.tasks:
            return []
        return [place for place in self._places(name) if place.exists()]

    def remove_task(self, name: str) -> None:
        """Take a task out: first its record, then its files, and its examples from the router.

        Raises:
            OutputError: if its files may not be removed; the pack is as before.
            PackError: if a link stands where its files are, or the router is damaged.
        """
        router, rest = self.manifest.router, self._examples_without(name)
        places = [*self._places(name), *([own_path(self.directory, ROUTER)] if rest == {} else ())]
        for place in places:
            require_place(place)
        tasks = {key: value for key, value in self.manifest.tasks.items() if key != name}
        self._save(tasks, router=router if rest is None else None)
        for place in places:
            remove(place)
        if router is not None and rest:
            self.set_router(rest, neighbours=router.neighbours, mode=router.mode, pool=router.pool)

    def _examples_without(self, name: str) -> dict[str, Tensor] | None:
        """The router's examples of all other tasks; None if it has none of this one.

        Raises:
            PackError: if the router is damaged.
        """
        if self.manifest.router is None or name not in self.manifest.router.examples:
            return None
        examples = Pack(self.directory).read_router()
        return {task: features for task, features in examples.items() if task != name}

    def _places(self, name: str) -> tuple[Path, Path]:
        """A task's file, and the folder of its small files."""
        file = own_path(self.directory, f"{TASKS}/{name}.safetensors")
        return file, own_path(self.directory, f"{TASKS}/{name}")

    def describe(self, characteristics: Mapping[str, tuple[str, ...]]) -> None:
        """Replace what tasks are about; their files stay as they are."""
        told = {
            name: self.manifest.tasks[name].model_copy(update={"characteristics": texts})
            for name, texts in characteristics.items()
        }
        self._save(self.manifest.tasks | told)

    def order_tasks(self, names: Sequence[str]) -> None:
        """List the tasks in this order, whichever was finished first."""
        self._save({name: self.manifest.tasks[name] for name in names})

    def save(self) -> None:
        """Write pack.json as it stands."""
        self._save(self.manifest.tasks)

    def _save(self, tasks: Mapping[str, TaskRecord], **more: RouterRecord | None) -> None:
        self.manifest = self.manifest.model_copy(update={"tasks": dict(tasks), **more})
        with atomic_file(self.directory / MANIFEST_NAME) as partial:
            partial.write_text(self.manifest.to_json(), encoding="utf-8")

    def _keep_auxiliary_files(
        self, name: str, own: Mapping[str, Path | bytes], shared: Mapping[str, Path]
    ) -> dict[str, AuxiliaryRecord]:
        """Store the expert's small files that differ from the reference's; list them all."""
        records: dict[str, AuxiliaryRecord] = {}
        for relative in sorted({*own, *shared}):
            content = own[relative] if relative in own else shared[relative]
            digest = _digest(content)
            if relative in shared and sha256_file(shared[relative]) == digest:
                records[relative] = AuxiliaryRecord(stored_in="reference", sha256=digest)
                continue
            with atomic_file(own_path(self.directory, f"{TASKS}/{name}/{relative}")) as partial:
                write_auxiliary_files({partial.name: content}, partial.parent)
            records[relative] = AuxiliaryRecord(stored_in="task", sha256=digest)
        return records


def _digest(content: Path | bytes) -> str:
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    return sha256_file(content)


def begun(directory: Path, identity: str, together: str) -> Manifest | None:
    """What an interrupted run with the same inputs and settings left here, else clear it.

    Args:
        directory: The partial directory of a pack.
        identity: What decides the pack's bytes: settings and fingerprints, in one line.
        together: The packs that are made together, in one line.

    Returns:
        The manifest so far, or None to begin anew.
    """
    goes_on = resume(directory, identity) is not None
    note(directory, identity, together)
    path = directory / MANIFEST_NAME
    return parse_manifest(path) if goes_on and path.exists() else None


def _private_record(tensor: Tensor) -> PrivateRecord:
    return PrivateRecord(
        shape=tuple(tensor.shape),
        dtype=dtype_name(tensor.dtype),
        bytes=tensor.numel() * tensor.itemsize,
    )
