"""Reads packs: nothing is decoded before its checksum holds."""

from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from personae.errors import Faults, PackError, nearest
from personae.methods import Codec
from personae.packs.fingerprint import sha256_file
from personae.packs.manifest import (
    MANIFEST_NAME,
    REFERENCE,
    TASKS,
    Manifest,
    RouterRecord,
    SharedRecord,
    TaskRecord,
)
from personae.packs.router_file import read_router
from personae.packs.shared_file import SharedFile
from personae.packs.soundness import codec_of, own_path, parse_manifest
from personae.packs.task_file import TaskFile


class Pack:
    """A pack on disk. Opening it reads pack.json alone.

    Attributes:
        directory: Where it is.
        manifest: What it holds.
    """

    def __init__(self, directory: Path) -> None:
        """Open a pack.

        Raises:
            PackError: if the directory holds no readable pack of this format.
        """
        if directory.name == MANIFEST_NAME and directory.is_file():
            raise PackError(f"{directory} is a file of a pack: give its folder.")
        self.directory = directory
        self.manifest: Manifest = parse_manifest(directory / MANIFEST_NAME)

    def task(self, name: str) -> TaskRecord:
        """The record of one task.

        Raises:
            PackError: if the pack has no task of that name.
        """
        if name not in self.manifest.tasks:
            raise PackError(
                f"{self.directory} has no task '{name}'. {nearest(name, self.manifest.tasks)}"
            )
        return self.manifest.tasks[name]

    def open_task(self, name: str) -> TaskFile:
        """Open one task's file after checking its checksum.

        Raises:
            PackError: if the file is missing, damaged, or does not fit its record.
        """
        faults = Faults()
        self.check_task(name, faults)
        faults.raise_if_any(PackError)
        return TaskFile(self.directory / self.task(name).file, self.task(name), self.codec(name))

    def codec(self, name: str) -> Codec:
        """The codec of one task, with its parameters."""
        return codec_of(self.manifest, self.task(name))

    def open_shared(self) -> SharedFile | None:
        """Open what all tasks share after checking its checksum; None if they share nothing.

        Raises:
            PackError: if the file is missing, damaged, or does not fit its record.
        """
        faults = Faults()
        self.check_shared(faults)
        faults.raise_if_any(PackError)
        record = self.manifest.shared
        return None if record is None else SharedFile(self.directory / record.file, record)

    def check_shared(self, faults: Faults) -> None:
        """Add a fault if the file that all tasks share is missing or has another checksum."""
        self._check_file(self.manifest.shared, "which all tasks need", faults)

    def read_router(self) -> dict[str, Float[Tensor, "example dim"]]:
        """Task to the features of its examples, after checking the file's checksum.

        Raises:
            PackError: if there is no router, or its file is missing, damaged, or does not fit its
                record.
        """
        record = self.manifest.router
        if record is None:
            raise PackError(
                f"{self.directory} has no router, which says of a sample which tasks it is of. Fit "
                "one on a few examples of each task: fit_router of a loaded pack."
            )
        faults = Faults()
        self._check_file(record, "which the router needs", faults)
        faults.raise_if_any(PackError)
        return read_router(self.directory / record.file, record)

    def check_router(self, faults: Faults) -> None:
        """Add a fault if there is a router that cannot be read; see `read_router`."""
        if self.manifest.router is not None:
            try:
                self.read_router()
            except PackError as error:
                faults.take(error)

    def check_task(self, name: str, faults: Faults) -> None:
        """Add a fault for each file of a task that is missing or does not have its checksum."""
        record = self.task(name)
        files: dict[str, tuple[str, int | None]] = {record.file: (record.sha256, record.bytes)}
        for relative, auxiliary_file in record.companions.items():
            if auxiliary_file.stored_in == "task":
                files[f"{TASKS}/{name}/{relative}"] = (auxiliary_file.sha256, None)
        for relative, (expected, nbytes) in files.items():
            try:
                path = own_path(self.directory, relative)
            except PackError as error:
                faults.take(error)
                continue
            if not path.is_file():
                faults.add(f"Task '{name}': {path} is missing. Restore it or pack the task again.")
            elif nbytes not in (None, path.stat().st_size) or sha256_file(path) != expected:
                faults.add(
                    f"Task '{name}': {path} is damaged: its SHA-256 is not the one in pack.json. "
                    "Restore it or pack the task again."
                )

    def _check_file(
        self, record: SharedRecord | RouterRecord | None, whose: str, faults: Faults
    ) -> None:
        """Add a fault if a file beside the tasks' is missing or has another checksum."""
        if record is None:
            return
        try:
            path = own_path(self.directory, record.file)
        except PackError as error:
            faults.take(error)
            return
        if not path.is_file():
            faults.add(f"{path}, {whose}, is missing. Restore it from a copy.")
        elif path.stat().st_size != record.bytes or sha256_file(path) != record.sha256:
            faults.add(
                f"{path} is damaged: its SHA-256 is not the one in pack.json. "
                "Restore it from a copy."
            )

    def auxiliary_file(self, task: str, relative: str) -> Path:
        """Where an auxiliary file that the task stores itself lies."""
        return self.directory / TASKS / task / relative

    def reference_source(self, base: Any = None) -> Any:
        """Where the reference is: as told, in the pack, or as recorded, at its hub commit."""
        record = self.manifest.reference
        if base is not None:
            return base
        if self.reference_directory is not None:
            return self.reference_directory
        if record.revision:
            return f"{record.source.split('@')[0]}@{record.revision}"
        return record.source

    @property
    def reference_directory(self) -> Path | None:
        """The merged reference inside the pack; None if the reference is the base, elsewhere.

        Raises:
            PackError: if there is a link in it.
        """
        if self.manifest.reference.kind == "base":
            return None
        folder = own_path(self.directory, REFERENCE)
        for place in folder.rglob("*"):
            own_path(folder, place.relative_to(folder).as_posix())
        return folder
