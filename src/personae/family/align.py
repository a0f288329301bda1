"""Base and experts, aligned by name: what is shared, what is private, what is missing.

Everything here is decided from headers. Names are matched as they are or, if more then agree,
without wrappers (`module.`, `_orig_mod.`), with one prefix where a task model wraps the backbone
(`bert.`, `transformer.`), and across versions of torch and transformers (see `renames`).
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from personae._types import TensorSpec
from personae.checkpoints._protocol import Checkpoint
from personae.checkpoints.laid_out import LaidOut
from personae.checkpoints.naming import (
    Renaming,
    find_names,
    left_out,
    matches,
    module_of,
    patterns,
    shown,
    without_wrapper,
)
from personae.checkpoints.published_renames import published_renames
from personae.checkpoints.renames import canonical
from personae.checkpoints.specs import empty_fault
from personae.checkpoints.tied import each_once_beside, embedding_of, says_tied
from personae.checkpoints.vocabulary import (
    embedding_rows,
    has_vocabulary_axis,
    is_input_embedding,
    is_output_layer,
)
from personae.errors import CheckpointError, Faults
from personae.family.alignment import Alignment
from personae.family.other_class import has_no_place, left_by_class

Kind = Literal["shared", "grown", "buffer", "private", "skipped"]

# Of batch normalisation: estimates of the data, no weights; a variance off by a little ruins it.
_STATISTICS = re.compile(r"(^|\.)running_(mean|var)$")
_VOCABULARY = re.compile(r"embed|wte|wpe|lm_head|shared\.weight|decoder\.weight|^proj_out")


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
        left = left_by_class(checkpoint, reference) if may_lack_parts else set[str]()
        found = align_one(name, reference, checkpoint, skip, only, private, spared, left)
        if found.shared or not (only and found.skipped):  # else 'only' leaves nothing to fit
            fits = [may_lack, left.__contains__]
            check_fit(
                found,
                reference,
                lambda name, fits=fits: any(may(name) for may in fits),
                found_here,
                may_lack_parts=may_lack_parts,
            )
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


def align_one(
    name: str,
    reference: Checkpoint,
    expert: Checkpoint,
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
    private_patterns: Sequence[str] = (),
    spared: Collection[str] = (),
    left: Collection[str] = (),
) -> Alignment:
    """Match one expert with the reference, however little it fits; see `align`.

    What is `left`, by reference names, the expert is taken not to have.
    """
    plain, renaming = _names(reference, expert)
    plain, renaming = _with_given(reference, expert, plain, renaming)
    known = {renaming.expert_name(name): name for name in (*reference.tied, *reference.specs)}
    expert = each_once_beside(expert, reference, lambda raw: known.get(plain(raw), ""))
    raw_of = {plain(raw): raw for raw in expert.specs}
    ties = {plain(dropped): plain(kept) for dropped, kept in expert.tied.items()}
    own_name = _match(reference, raw_of, ties, renaming)
    matched = set(own_name.values())
    own_name = {name: own for name, own in own_name.items() if name not in left}
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
    ties = {name: kept for name, kept in ties.items() if name not in left}
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
    on the one side has the shape of one that is left on the other.
    """
    plain, renaming = find_names(reference.specs, expert.specs)
    own = {plain(raw): spec for raw, spec in expert.specs.items()}
    wanted = {renaming.expert_name(name): spec for name, spec in reference.specs.items()}
    left = [
        {spec.shape for name, spec in one.items() if name not in other}
        for one, other in ((own, wanted), (wanted, own))
    ]
    if left[0].isdisjoint(left[1]):
        return plain, renaming
    renames = published_renames(reference, expert)
    return find_names(reference.specs, expert.specs, (canonical, *renames))


def _with_given(
    reference: Checkpoint, expert: Checkpoint, plain: Callable[[str], str], renaming: Renaming
) -> tuple[Callable[[str], str], Renaming]:
    """The same, but that an expert of another class keeps names of its own that no prefix tells.

    Loaders read the base's names in a model of the base's class; in another one, such as its
    backbone, the same rules of versions may not hold. What the expert itself is stored under does.
    """
    known = {renaming.expert_name(name): name for name in reference.specs}
    found = {raw: known[plain(raw)] for raw in expert.specs if plain(raw) in known}
    if not (renaming.add or renaming.strip) or isinstance(expert, LaidOut):
        return plain, renaming
    given = {
        ref: without_wrapper(raw)
        for raw, ref in found.items()
        if without_wrapper(raw) not in (plain(raw), without_wrapper(plain(raw)))
    }
    if not given or not {*given.values()}.isdisjoint(known):
        return plain, renaming
    own = {raw: given[ref] for raw, ref in found.items() if ref in given}
    return lambda raw: own.get(raw, plain(raw)), replace(renaming, given=given)


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


