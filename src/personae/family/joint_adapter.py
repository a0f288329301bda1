"""The one adapter that the adapters of a family become: what it adapts, from headers alone.

It adapts what any of them adapts, and stores whole what any of them does. Modules are called as the
adapters themselves call them, so that it is for the same model in memory as they are.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from personae.checkpoints.adapter import Adapter, adapter_of
from personae.checkpoints.adapter_laid_out import AdapterLaidOut
from personae.checkpoints.naming import left_out, module_of, modules_around, shown
from personae.checkpoints.unread import Unread
from personae.errors import Faults
from personae.family.carried import HEADS_OF, last_part, target_names
from personae.family.opened import Family

_CLASS = "base_model_class"


@dataclass(frozen=True)
class JointAdapter:
    """What a merge of adapters writes, but for ranks and values; tensors by the base's names.

    Attributes:
        factors: Tensor to the module that adapts it.
        ranks: The same to the sum of the experts' ranks there.
        rank: The largest rank that an expert has anywhere.
        transposed: Those of them that are stored (in, out).
        embeddings: Those of them that are embeddings.
        whole: Names in memory to the tensors that are stored whole under them.
        saved: Names for `modules_to_save`.
        bias: Which biases are stored, in PEFT's words.
        targets: Names that tell the adapted modules.
        dtype: The widest of the experts' factors.
        base: What the experts say they are for, if they say the same.
        revision: The commit of that.
        task_type: PEFT's type of their task, if they say the same and a head that it asks for is
            stored: PEFT loads no such adapter without.
        model_class: The class of their model, if they say the same.
    """

    factors: Mapping[str, str]
    ranks: Mapping[str, int]
    rank: int
    transposed: frozenset[str]
    embeddings: frozenset[str]
    whole: Mapping[str, str]
    saved: tuple[str, ...]
    bias: str
    targets: tuple[str, ...]
    dtype: torch.dtype
    base: str | None
    revision: str | None
    task_type: str | None
    model_class: str | None

    @property
    def tensors(self) -> frozenset[str]:
        """Every tensor that is merged."""
        return frozenset(self.factors) | frozenset(self.whole.values())


def check_joint(family: Family, skip: Sequence[str], only: Sequence[str], faults: Faults) -> None:
    """Add everything in the headers that keeps the experts from becoming one adapter."""
    adapters = {name: adapter_of(expert.checkpoint) for name, expert in family.experts.items()}
    for name, adapter in adapters.items():
        if adapter is None:
            faults.add(
                f"Expert '{name}' is not a LoRA adapter, and 'output: adapter' is for merges of "
                "those alone. Make one of it (personae export MODEL --base BASE --out DIR) and "
                "give that, or leave output out."
            )
    known = {name: adapter for name, adapter in adapters.items() if adapter is not None}
    for name, adapter in known.items():
        if otherwise := _no_modules(adapter):
            faults.add(
                f"Expert '{name}' {otherwise}, and the adapter of a merge is one of modules that "
                "the base stores. Leave output out to write a model."
            )
    for fault in _unlike_places(known, skip, only):
        faults.add(fault)
    for name, expert in family.experts.items():
        own = [n for n in expert.private if not left_out([n], skip, only)]
        if name in known and own:
            faults.add(
                f"Expert '{name}' stores whole what the base does not have, so that there is no "
                f"difference to merge: {shown(own)}. Give a base that has it, or leave it out of "
                f"the adapter with skip: {[*own]}."
            )


def _no_modules(adapter: Adapter) -> str:
    """What an adapter adapts that is no weight of a module, as the base has them; '' if all are."""
    stacks = [name for name, how in adapter.adapted.items() if how.matrices is not None]
    if stacks:
        return f"adapts stacks of matrices ({shown(stacks)})"
    return adapter.note if isinstance(adapter, AdapterLaidOut) else ""


def join(family: Family, skip: Sequence[str], only: Sequence[str]) -> JointAdapter:
    """What adapters that passed `check_joint` become."""
    adapters = [a for e in family.experts.values() if (a := adapter_of(e.checkpoint)) is not None]
    touched = sorted({name for adapter in adapters for name in adapter.places})
    kept = [n for n in touched if n in family.base.specs and not left_out([n], skip, only)]
    places = {name: places for a in reversed(adapters) for name, places in a.places.items()}
    stored = {name for adapter in adapters for name in adapter.whole if _is_own(adapter, name)}
    factors = {name: module_of(places[name][0]) for name in kept if name not in stored}
    whole = {place: name for name in kept if name in stored for place in places[name]}
    saved = _saved(adapters, whole)
    task_type = _same([a.config.task_type for a in adapters])
    heads = HEADS_OF.get(task_type or "")
    biases = [p for p in whole if not any(_ends(module_of(p), module) for module in saved)]
    of_adapted = all(module_of(place) in factors.values() for place in biases)
    hows = [(n, a.adapted[n], a) for a in adapters for n in a.adapted if n in factors]
    modules = {module_of(name): module for name, module in factors.items()}
    all_modules = {path for name in family.base.specs for path in modules_around(module_of(name))}
    return JointAdapter(
        factors=factors,
        ranks={name: sum(_rank(a, name) for a in adapters) for name in factors},
        rank=max((_rank(a, n) for n, _, a in hows), default=0),
        transposed=frozenset(n for n, how, _ in hows if how.transposed),
        embeddings=frozenset(n for n, how, _ in hows if how.pair.embedding),
        whole=whole,
        saved=tuple(sorted(saved)),
        bias="none" if not biases else "lora_only" if of_adapted else "all",
        targets=_targets(modules, all_modules),
        dtype=max((a.factors_dtype for a in adapters), key=lambda dtype: dtype.itemsize),
        base=_same([a.trained_on for a in adapters]),
        revision=_same([a.config.revision for a in adapters]),
        task_type=task_type if heads is None or not saved.isdisjoint(heads) else None,
        model_class=_same([(a.config.auto_mapping or {}).get(_CLASS) for a in adapters]),
    )


def without_weights(family: Family) -> Family:
    """The family with a base that is not read where what adapters add is known without it."""
    adapters = [a for e in family.experts.values() if (a := adapter_of(e.checkpoint)) is not None]
    needed = {name for adapter in adapters for name in adapter.whole}
    needed |= {n for a in adapters for n in a.adapted if len(a.specs[n].shape) != 2}
    unread = family.base.specs.keys() - needed
    return replace(family, base=Unread(family.base, unread))


def _unlike_places(
    adapters: Mapping[str, Adapter], skip: Sequence[str], only: Sequence[str]
) -> Iterator[str]:
    """What experts call otherwise, or adapt under several names."""
    seen: dict[str, tuple[str, tuple[str, ...]]] = {}
    for expert, adapter in adapters.items():
        unlike = [
            (name, *seen[name])
            for name, places in adapter.places.items()
            if seen.setdefault(name, (expert, places))[1] != places
            and not left_out([name], skip, only)
        ]
        if unlike:
            name, other, theirs = unlike[0]
            ours = adapter.places[name]
            yield (
                f"Expert '{expert}' adapts {' and '.join(ours)} where '{other}' has "
                f"{' and '.join(theirs)} ({len(unlike)} in all): both are '{name}' of the base. "
                "Adapters of one class of model can be merged into one: save them from the same, "
                "or leave output out."
            )
        twice = [
            places
            for name, places in adapter.places.items()
            if len(places) > 1 and not _is_own(adapter, name) and not left_out([name], skip, only)
        ]
        if twice:
            yield (
                f"Expert '{expert}' adapts {' and '.join(twice[0])}, which are one weight in the "
                "base, and the adapter of a merge has factors for one of them only. Leave it out "
                "with skip, or leave output out to write a model."
            )


def _targets(modules: Mapping[str, str], all_modules: Collection[str]) -> tuple[str, ...]:
    """Names for `target_modules`, given the base's names of adapted modules, and those in memory.

    Of a module that ends otherwise in memory (a tied output layer, another version's name), the
    whole name: the ends of the base's names say nothing of those.
    """
    alike = {own for own, module in modules.items() if last_part(own) == last_part(module)}
    named = {modules.get(target, target) for target in target_names(alike, all_modules)}
    return tuple(sorted(named | {modules[own] for own in modules.keys() - alike}))


def _saved(adapters: Collection[Adapter], whole: Mapping[str, str]) -> frozenset[str]:
    """The names in `modules_to_save` of which something is stored; embeddings need no name."""
    names = {name for adapter in adapters for name in adapter.config.modules_to_save or ()}
    modules = {module_of(place) for place in whole}
    named = {name for name in names if any(_ends(module, name) for module in modules)}
    weights = {module_of(place) for place in whole if not place.endswith(".bias")}
    others = {m for m in weights if not any(_ends(m, name) for name in named)}
    return frozenset(named | others)


def _is_own(adapter: Adapter, name: str) -> bool:
    """Whether a tensor stored whole is trained whole, and not what factors are added to."""
    trained = any(adapter.config.saves(module_of(place)) for place in adapter.places[name])
    return trained or name not in adapter.adapted


def _ends(module: str, name: str) -> bool:
    """Whether a module is of this name, or inside one that is."""
    return f".{name}." in f".{module}."


def _rank(adapter: Adapter, name: str) -> int:
    return adapter.rank(name) if name in adapter.adapted else 0


def _same(said: Collection[str | None]) -> str | None:
    """What all say, if it is the same."""
    return next(iter(said)) if len({*said}) == 1 else None
