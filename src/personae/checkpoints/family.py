"""Base and experts, aligned by name: what is shared, what is private, what is missing.

Everything here is decided from headers. Names are matched after removing wrappers (`module.`,
`_orig_mod.`) and, where a task model wraps the backbone, one prefix (`bert.`, `transformer.`).
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from personae._types import TensorSpec
from personae.checkpoints._protocol import Checkpoint
from personae.errors import CheckpointError, Faults

_WRAPPERS = ("module", "_orig_mod")
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_VOCABULARY = re.compile(r"embed|wte|wpe|lm_head|shared\.weight|decoder\.weight")
_MOST_SHOWN = 5


@dataclass(frozen=True)
class Renaming:
    """How reference names become the expert's: one prefix added or removed.

    Attributes:
        add: Prefix put before a reference name.
        strip: Prefix removed from a reference name.
        plain: Reference names the rule does not apply to; the expert uses them as they are.
        wrapper: Wrapper segments found in the expert's file and left out for good.
    """

    add: str = ""
    strip: str = ""
    plain: frozenset[str] = frozenset()
    wrapper: str = ""

    def expert_name(self, reference_name: str) -> str:
        """The expert's name (without wrapper) of a reference tensor."""
        if reference_name in self.plain:
            return reference_name
        return self.add + reference_name.removeprefix(self.strip)


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


def shown(names: Sequence[str]) -> str:
    """The first few names of a list, and how many there are in all."""
    listed = ", ".join(names[:_MOST_SHOWN])
    rest = len(names) - _MOST_SHOWN
    return f"{listed} and {rest} more" if rest > 0 else listed


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a tensor name fits one of the shell-style patterns (`*` also spans dots)."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def is_safe_name(name: str) -> bool:
    """Whether a task name is a file name on every system, apart from the task file of another."""
    return bool(_SAFE_NAME.fullmatch(name)) and not name.endswith((".", ".safetensors"))


def check_names(names: Iterable[str], faults: Faults) -> None:
    """Add a fault for each task name that is taken twice or unsafe as a file name somewhere."""
    seen = set[str]()
    for name in names:
        if not is_safe_name(name):
            faults.add(
                f"'{name}' is no safe file name for a task. Use letters, digits, '.', '_' and '-', "
                "beginning with a letter or digit, at most 100 characters."
            )
        if name.lower() in seen:
            faults.add(
                f"Two experts are named '{name}' (case is ignored). Give each its own name: "
                "--expert NAME=PATH."
            )
        seen.add(name.lower())


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
    plain_of, wrapper = _without_wrappers(expert.specs)
    by_name = {plain: raw for raw, plain in plain_of.items()}
    renaming = _renaming(reference.specs, by_name, wrapper)
    files: dict[str, str] = {}
    shared: list[str] = []
    grown: list[str] = []
    buffers: list[str] = []
    absent: list[str] = []
    skipped: list[str] = []
    private: list[str] = []
    for ref_name, spec in reference.specs.items():
        expert_name = renaming.expert_name(ref_name)
        if expert_name not in by_name:
            absent.append(ref_name)
            continue
        own = expert.specs[by_name.pop(expert_name)]
        files[ref_name] = own.name
        if matches(ref_name, skip) or matches(expert_name, skip):
            skipped.append(ref_name)
        elif matches(ref_name, private_patterns) or matches(expert_name, private_patterns):
            private.append(expert_name)
        elif not spec.is_floating and not own.is_floating and spec.shape == own.shape:
            buffers.append(ref_name)
        elif spec.is_floating and own.is_floating and spec.shape == own.shape:
            shared.append(ref_name)
        elif _is_grown(spec, own):
            shared.append(ref_name)
            grown.append(ref_name)
        else:
            private.append(expert_name)
        if private and private[-1] == expert_name:
            files[expert_name] = files.pop(ref_name)
    for expert_name, raw in by_name.items():
        if not matches(expert_name, skip):
            private.append(expert_name)
            files[expert_name] = raw
    return Alignment(
        name=name,
        checkpoint=expert,
        files=files,
        shared=tuple(sorted(shared)),
        grown=tuple(grown),
        buffers=tuple(buffers),
        private=tuple(sorted(private)),
        absent=tuple(absent),
        skipped=tuple(skipped),
        tied={_without(dropped): plain_of[kept] for dropped, kept in expert.tied.items()},
        renaming=renaming,
    )


def _check(found: Alignment, reference: Checkpoint, allowed: Sequence[str], faults: Faults) -> None:
    if not found.shared:
        faults.add(
            f"Expert '{found.name}' ({found.checkpoint.source}) shares no tensor with the base "
            f"({reference.source}). Was it fine-tuned from it?"
        )
        return
    lacking = [
        n for n in found.absent if reference.specs[n].is_floating and not matches(n, allowed)
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


def _without_wrappers(names: Iterable[str]) -> tuple[dict[str, str], str]:
    """Raw name to name without wrapper segments, and which wrapper was found."""
    names = list(names)
    plain = {name: _without(name) for name in names}
    found = {s for name in names for n, s in enumerate(name.split(".")) if _is_wrapper(s, n)}
    if len(set(plain.values())) < len(names):  # removing would merge two tensors: leave names alone
        return {name: name for name in names}, ""
    return plain, ".".join(w for w in _WRAPPERS if w in found)


def _without(name: str) -> str:
    return ".".join(s for n, s in enumerate(name.split(".")) if not _is_wrapper(s, n))


def _is_wrapper(segment: str, position: int) -> bool:
    # torch.compile may wrap any submodule; DataParallel only the root.
    return segment == "_orig_mod" or (segment == "module" and position <= 1)


def _renaming(
    reference: Mapping[str, TensorSpec], expert: Mapping[str, str], wrapper: str
) -> Renaming:
    """The one prefix that makes most names agree; none if names agree as they are."""
    adds, strips = Counter[str](), Counter[str]()
    for long_names, short_names, counter in (
        (expert, reference, adds),
        (reference, expert, strips),
    ):
        for name in long_names:
            segments = name.split(".")
            for cut in range(1, min(3, len(segments) - 1) + 1):
                if ".".join(segments[cut:]) in short_names:
                    counter[".".join(segments[:cut]) + "."] += 1
    as_is = sum(name in expert for name in reference)
    best_add = max(adds.items(), key=lambda item: (item[1], item[0]), default=("", 0))
    best_strip = max(strips.items(), key=lambda item: (item[1], item[0]), default=("", 0))
    add = strip = ""
    if best_add[1] > max(as_is, best_strip[1]):
        add = best_add[0]
    elif best_strip[1] > as_is:
        strip = best_strip[0]
    rule = Renaming(add=add, strip=strip)
    plain = frozenset(
        name for name in reference if rule.expert_name(name) not in expert and name in expert
    )
    return Renaming(add=add, strip=strip, plain=plain, wrapper=wrapper)
