"""Base and experts, aligned by name: what is shared, what is private, what is missing.

Everything here is decided from headers. Names are matched as they are or, if more then agree,
without wrappers (`module.`, `_orig_mod.`), with one prefix where a task model wraps the backbone
(`bert.`, `transformer.`), and across versions of torch and transformers (see `renames`).
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal

from personae._types import TensorSpec
from personae.checkpoints._protocol import Checkpoint
from personae.checkpoints.naming import Renaming, find_names, left_out, matches
from personae.checkpoints.published_renames import published_renames
from personae.checkpoints.renames import canonical
from personae.checkpoints.tied import each_once_beside
from personae.errors import CheckpointError, Faults
from personae.family.alignment import Alignment
from personae.family.misfits import check_fit, is_passed_over

Kind = Literal["shared", "grown", "buffer", "private", "skipped"]

# Of batch normalisation: estimates of the data, no weights; a variance off by a little ruins it.
_STATISTICS = re.compile(r"(^|\.)running_(mean|var)$")
_VOCABULARY = re.compile(r"embed|wte|wpe|lm_head|shared\.weight|decoder\.weight")


def align(
    reference: Checkpoint,
    experts: Mapping[str, Checkpoint],
    *,
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
    private: Sequence[str] = (),
    spared: Collection[str] = (),
    lenient: bool = False,
    may_lack_parts: bool = False,
    faults: Faults | None = None,
) -> dict[str, Alignment]:
    """Match every expert with the reference, by names and shapes from headers.

    Args:
        reference: What deltas are taken from (base or merged model).
        experts: Task name to checkpoint.
        skip: Patterns of reference or expert names to leave as in the reference.
        only: If any, all that fits none of these patterns is left likewise.
        private: Patterns of names to keep whole although they could be coded.
        spared: Reference names that `skip` leaves out only where they are of another shape.
        lenient: Whether an expert may lack tensors of the reference.
        may_lack_parts: Whether it may lack whole parts of it, such as a language model's head.
        faults: If given, faults are added to it instead of raised.

    Raises:
        CheckpointError: naming, for every expert at once, tensors it lacks, and experts that are
            the reference itself or do not fit it.
    """
    found_here = Faults() if faults is None else faults

    def may_lack(name: str) -> bool:
        return lenient or matches(name, private) or left_out([name], skip, only)

    aligned: dict[str, Alignment] = {}
    for name, checkpoint in experts.items():
        if _same_place(reference, checkpoint):
            found_here.add(
                f"Expert '{name}' is the base itself ({checkpoint.source}). "
                "Give the fine-tuned checkpoint."
            )
            continue
        found = _align_one(name, reference, checkpoint, skip, only, private, spared)
        if found.shared or not (only and found.skipped):  # else 'only' leaves nothing to fit
            check_fit(found, reference, may_lack, found_here, may_lack_parts=may_lack_parts)
        aligned[name] = found
    if faults is None:
        found_here.raise_if_any(CheckpointError)
    return aligned


def lacked_by_some(reference: Checkpoint, aligned: Mapping[str, Alignment]) -> set[str]:
    """What `skip` leaves out of every expert although only some lack it, or have another shape.

    Buffers that loaders pass over do not count: nothing is trained there.

    Args:
        reference: What the experts were aligned with.
        aligned: The experts, with `skip` for all.

    Returns:
        Reference names that the other experts have in the reference's shape.
    """
    lacked, had = set[str](), set[str]()
    for expert in aligned.values():
        lacked.update(n for n in expert.absent if expert.renaming.expert_name(n) not in expert.tied)
        for name in expert.skipped:
            spec, own = reference.specs[name], expert.spec(name)
            fits = spec.shape == own.shape and spec.is_floating and own.is_floating
            (had if fits and not is_passed_over(spec) else lacked).add(name)
    return lacked & had


def _align_one(
    name: str,
    reference: Checkpoint,
    expert: Checkpoint,
    skip: Sequence[str],
    only: Sequence[str],
    private_patterns: Sequence[str],
    spared: Collection[str],
) -> Alignment:
    plain, renaming = _names(reference, expert)
    known = {renaming.expert_name(name): name for name in (*reference.tied, *reference.specs)}
    expert = each_once_beside(expert, reference, lambda raw: known.get(plain(raw), ""))
    raw_of = {plain(raw): raw for raw in expert.specs}
    ties = {plain(dropped): plain(kept) for dropped, kept in expert.tied.items()}
    own_name = _match(reference, raw_of, ties, renaming)
    matched = set(own_name.values())
    files: dict[str, str] = {}
    private = {
        name: raw
        for name, raw in raw_of.items()
        if name not in matched and not left_out([name], skip, only)
    }
    names: dict[Kind, list[str]] = {"shared": [], "grown": [], "buffer": [], "skipped": []}
    for ref_name, found in own_name.items():
        expert_name, own = renaming.expert_name(ref_name), expert.specs[raw_of[found]]
        called = (ref_name, expert_name, found)
        fits = ref_name in spared and own.shape == reference.specs[ref_name].shape
        if left_out(called, () if fits else skip, only):
            kind = "skipped"
        else:
            kind = _kind(reference.specs[ref_name], own, called, private_patterns)
        if kind == "private":
            private[expert_name] = own.name
        else:
            names[kind].append(ref_name)
            files[ref_name] = own.name
    moved = {found: renaming.expert_name(ref_name) for ref_name, found in own_name.items()}
    absent = tuple(name for name in reference.specs if name not in own_name)
    copies = [name for name in reference.copies if renaming.expert_name(name) not in private]
    if not (absent or private or renaming.add or renaming.strip):  # a model of the same class
        ties = {name: reference.tied[name] for name in copies} | ties
    return Alignment(
        name=name,
        checkpoint=expert,
        files=files,
        private_files=dict(sorted(private.items())),
        shared=tuple(sorted(names["shared"] + names["grown"])),
        grown=tuple(names["grown"]),
        buffers=tuple(names["buffer"]),
        absent=absent,
        copies=tuple(sorted(copies)),
        skipped=tuple(names["skipped"]),
        spared=tuple(name for name in files if name in spared and name not in names["skipped"]),
        tied=_ties(ties, moved, {renaming.expert_name(name) for name in files} | private.keys()),
        renaming=renaming,
    )


def _names(reference: Checkpoint, expert: Checkpoint) -> tuple[Callable[[str], str], Renaming]:
    """How the expert's names are to be read; see `find_names`.

    The published renames take seconds to import: they are asked only where a tensor that is left
    on the one side looks like one that is left on the other.
    """
    plain, renaming = find_names(reference.specs, expert.specs)
    own = {plain(raw): spec for raw, spec in expert.specs.items()}
    wanted = {renaming.expert_name(name): spec for name, spec in reference.specs.items()}
    looks = [
        {(spec.shape, name.rpartition(".")[2]) for name, spec in one.items() if name not in other}
        for one, other in ((own, wanted), (wanted, own))
    ]
    if looks[0].isdisjoint(looks[1]):
        return plain, renaming
    renames = published_renames(reference, expert)
    return find_names(reference.specs, expert.specs, (canonical, *renames))


def _match(
    reference: Checkpoint, own: Collection[str], ties: Mapping[str, str], renaming: Renaming
) -> dict[str, str]:
    """Reference name to the expert's, of all that both have.

    A tensor that expert or reference tie to another one may be there under that one's name alone.
    """
    wanted = {name: renaming.expert_name(name) for name in reference.specs}
    taken = set(wanted.values())
    found: dict[str, str] = {}
    for name, expert_name in wanted.items():
        twins = [dropped for dropped in sorted(reference.copies) if reference.tied[dropped] == name]
        others = [ties.get(expert_name, expert_name), *map(renaming.expert_name, twins)]
        kept = next((other for other in others if other in own and other not in taken), None)
        if expert_name in own:
            found[name] = expert_name
        elif kept is not None:
            found[name] = kept
            taken.add(kept)
    return found


def _ties(
    ties: Mapping[str, str], moved: Mapping[str, str], rebuilt: Collection[str]
) -> dict[str, str]:
    """Ties under the names of rebuilt tensors, where the kept one will be and the other not."""
    renamed = {dropped: moved.get(kept, kept) for dropped, kept in ties.items()} | dict(moved)
    return {d: kept for d, kept in renamed.items() if kept in rebuilt and d not in rebuilt}


def _kind(
    spec: TensorSpec,
    own: TensorSpec,
    names: Sequence[str],
    private: Sequence[str],
) -> Kind:
    """What becomes of a tensor that both have, as `spec` and `own`, under these names."""
    if any(matches(name, private) for name in names) or spec.is_floating != own.is_floating:
        return "private"
    if spec.shape == own.shape:
        is_coded = spec.is_floating and not _STATISTICS.search(spec.name)
        return "shared" if is_coded else "buffer"
    return "grown" if _is_grown(spec, own) else "private"


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