# What old checkpoints hold and loaders make themselves or pass over: causal masks (GPT-2, GPT-Neo,
# GPT-NeoX), frequencies of rotary positions, and the biases that T5's cross-attention never uses.
_MASK = re.compile(r"(^|\.)(attn|attention)\.(bias|masked_bias)$")
_PASSED_OVER = re.compile(
    r"(^|\.)(\w*rotary\w*\.(inv_freq|cos_cached|sin_cached)"
    r"|EncDecAttention\.relative_attention_bias\.weight)$"
)
# Copies of embeddings and output layers, which some versions save and others leave to be tied, and
# tables of positions that are computed.
_COPY = re.compile(r"(^|\.)(embed_\w+|shared|lm_head|decoder)\.(weight|bias)$")

_HEADS = re.compile(r"(head|classifier)s?$")
"""How lists of heads end."""

_POOLER = re.compile(r"(.*\.)?pooler\.")


def check_fit(
    found: Alignment,
    reference: Checkpoint,
    may_lack: Callable[[str], bool],
    faults: Faults,
    *,
    may_lack_parts: bool = False,
) -> None:
    """Add a fault for an expert that lacks tensors of the reference, or is of another shape.

    Args:
        found: The expert, aligned.
        reference: What it was aligned with.
        may_lack: Whether a name may be absent or of another shape.
        faults: Where faults are added.
        may_lack_parts: Whether whole parts may be absent, such as a language model's head.
    """
    empty, hollow = _empty(found, reference)
    if empty:
        faults.add(empty_fault(f"Expert '{found.name}'", empty))
    if hollow:
        faults.add(empty_fault(f"The base ({reference.source})", hollow))
    if not found.shared and not empty and not hollow:
        faults.add(_nothing_shared(found, reference))
    if not found.shared:
        return
    absent = [n for n in lacking(found, reference) if not may_lack(n)]
    if may_lack_parts:
        whole = _lacking_parts(found, reference)
        absent = [n for n in absent if not _is_in(n, whole)]
    foreign = _foreign(found, reference, may_lack)
    if absent:
        faults.add(_lacking_fault(absent, foreign, found, reference))
        foreign = []
    if foreign:
        faults.add(
            f"Expert '{found.name}' has {len(foreign)} tensor(s) in the base's layers that the "
            f"base lacks: {shown(foreign)}. Perhaps they were saved by another version of "
            "transformers, or belong to another architecture: load and save both with the same "
            "version of transformers. If they belong to the expert alone, leave them out with "
            "'skip', or keep them whole in a pack with 'private': "
            f"{patterns(foreign, [*reference.specs, *found.files.values()])}."
        )
    odd = [n for n in found.private if not may_lack(n) and n not in empty]
    odd = [n for n in odd if (known := reference_name(n, found, reference)) and known not in hollow]
    coded = sum(reference.specs[n].numel for n in found.shared)
    if sum(found.private_spec(n).numel for n in odd) > coded:
        n = odd[0]
        faults.add(
            f"Expert '{found.name}': the shapes of {len(odd)} tensors differ from the base's, "
            f"more than half of the model: '{n}' is {found.private_spec(n).shape}, the base has "
            f"{reference.specs[reference_name(n, found, reference)].shape}. Give the base it was "
            "fine-tuned from, or name them in 'private' to keep them whole."
        )


