"""What an adapter keeps of a model and what it does not, in figures and in words."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, get_args

from personae._types import dtype_name
from personae._version import __version__
from personae.checkpoints.naming import shown
from personae.checkpoints.opening import is_hub_id
from personae.family.carried import Carried, Kind, Model
from personae.run.changes import Changes
from personae.run.extract import Measured
from personae.writers.adapter import AdapterSpec
from personae.writers.adapter_card import AdapterFacts, adapter_card
from personae.writers.markdown import code

_VLLM_RANKS = (16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` can be, from its default on."""
_HEADS_SERVED = {"classifier", "score"}


@dataclass(frozen=True)
class Source:
    """What an adapter is made from.

    Attributes:
        name: What it is called.
        place: Where it is from.
        changes: Its tensors.
        model: What is known of its modules.
        base: Where the model is that it is relative to.
        revision: The hub commit of that.
        task_type: PEFT's type of its task.
        model_class: Its class in transformers.
        notes: What a person should know.
    """

    name: str
    place: str
    changes: Changes
    model: Model
    base: str
    revision: str | None
    task_type: str | None
    model_class: str | None
    notes: tuple[str, ...] = ()


def report(
    source: Source,
    measured: Mapping[str, Measured],
    carried: Carried,
    spec: AdapterSpec,
    targets: Collection[str],
    lost: Mapping[str, float],
) -> dict[str, Any]:
    """Everything about an adapter, as plain values.

    Args:
        source: What it was made from.
        measured: Of the tensors that changed and can be compared.
        carried: How each is carried.
        spec: What is stored.
        targets: Names that tell the adapted modules.
        lost: Tensor to the squared norm that its factors miss.
    """
    whole = {*carried.whole.values()}
    energy = {name: seen.energy for name, seen in measured.items()}
    total, kept = sum(energy.values()), sum(energy[name] for name in carried.factors)
    missed = sum(lost.values())
    changed = energy.keys() | source.changes.private
    parameters = {name: source.model.specs[name].numel for name in changed}
    rows: list[dict[str, Any]] = []
    ways = {"factors": carried.factors.keys(), "whole": whole, "left out": {*carried.left}}
    for kind in get_args(Kind):
        for way, names in ways.items():
            of_kind = [n for n in sorted(changed & names) if source.model.kinds[n] == kind]
            if of_kind:
                rows.append(
                    {
                        "kind": kind,
                        "carried": way,
                        "tensors": len(of_kind),
                        "parameter_share": _share(of_kind, parameters),
                        "norm_share": _share(of_kind, energy),
                    }
                )
    left = sum(energy.get(name, 0.0) for name in carried.left)
    return {
        "rank": max(spec.ranks.values()),
        "ranks": dict(sorted(spec.ranks.items())) if len({*spec.ranks.values()}) > 1 else {},
        "modules": len(spec.ranks),
        "dtype": dtype_name(spec.dtype),
        "bytes": spec.nbytes,
        "target_modules": list(targets),
        "modules_to_save": list(carried.saved),
        "relative_error": missed / kept if kept else 0.0,
        "left_out": left / total if total else 0.0,
        "lost": (left + missed) / total if total else 0.0,
        "changed": rows,
        "left": list(carried.left),
        "relative_errors": {
            name: lost[name] / energy[name] if energy[name] else 0.0 for name in sorted(lost)
        },
    }


def _share(names: Collection[str], of: Mapping[str, int] | Mapping[str, float]) -> float:
    whole = sum(of.values())
    return sum(of.get(name, 0.0) for name in names) / whole if whole else 0.0


def notes(source: Source, carried: Carried, spec: AdapterSpec) -> list[str]:
    """What a person should know of an adapter, a line each."""
    found = list(source.notes)
    heads = [name for name in carried.left if source.model.kinds[name] == "head"]
    own = [name for name in heads if name in source.changes.private]
    if own:
        found.append(
            f"not in the base and left out: {shown(own)}; --save-modules head takes them along"
        )
    tied = sorted(source.model.tied_unknown & {*carried.left})
    if tied:
        found.append(
            f"left out, as it is tied to an output layer whose name only transformers can tell: "
            f"{shown(tied)}; to save it, install transformers"
        )
    strange = [m for m in source.model.strange if m in carried.factors.values()]
    if strange:
        found.append(
            f"{source.model_class} of the transformers installed here has no modules of these "
            f"names, so that PEFT may not find them: {shown(strange)}"
        )
    return found + _of_engines(max(spec.ranks.values()), carried, len({*spec.ranks.values()}) > 1)


def _of_engines(rank: int, carried: Carried, ranks_differ: bool) -> list[str]:
    found: list[str] = []
    enough = next((most for most in _VLLM_RANKS if most >= rank), None)
    if enough is None:
        found.append(
            f"rank {rank} is above what vLLM loads ({_VLLM_RANKS[-1]}); PEFT has no limit. Ask "
            f"for a smaller rank, or bound it (max rank {_VLLM_RANKS[-1]})"
        )
    elif enough > _VLLM_RANKS[0]:
        found.append(f"vLLM needs --max-lora-rank {enough} (its default is {_VLLM_RANKS[0]})")
    if ranks_differ:
        found.append(
            "ranks differ between modules, which PEFT and vLLM read right; llama.cpp scales such "
            "adapters wrongly and SGLang does not load them. Without a rank pattern there is one"
        )
    if {*carried.saved} - _HEADS_SERVED:
        found.append(
            "modules saved whole are loaded by PEFT; vLLM refuses them (but for a classifier or "
            f"score): {shown(carried.saved)}"
        )
    return found


def card(source: Source, base: str, told: Mapping[str, Any], told_notes: Collection[str]) -> str:
    """The README of an adapter.

    Args:
        source: What it was made from.
        base: What its configuration says it is for.
        told: What `report` found.
        told_notes: What a user should know.
    """
    name = base.partition("@")[0]
    facts = AdapterFacts(
        title=source.name,
        made=f"extracted from {code(source.place)}",
        base=base,
        hub_id=name if is_hub_id(name) else None,
        rank=f"rank {told['rank']}" if not told["ranks"] else f"ranks up to {told['rank']}",
        dtype=told["dtype"],
        summary=summary(told),
        rows=rows(told),
        notes=[*told_notes],
        versions={"personae": __version__, "torch": version("torch")},
    )
    return adapter_card(facts)


def rows(told: Mapping[str, Any]) -> list[list[str]]:
    """A table of what changed and how it is carried; the first row is its head."""
    head = ["what changed", "tensors", "parameters %", "squared norm %", "carried as"]
    found = [
        [
            row["kind"],
            str(row["tensors"]),
            f"{100 * row['parameter_share']:.2f}",
            f"{100 * row['norm_share']:.2f}",
            row["carried"],
        ]
        for row in told["changed"]
    ]
    return [head, *found]


def summary(told: Mapping[str, Any]) -> str:
    """What is kept and what is lost, in a sentence."""
    return (
        f"The relative error of its factors is {told['relative_error']:.3g}; "
        f"{100 * told['left_out']:.3g} % of the squared norm of the task vector is left out."
    )
