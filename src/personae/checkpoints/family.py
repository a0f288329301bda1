"""Base and experts, aligned by name: what is shared, what is private, what is missing.

Everything here is decided from headers. Names are matched after removing wrappers (`module.`,
`_orig_mod.`) and, where a task model wraps the backbone, one prefix (`bert.`, `transformer.`).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from personae._types import TensorSpec
from personae.checkpoints._protocol import Checkpoint
from personae.checkpoints.naming import (
    Renaming,
    find_renaming,
    matches,
    shown,
    without_wrapper,
    without_wrappers,
)
from personae.errors import CheckpointError, Faults

Kind = Literal["shared", "grown", "buffer", "private", "skipped"]

_VOCABULARY = re.compile(r"embed|wte|wpe|lm_head|shared\.weight|decoder\.weight")
# Causal masks that old GPT-2 checkpoints hold as parameters; newer ones leave them out.
_MASK = re.compile(r"\.attn\.(bias|masked_bias)$")


@dataclass(frozen=True)
class Alignment:
    """One expert against the reference.

    Attributes:
        name: The task's name.
        checkpoint: The expert.
        files: Reference or private name to the name in the expert's own file.
        shared: Reference names of floating tensors to be coded, in sorted order.
        grown: Those of `shared` of which the expert has more rows (a grown vocabulary).
        buffers: Reference names of integer tensors both have.
        private: Expert names (without wrapper) of tensors kept whole.
        absent: Reference names the expert lacks (skipped or integer).
        skipped: Reference names left as in the reference on request.
        tied: Dropped name to kept name, without wrappers.
        renaming: The rule from reference names to expert names.
    """

    name: str
    checkpoint: Checkpoint
    files: Mapping[str, str]
    shared: tuple[str, ...]
    grown: tuple[str, ...]
    buffers: tuple[str, ...]
    private: tuple[str, ...]
    absent: tuple[str, ...]
    skipped: tuple[str, ...]
    tied: Mapping[str, str]
    renaming: Renaming

    def spec(self, name: str) -> TensorSpec:
        """What the expert's header says of a shared, buffer (reference name) or private tensor."""
        return self.checkpoint.specs[self.files[name]]

    @property
    def taken(self) -> tuple[str, ...]:
        """Names of all that a pack takes from the expert: neither skipped nor absent."""
        return (*self.shared, *self.buffers, *self.private)

    @property
    def notes(self) -> list[str]:
        """What a person should be told about this alignment, a line each."""
        notes: list[str] = []
        rule = self.renaming
        if rule.wrapper:
            notes.append(f"{self.name}: wrapper '{rule.wrapper}.' removed from tensor names")
        if rule.add or rule.strip:
            verb, prefix = ("adds", rule.add) if rule.add else ("lacks", rule.strip)
            notes.append(f"{self.name}: {verb} the prefix '{prefix}' to the base's tensor names")
        if self.private:
            size = sum(self.spec(n).nbytes for n in self.private)
            listed = shown(self.private)
            notes.append(f"{self.name}: kept whole as private ({size:,} bytes): {listed}")
        if self.grown:
            notes.append(f"{self.name}: extra rows kept whole as private: {shown(self.grown)}")
        return notes


def align(
    reference: Checkpoint,
    experts: Mapping[str, Checkpoint],
    *,
    skip: Sequence[str] = (),
    private: Sequence[str] = (),
) -> dict[str, Alignment]:
    """Match every expert with the reference, by names and shapes from headers.

    Args:
        reference: What deltas are taken from (base or merged model).
        experts: Task name to checkpoint.
        skip: Patterns of reference or expert names to leave out of the pack.
        private: Patterns of names to keep whole although they could be coded.

    Raises:
        CheckpointError: naming, for every expert at once, tensors it lacks, and experts that are
            the reference itself or do not fit it.
    """
    faults = Faults()
    aligned: dict[str, Alignment] = {}
    for name, checkpoint in experts.items():
        if _same_place(reference, checkpoint):
            faults.add(
                f"Expert '{name}' is the base itself ({checkpoint.source}). "
                "Give the fine-tuned checkpoint."
            )
            continue
        found = _align_one(name, reference, checkpoint, skip, private)
        _check(found, reference, (*skip, *private), faults)
        aligned[name] = found
    faults.raise_if_any(CheckpointError)
    return aligned


