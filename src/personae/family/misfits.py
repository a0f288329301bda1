"""Experts that do not fit the reference they were aligned with."""

import re
from collections.abc import Callable, Sequence

from personae._types import TensorSpec
from personae.checkpoints._protocol import Checkpoint
from personae.checkpoints.naming import patterns, shown
from personae.checkpoints.specs import empty_fault
from personae.checkpoints.tied import says_tied
from personae.checkpoints.vocabulary import is_input_embedding, is_output_layer
from personae.errors import Faults
from personae.family.alignment import Alignment

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
        but = " but what is left out by name" if found.skipped else ""
        faults.add(
            f"Expert '{found.name}' ({found.checkpoint.source}) shares no tensor with the base "
            f"({reference.source}){but}. Was it fine-tuned from it?"
        )
    if not found.shared:
        return
    absent = [n for n in lacking(found, reference) if not may_lack(n)]
    if may_lack_parts:
        whole = _lacking_parts(found, reference)
        absent = [n for n in absent if not n.startswith(tuple(whole))]
    if absent:
        faults.add(_lacking_fault(absent, found, reference))
    foreign = [] if absent else _foreign(found, reference, may_lack)
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


def _foreign(found: Alignment, reference: Checkpoint, may_lack: Callable[[str], bool]) -> list[str]:
    """Tensors only the expert has, in layers of the base or in a further layer.

    No head: those stand beside the layers, as do other modules that an expert may have of its own.
    """
    layers = {parent for name in reference.specs for parent in _layered(name)}
    rule = found.renaming
    return [
        own
        for own in found.private
        if (spec := found.private_spec(own)).is_floating
        and not reference_name(own, found, reference)
        and not may_lack(own)
        and not is_passed_over(spec)
        and not _COPY.search(own)
        and not layers.isdisjoint(_parents(rule.strip + own.removeprefix(rule.add)))
    ]


def _parents(name: str) -> list[str]:
    """The modules a tensor is in, outermost first."""
    parts = name.split(".")
    return [".".join(parts[:cut]) for cut in range(1, len(parts))]


def _layered(name: str) -> list[str]:
    """Those of the modules a tensor is in that are lists of layers, such as 'model.layers'."""
    return [p for p in _parents(name) if name.removeprefix(f"{p}.").partition(".")[0].isdigit()]


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
    """Parts of the reference of which the expert has nothing, as 'cls.' or 'bert.pooler.'.

    A part is a whole module at the top, or the pooler, and less than what the expert has. Where
    the expert has the like of each of its tensors, it is there under another name.
    """
    here = {name: name.partition(".")[0] + "." for name in found.absent if "." in name}
    here |= {name: m[0] for name in found.absent if (m := _POOLER.match(name))}
    held, like = (*found.files, *found.private), _unknown(found, reference)
    parts = {part for name, part in here.items() if _kind(reference.specs[name]) not in like}
    whole = [part for part in parts if not any(name.startswith(part) for name in held)]
    gone = sum(reference.specs[name].numel for name, part in here.items() if part in whole)
    coded = sum(reference.specs[name].numel for name in found.shared)
    return sorted(whole) if gone < coded else []


def _unknown(found: Alignment, reference: Checkpoint) -> dict[tuple[tuple[int, ...], str], str]:
    """Tensors of the expert that answer to none of the reference, by shape and end of the name."""
    return {
        (found.private_spec(own).shape, own.rpartition(".")[2]): own
        for own in reversed(found.private)
        if not reference_name(own, found, reference)
    }


def _kind(spec: TensorSpec) -> tuple[tuple[int, ...], str]:
    return spec.shape, spec.name.rpartition(".")[2]


def _lacking_fault(lacking: Sequence[str], found: Alignment, reference: Checkpoint) -> str:
    """What is to be said of tensors the expert lacks; it may have them under other names."""
    first = reference.specs[lacking[0]]
    text = (
        f"Expert '{found.name}' lacks {len(lacking)} tensor(s) of the base: {shown(lacking)} "
        f"(base: '{first.name}' of shape {first.shape}). "
    )
    inputs = [name for name in found.files if is_input_embedding(name)]
    parts, unknown = _lacking_parts(found, reference), _unknown(found, reference)
    for name in (n for n in lacking if not n.startswith(tuple(parts))):
        own = unknown.get(_kind(reference.specs[name]))
        if own:
            return text + (
                f"It has other tensors instead, such as '{own}' with the shape of '{name}': "
                "perhaps another version of transformers saved them. Load and save both with the "
                "same version of transformers."
            )
    heads = [name for name in lacking if is_output_layer(name) and name.endswith(".weight")]
    if any(reference.specs[n].shape == reference.specs[i].shape for n in heads for i in inputs):
        return text + (
            f"If '{found.name}' ties '{heads[0]}' to its embedding, save it untied "
            "(tie_word_embeddings: false, both stored), or give a base that ties them too."
        )
    others = {name for name in reference.specs if name not in found.absent}
    return text + (
        f"Was '{found.name}' fine-tuned from the base? To leave them out: skip: "
        f"{patterns(lacking, others)}."
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
    for name in (rule.strip + expert_name.removeprefix(rule.add), expert_name):
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
        shapes = {expert.spec(name).shape: name for name in reversed(inputs)}
        found = {name: shapes.get(expert.private_spec(name).shape) for name in heads}
        taken = set(map(expert.renaming.expert_name, reference.specs))
        apart |= {
            n: kept for n, kept in found.items() if kept and n not in apart and n not in taken
        }
    return apart
