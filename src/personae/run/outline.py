"""What a checkpoint made of a reference and one task's head is like: names, dtypes, small files."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from personae._types import TensorSpec
from personae.checkpoints import Checkpoint, open_checkpoint
from personae.checkpoints.tied import as_stored, copies_written
from personae.errors import PackError
from personae.family.align import align
from personae.family.small_files import small_files
from personae.packs.fingerprint import sha256_file
from personae.packs.reader import Pack
from personae.run.rebuilt import Rebuilt


@dataclass(frozen=True)
class Outline:
    """The tensors and files of a checkpoint whose shared tensors come from elsewhere.

    Attributes:
        specs: Name to spec of every tensor.
        reference_names: Name to the reference's, of those the reference has.
        grown: Names of those to which `whole` adds rows.
        whole: Reads what the reference has not: a tensor, or the rows added to one, by name.
        tied: Dropped name to the kept name of the tensor it shares.
        copies: Those of them under which the tensor is written again, each with its dtype.
        auxiliary_files: Finds the small files (configuration, tokenizer), by relative name.
        close: Releases files opened for it.
    """

    specs: Mapping[str, TensorSpec]
    reference_names: Mapping[str, str]
    grown: frozenset[str]
    whole: Callable[[str], Tensor]
    tied: Mapping[str, str]
    copies: Mapping[str, torch.dtype]
    auxiliary_files: Callable[[], Mapping[str, Path | bytes]]
    close: Callable[[], None] = lambda: None

    @property
    def kept(self) -> set[str]:
        """Names of which `whole` reads all or part."""
        return (self.specs.keys() - self.reference_names.keys()) | self.grown


def of_reference(reference: Checkpoint) -> Outline:
    """The reference's own names and files: no head but what it has itself."""

    def none(name: str) -> Tensor:
        raise AssertionError(f"the reference has '{name}'")

    return Outline(
        specs=reference.specs,
        reference_names={name: name for name in reference.specs},
        grown=frozenset(),
        whole=none,
        tied=reference.tied,
        copies=reference.copies,
        auxiliary_files=lambda: reference.auxiliary_files,
    )


def of_task(pack: Pack, rebuilt: Rebuilt, task: str) -> Outline:
    """A packed task's names and files, with all that its pack keeps whole: head, grown rows."""
    grown = {name for name, ref in rebuilt.reference_names.items() if ref in rebuilt.record.grown}
    return Outline(
        specs=rebuilt.specs,
        reference_names=rebuilt.reference_names,
        grown=frozenset(grown),
        whole=rebuilt.private,
        tied=rebuilt.record.tied,
        copies=rebuilt.copies,
        auxiliary_files=lambda: auxiliary_files_of(pack, task, rebuilt.reference),
    )


def auxiliary_files_of(pack: Pack, task: str, reference: Checkpoint) -> dict[str, Path]:
    """The expert's small files, where they are.

    Raises:
        PackError: if one of the reference's is not what it was.
    """
    found: dict[str, Path] = {}
    for relative, auxiliary_file in pack.task(task).companions.items():
        source = (
            pack.auxiliary_file(task, relative)
            if auxiliary_file.stored_in == "task"
            else reference.auxiliary_files.get(relative)
        )
        if source is None and not reference.auxiliary_files:
            continue  # bare weights were given this time: the caller has no such files to copy
        if source is None:
            raise PackError(
                f"{reference.source} has no '{relative}', which '{task}' shares with it. "
                "Restore it, or give a complete copy with --base."
            )
        if sha256_file(source) != auxiliary_file.sha256:
            raise PackError(
                f"{source} is not the one that '{task}' was packed with: it changed since. "
                "Restore it, or give an unchanged copy with --base."
            )
        found[relative] = source
    return found


def of_checkpoint(
    reference: Checkpoint, source: Any, skip: tuple[str, ...] = (), private: tuple[str, ...] = ()
) -> Outline:
    """The names and files of a checkpoint of the same architecture, with what only it has.

    Args:
        reference: What the shared tensors are called after.
        source: Path, hub id, module or mapping; its own shared tensors are not read.
        skip: Patterns of names to take from the reference whatever the checkpoint has.
        private: Patterns of names to take from the checkpoint although the reference has them.

    Raises:
        CheckpointError: if it cannot be read, or does not fit the reference.
    """
    checkpoint = open_checkpoint(source, base=reference)
    aligned = align(
        reference, {"head": checkpoint}, skip=skip, private=private, may_lack_parts=True
    )
    found = aligned["head"]
    names = {found.renaming.expert_name(ref): ref for ref in (*found.files, *found.skipped)}
    grown = {name: ref for name, ref in names.items() if ref in found.grown}
    specs = {name: _named(name, reference.specs[ref]) for name, ref in names.items()}
    for name, ref in grown.items():
        specs[name] = TensorSpec(name, found.spec(ref).shape, specs[name].dtype)
    for name in found.private:
        specs[name] = _named(name, found.private_spec(name))

    again = {found.renaming.expert_name(ref): ref for ref in found.copies}

    def whole(name: str) -> Tensor:
        if name in grown:
            start, own = reference.specs[grown[name]].shape[0], found.spec(grown[name])
            return checkpoint.read_rows(own.name, start, own.shape[0])
        return checkpoint.read(found.private_files[name])

    return Outline(
        specs=specs,
        reference_names=names,
        grown=frozenset(grown),
        whole=whole,
        tied=found.tied,
        copies=copies_written(found.tied, specs, names | again, as_stored(reference).specs),
        auxiliary_files=lambda: {
            **reference.auxiliary_files,
            **small_files(found, reference, specs)[0],
        },
        close=checkpoint.close,
    )


def _named(name: str, spec: TensorSpec) -> TensorSpec:
    return TensorSpec(name, spec.shape, spec.dtype)