def _nothing_shared(found: Alignment, reference: Checkpoint) -> str:
    """What is to be said of an expert that has none of the reference's tensors in their shape."""
    known = ((own, reference_name(own, found, reference)) for own in found.private)
    other_size = next(((own, name) for own, name in known if name), None)
    if other_size:
        own, name = other_size
        return (
            f"Expert '{found.name}' ({found.checkpoint.source}) is of another size than the base "
            f"({reference.source}): every tensor that both have differs in shape, such as '{own}', "
            f"{found.private_spec(own).shape} here and {reference.specs[name].shape} in the base. "
            "Give the base it was fine-tuned from."
        )
    but = " but what is left out by name" if found.skipped else ""
    names = [next(iter(one), "") for one in (found.checkpoint.specs, reference.specs)]
    such = f" (it has '{names[0]}', say, and the base '{names[1]}')" if all(names) else ""
    return (
        f"Expert '{found.name}' ({found.checkpoint.source}) shares no tensor with the base "
        f"({reference.source}){but}{such}. Was it fine-tuned from it?"
    )


def _foreign(found: Alignment, reference: Checkpoint, may_lack: Callable[[str], bool]) -> list[str]:
    """Tensors only the expert has, in layers of the base or in a further layer.

    No head: those stand beside the layers, as do other modules that an expert may have of its own.
    """
    known = (*reference.specs, *found.files.values())  # which another version may call otherwise
    layers = {parent for name in known for parent in _layered(name)}
    rule = found.renaming
    return [
        own
        for own in found.private
        if (spec := found.private_spec(own)).is_floating
        and not reference_name(own, found, reference)
        and not may_lack(own)
        and not is_passed_over(spec)
        and not _COPY.search(own)
        and not layers.isdisjoint(
            (*_parents(own), *_parents(rule.strip + own.removeprefix(rule.add)))
        )
    ]


def _parents(name: str) -> list[str]:
    """The modules a tensor is in, outermost first."""
    parts = name.split(".")
    return [".".join(parts[:cut]) for cut in range(1, len(parts))]


def _layered(name: str) -> list[str]:
    """Those of the modules a tensor is in that are lists of layers, such as 'model.layers'.

    Several heads may be a list too (Medusa's, Bark's): of those an expert may have more.
    """
    lists = [p for p in _parents(name) if name.removeprefix(f"{p}.").partition(".")[0].isdigit()]
    return [] if lists and _HEADS.search(lists[0]) else lists


def lacking(found: Alignment, reference: Checkpoint) -> list[str]:
    """Weights of the reference that the expert has in no form, but for what loaders pass over."""
    return [
        name
        for name in found.absent
        if reference.specs[name].is_floating
        and not is_passed_over(reference.specs[name])
        and found.renaming.expert_name(name) not in found.tied
    ]


def _lacking_parts(found: Alignment, reference: Checkpoint) -> list[str]:
    """Parts of the reference of which the expert has nothing, as 'cls' or 'bert.pooler'.

    A part is whatever stands at the top, a pooler, or an output layer. All are less than what the
    expert has, or its class has no place for any of them, as a classifier of images has none for
    the other tower. Where the expert has the like of each of its tensors, it is there under another
    name; but not where it also has what the reference knows nothing like, as another class has.
    """
    rows = embedding_rows(reference.specs) or 0
    here = {name: _part_of(reference.specs[name], rows) for name in found.absent}
    held, like = (*found.files, *found.private), _unknown(found, reference)
    if not like.keys() <= {_shape_and_kind(reference.specs[name]) for name in found.absent}:
        like = {}
    parts = {
        part for name, part in here.items() if _shape_and_kind(reference.specs[name]) not in like
    }
    whole = [part for part in parts if not any(_is_in(name, [part]) for name in held)]
    gone = sum(reference.specs[name].numel for name, part in here.items() if part in whole)
    coded = sum(reference.specs[name].numel for name in found.shared)
    own_name = found.renaming.expert_name
    return (
        sorted(whole)
        if gone < coded
        or has_no_place(
            found.checkpoint,
            held=[*map(own_name, found.files), *found.private],
            lacked=[own_name(name) for name, part in here.items() if part in whole],
        )
        else []
    )


def _part_of(spec: TensorSpec, rows: int) -> str:
    """The part of a model with so many rows of tokens that a tensor is in."""
    if in_pooler := _POOLER.match(spec.name):
        return in_pooler[0].removesuffix(".")
    if is_output_layer(spec.name) and has_vocabulary_axis(spec, rows):
        return module_of(spec.name) or spec.name
    return spec.name.partition(".")[0]


def _is_in(name: str, parts: Iterable[str]) -> bool:
    """Whether a tensor is one of these parts, or in one."""
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def _unknown(found: Alignment, reference: Checkpoint) -> dict[tuple[tuple[int, ...], str], str]:
    """Tensors of the expert that answer to none of the reference, by shape and end of the name."""
    return {
        (found.private_spec(own).shape, own.rpartition(".")[2]): own
        for own in reversed(found.private)
        if not reference_name(own, found, reference)
    }


