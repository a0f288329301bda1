"""One expert matched with a reference: what is shared, kept whole, skipped, absent."""

from collections.abc import Mapping
from dataclasses import dataclass

from personae._types import TensorSpec
from personae.checkpoints._protocol import Checkpoint
from personae.checkpoints.adapter import seen_through
from personae.checkpoints.adapter_laid_out import AdapterLaidOut
from personae.checkpoints.laid_out import LaidOut
from personae.checkpoints.naming import Renaming, shown, without_wrapper


@dataclass(frozen=True)
class Alignment:
    """One expert against the reference.

    Attributes:
        name: The task's name.
        checkpoint: The expert.
        files: Reference name to the name in the expert's own file, of all that both have and is
            not private.
        private_files: Expert name (without wrapper) to the name in its own file, of tensors kept
            whole, in sorted order. Apart from `files`: an expert's own tensor may be called like
            another one of the reference.
        shared: Reference names of floating tensors to be coded, in sorted order.
        grown: Those of `shared` of which the expert has more rows (a grown vocabulary).
        buffers: Reference names of tensors both have and no arithmetic suits: integers, and the
            running statistics of batch normalisation.
        absent: Reference names the expert lacks (skipped, integer, or tied to one it has).
        copies: Reference names of stored copies (`Checkpoint.copies`) that are not the expert's
            own either: each equals what it is a copy of, or is not there.
        skipped: Reference names left as in the reference on request.
        spared: Reference names taken although `skip` fits them, as other experts lack them.
        tied: Dropped name to kept name, without wrappers, where the kept one is in the pack.
        renaming: The rule from reference names to expert names.
    """

    name: str
    checkpoint: Checkpoint
    files: Mapping[str, str]
    private_files: Mapping[str, str]
    shared: tuple[str, ...]
    grown: tuple[str, ...]
    buffers: tuple[str, ...]
    absent: tuple[str, ...]
    copies: tuple[str, ...]
    skipped: tuple[str, ...]
    spared: tuple[str, ...]
    tied: Mapping[str, str]
    renaming: Renaming

    @property
    def private(self) -> tuple[str, ...]:
        """Expert names (without wrapper) of tensors kept whole."""
        return tuple(self.private_files)

    @property
    def taken(self) -> dict[str, str | None]:
        """All that a pack takes, neither skipped nor absent: own file name to reference name.

        The reference name is None where the tensor is private.
        """
        answering = {self.files[name]: name for name in (*self.shared, *self.buffers)}
        return answering | dict.fromkeys(self.private_files.values())

    def spec(self, name: str) -> TensorSpec:
        """What the expert's header says of the tensor that answers to this reference name."""
        return self.checkpoint.specs[self.files[name]]

    def private_spec(self, name: str) -> TensorSpec:
        """What the expert's header says of the private tensor of this expert name."""
        return self.checkpoint.specs[self.private_files[name]]

    @property
    def stored_again(self) -> set[str]:
        """Names of `tied` under which the tensor is stored again, as in the reference."""
        return {self.renaming.expert_name(name) for name in self.copies} & self.tied.keys()

    @property
    def own_specs(self) -> dict[str, TensorSpec]:
        """What the expert has, but for what only it has and is left out, by its own names."""
        kept = {self.renaming.expert_name(name): self.spec(name) for name in self.files}
        return kept | {name: self.private_spec(name) for name in self.private}

    def rebuilt_specs(self, reference: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        """The same with what is left as in the reference: what is written when the expert is."""
        left = {self.renaming.expert_name(name): reference[name] for name in self.skipped}
        return self.own_specs | left

    @property
    def notes(self) -> list[str]:
        """What a person who packs should be told about this alignment, a line each."""
        notes = self.naming_notes
        if self.spared:
            notes.append(
                f"{self.name}: coded although 'skip' matches them, because only other experts "
                f"lack them: {shown(self.spared)}"
            )
        if self.private:
            size = sum(self.private_spec(n).nbytes for n in self.private)
            listed = shown(self.private)
            notes.append(f"{self.name}: kept whole as private ({size:,} bytes): {listed}")
        if self.grown:
            notes.append(f"{self.name}: extra rows kept whole as private: {shown(self.grown)}")
        return notes

    @property
    def kept_bytes(self) -> int:
        """Memory that a thread which reads the expert holds beside what it reads."""
        stored = seen_through(self.checkpoint)
        return stored.kept_bytes if isinstance(stored, LaidOut | AdapterLaidOut) else 0

    @property
    def naming_notes(self) -> list[str]:
        """How the expert's names were matched, where they are not the reference's."""
        notes: list[str] = []
        rule = self.renaming
        if rule.wrapper:
            notes.append(f"{self.name}: wrapper '{rule.wrapper}.' removed from tensor names")
        if rule.add and rule.strip:
            notes.append(
                f"{self.name}: has '{rule.add}' where the base's names have '{rule.strip}'"
            )
        elif rule.add or rule.strip:
            verb, prefix = ("adds", rule.add) if rule.add else ("lacks", rule.strip)
            notes.append(f"{self.name}: {verb} the prefix '{prefix}' to the base's tensor names")
        if isinstance(stored := seen_through(self.checkpoint), LaidOut | AdapterLaidOut):
            notes.append(f"{self.name}: {stored.note}")
        given = [
            f"{own} as {new}"
            for name, own in self.files.items()
            if without_wrapper(own) != (new := rule.expert_name(name)) != own
        ]
        if given:
            notes.append(f"{self.name}: stored under the base's names: {shown(given)}")
        return notes