def _align_one(
    name: str,
    reference: Checkpoint,
    expert: Checkpoint,
    skip: Sequence[str],
    private_patterns: Sequence[str],
) -> Alignment:
    plain_of, wrapper = without_wrappers(expert.specs)
    unmatched = {plain: raw for raw, plain in plain_of.items()}
    renaming = find_renaming(reference.specs, unmatched, wrapper)
    files: dict[str, str] = {}
    absent: list[str] = []
    kinds: dict[Kind, list[str]] = {
        "shared": [],
        "grown": [],
        "buffer": [],
        "private": [],
        "skipped": [],
    }
    for ref_name, spec in reference.specs.items():
        expert_name = renaming.expert_name(ref_name)
        if expert_name not in unmatched:
            absent.append(ref_name)
            continue
        own = expert.specs[unmatched.pop(expert_name)]
        kind = _kind(spec, own, (ref_name, expert_name), skip, private_patterns)
        key = expert_name if kind == "private" else ref_name
        kinds[kind].append(key)
        files[key] = own.name
    for expert_name, raw in unmatched.items():
        if not matches(expert_name, skip):
            kinds["private"].append(expert_name)
            files[expert_name] = raw
    return Alignment(
        name=name,
        checkpoint=expert,
        files=files,
        shared=tuple(sorted(kinds["shared"] + kinds["grown"])),
        grown=tuple(kinds["grown"]),
        buffers=tuple(kinds["buffer"]),
        private=tuple(sorted(kinds["private"])),
        absent=tuple(absent),
        skipped=tuple(kinds["skipped"]),
        tied={without_wrapper(dropped): plain_of[kept] for dropped, kept in expert.tied.items()},
        renaming=renaming,
    )


def _kind(
    spec: TensorSpec,
    own: TensorSpec,
    names: tuple[str, str],
    skip: Sequence[str],
    private: Sequence[str],
) -> Kind:
    """What becomes of a tensor that both have, as `spec` and `own`, under two names."""
    if any(matches(name, skip) for name in names):
        return "skipped"
    if any(matches(name, private) for name in names) or spec.is_floating != own.is_floating:
        return "private"
    if spec.shape == own.shape:
        return "shared" if spec.is_floating else "buffer"
    return "grown" if _is_grown(spec, own) else "private"


def _check(found: Alignment, reference: Checkpoint, allowed: Sequence[str], faults: Faults) -> None:
    if not found.shared:
        faults.add(
            f"Expert '{found.name}' ({found.checkpoint.source}) shares no tensor with the base "
            f"({reference.source}) that 'skip' and 'private' leave to code. Was it fine-tuned "
            "from it?"
        )
        return
    lacking = [
        n
        for n in found.absent
        if reference.specs[n].is_floating and not matches(n, allowed) and not _is_mask(reference, n)
    ]
    if lacking:
        first = reference.specs[lacking[0]]
        faults.add(
            f"Expert '{found.name}' lacks {len(lacking)} tensor(s) of the base: {shown(lacking)} "
            f"(base: '{first.name}' of shape {first.shape}). Was '{found.name}' fine-tuned from "
            "the base? To leave them out, add them to 'skip'."
        )
    odd = [
        n for n in found.private if not matches(n, allowed) and _reference_name(n, found, reference)
    ]
    coded = sum(reference.specs[n].numel for n in found.shared)
    if sum(found.spec(n).numel for n in odd) > coded:
        n = odd[0]
        faults.add(
            f"Expert '{found.name}': the shapes of {len(odd)} tensors disagree with the base, "
            f"more than half of the model: '{n}' is {found.spec(n).shape}, the base has "
            f"{reference.specs[_reference_name(n, found, reference)].shape}. "
            "Give the base it was fine-tuned from, or name them in 'private' to keep them whole."
        )


def _reference_name(expert_name: str, found: Alignment, reference: Checkpoint) -> str:
    """The reference tensor a private tensor answers to, or '' if only the expert has it."""
    rule = found.renaming
    for name in (expert_name.removeprefix(rule.add), rule.strip + expert_name, expert_name):
        if name in reference.specs and rule.expert_name(name) == expert_name:
            return name
    return ""


def _is_mask(reference: Checkpoint, name: str) -> bool:
    return _MASK.search(name) is not None and len(reference.specs[name].shape) in (0, 4)


def _is_grown(spec: TensorSpec, own: TensorSpec) -> bool:
    """A vocabulary matrix with more rows than the reference's, as when tokens were added.

    Told by name: a classifier with more rows is another task's head, not the same rows and more.
    """
    return (
        spec.is_floating
        and own.is_floating
        and len(spec.shape) == len(own.shape) == 2
        and spec.shape[1] == own.shape[1]
        and own.shape[0] > spec.shape[0] > 0
        and _VOCABULARY.search(own.name) is not None
    )


def _same_place(reference: Checkpoint, expert: Checkpoint) -> bool:
    if reference is expert:
        return True
    a, b = Path(reference.source), Path(expert.source)
    return a.exists() and b.exists() and a.resolve() == b.resolve()