def _shape_and_kind(spec: TensorSpec) -> tuple[tuple[int, ...], str]:
    return spec.shape, spec.name.rpartition(".")[2]


def _lacking_fault(
    lacking: Sequence[str], foreign: Sequence[str], found: Alignment, reference: Checkpoint
) -> str:
    """What is to be said of tensors the expert lacks; it may have them in another form."""
    first = reference.specs[lacking[0]]
    text = (
        f"Expert '{found.name}' lacks {len(lacking)} tensor(s) of the base: {shown(lacking)} "
        f"(base: '{first.name}' of shape {first.shape}). "
    )
    inputs = [name for name in found.files if is_input_embedding(name)]
    parts, unknown = _lacking_parts(found, reference), _unknown(found, reference)
    alike = [
        f"'{own}' with the shape of '{name}'"
        for name in lacking
        if not _is_in(name, parts) and (own := unknown.get(_shape_and_kind(reference.specs[name])))
    ]
    if others := [*alike, *(f"'{own}'" for own in foreign)]:
        return text + (
            f"It has other tensors instead, such as {others[0]}: perhaps another version of "
            "transformers saved them. Load and save both with the same version of transformers."
        )
    heads = [name for name in lacking if is_output_layer(name) and name.endswith(".weight")]
    if any(reference.specs[n].shape == reference.specs[i].shape for n in heads for i in inputs):
        return text + (
            f"If '{found.name}' ties '{heads[0]}' to its embedding, save it untied "
            "(tie_word_embeddings: false, both stored), or give a base that ties them too."
        )
    here = {name for name in reference.specs if name not in found.absent}
    return text + (
        f"Was '{found.name}' fine-tuned from the base? To leave them out: skip: "
        f"{patterns(lacking, here)}."
    )


def _empty(found: Alignment, reference: Checkpoint) -> tuple[list[str], list[str]]:
    """Tensors without entries where the other side has some: the expert's, and the base's."""
    empty, hollow = list[str](), list[str]()
    for own in found.private:
        name, numel = reference_name(own, found, reference), found.private_spec(own).numel
        if name and not numel and reference.specs[name].numel:
            empty.append(own)
        elif name and numel and not reference.specs[name].numel:
            hollow.append(name)
    return empty, hollow


def reference_name(expert_name: str, found: Alignment, reference: Checkpoint) -> str:
    """The reference tensor a private tensor answers to, or '' if only the expert has it."""
    rule = found.renaming
    given = [name for name, own in rule.given.items() if own == expert_name]
    for name in (*given, rule.strip + expert_name.removeprefix(rule.add), expert_name):
        if name in reference.specs and rule.expert_name(name) == expert_name:
            return name
    return ""


def is_passed_over(spec: TensorSpec) -> bool:
    """Whether loaders make a tensor of this name and shape themselves, whatever a file holds."""
    is_mask = _MASK.search(spec.name) is not None and len(spec.shape) in (0, 4)
    return is_mask or _PASSED_OVER.search(spec.name) is not None


def trained_apart(expert: Alignment, reference: Checkpoint) -> dict[str, str]:
    """Tensors of the expert's own that the reference ties to others: name to the reference's one.

    Beside those that the reference knows by name, output layers as large as the embedding to
    which its config.json ties one.

    Raises:
        CheckpointError: A config.json is damaged.
    """
    known = {expert.renaming.expert_name(name): kept for name, kept in reference.tied.items()}
    apart = {name: known[name] for name in expert.private if name in known}
    inputs = [name for name in expert.files if is_input_embedding(name)]
    heads = [n for n in expert.private if is_output_layer(n) and n.endswith(".weight")]
    if says_tied(reference):
        found: dict[str, str | None] = {}
        for name in heads:
            shape = expert.private_spec(name).shape
            fitting = [one for one in inputs if expert.spec(one).shape == shape]
            found[name] = embedding_of(name, fitting) or next(iter(fitting), None)
        taken = set(map(expert.renaming.expert_name, reference.specs))
        apart |= {
            n: kept for n, kept in found.items() if kept and n not in apart and n not in taken
        }
    return apart
