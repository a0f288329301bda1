"""Everything that can be wrong with a merge, found without merging: by headers, then by weights."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import fsum, sqrt
from pathlib import Path
from typing import Any

from personae.commands.merge_documents import called, visit
from personae.commands.merge_job import settings_for
from personae.commands.merge_parts import OpenedParts
from personae.commands.merge_plan import plan_parts
from personae.errors import PersonaeError
from personae.methods import MergeMethod
from personae.recipe import MergePart, MergeRecipe, MergeSettings
from personae.run.weights import Weights, look
from personae.run.work import Work

UNEVEN = 3.0
"""Ratio of norms of task vectors beyond which the longest drowns the others (arXiv:2508.01148)."""


@dataclass(frozen=True)
class Norm:
    """How long an expert's task vector is, over the tensors that are merged.

    Attributes:
        norm: ‖θₙ − θ₀‖; from the experts' average where there is no base.
        relative: The same over ‖θ₀‖; None where that is 0 or not read, as beside adapters.
    """

    norm: float
    relative: float | None


@dataclass
class Checked:
    """What was found.

    Attributes:
        faults: Why `merge` would refuse; none if it would not.
        notes: What a person should know although it can be merged.
        norms: Name of an expert to the norm of its task vector; empty if weights were not read.
        bytes_read: Bytes of weights read.
    """

    faults: list[str] = field(default_factory=list[str])
    notes: list[str] = field(default_factory=list[str])
    norms: dict[str, Norm] = field(default_factory=dict[str, Norm])
    bytes_read: int = 0

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def check(
    base: Any,
    experts: Mapping[str, Any],
    settings: MergeSettings | None = None,
    work: Work | None = None,
    *,
    method: MergeMethod | None = None,
    weights: bool = True,
) -> Checked:
    """Check a merge without doing it: what headers tell, then one read through the weights.

    Args:
        base: As for `merge`.
        experts: As for `merge`.
        settings: As for `merge`.
        work: Workers, memory bound, progress.
        method: As for `merge`.
        weights: Whether to read weights, once headers show no fault.

    Returns:
        All faults and notes; `merge` would go through if there is no fault.
    """
    try:
        settings = settings_for(base, settings, method, len(experts))
        part = MergePart(base=base, experts=experts, settings=settings)
    except PersonaeError as error:
        return Checked(faults=list(error.faults or (str(error),)))
    (found,) = check_recipes([MergeRecipe(parts=(part,), text="")], work, weights=weights).values()
    return found


def check_recipes(
    recipes: Sequence[MergeRecipe], work: Work | None = None, *, weights: bool = True
) -> dict[str, Checked]:
    """Check the recipes of a file; see `check`.

    Args:
        recipes: In the order in which they can be merged; the last is that of the output.
        work: Workers, memory bound, progress.
        weights: Whether to read weights; those of models that other recipes give are not there.

    Returns:
        Name of each recipe to what was found.
    """
    work = work or Work()
    made = {recipe.name for recipe in recipes}
    checked = {called(recipe): Checked(notes=recipe.notes) for recipe in recipes}
    between = {
        called(recipe)
        for recipe in recipes
        if made & {model.partition("+")[0] for model in recipe.models}
    }

    def see(name: str, opened: OpenedParts) -> None:
        found = checked[name]
        found.notes += plan_parts(opened, work).notes
        if weights and name in between:
            found.notes.append(
                "its weights are not read: other recipes of the file make its models"
            )
        elif weights:
            _look(opened, found, work)

    with tempfile.TemporaryDirectory() as folder:
        for name, faults in visit(recipes, see, Path(folder), PersonaeError).items():
            checked[name].faults += faults
    return checked


def _look(opened: OpenedParts, found: Checked, work: Work) -> None:
    """Read the weights of every part, and add what they tell."""
    seen: list[tuple[Weights, bool]] = []
    for job in opened.jobs:
        specs = [job.family.base.specs[name] for name in sorted(job.merged)]
        seen.append((look(job.family, specs, work), job.family.has_base))
    found.bytes_read = sum(weights.bytes_read for weights, _ in seen)
    found.faults += dict.fromkeys(fault for weights, _ in seen for fault in weights.faults)
    if found.faults:
        return
    compared = [weights for weights, has_base in seen if has_base or len(weights.deltas) > 1]
    for name in dict.fromkeys(name for weights in compared for name in weights.deltas):
        own = [weights for weights in compared if name in weights.deltas]
        norm = sqrt(fsum(weights.deltas[name] for weights in own))
        whole = sqrt(fsum(weights.reference for weights in own))
        found.norms[name] = Norm(norm, norm / whole if whole else None)
        if not norm and all(has_base for weights, has_base in seen if weights in own):
            found.notes.append(f"{name} equals the base in every tensor that is merged")
    found.notes += _equal(compared)
    found.notes += _uneven(found.norms)


def _equal(seen: Sequence[Weights]) -> list[str]:
    """Which experts are the same wherever both are merged."""
    pairs = dict.fromkeys(pair for weights in seen for pair in weights.equal)
    return [
        f"{one} and {other} are equal in every tensor that is merged: they count twice"
        for one, other in pairs
        if all((one, other) in w.equal for w in seen if {one, other} <= w.deltas.keys())
    ]


def _uneven(norms: Mapping[str, Norm]) -> list[str]:
    """Whether some task vectors are much longer than others."""
    lengths = {name: found.norm for name, found in norms.items() if found.norm}
    ratio = max(lengths.values(), default=1.0) / min(lengths.values(), default=1.0)
    if ratio <= UNEVEN:
        return []
    told = ", ".join(f"{name} {norm:.4g}" for name, norm in lengths.items())
    return [
        f"norms of the task vectors differ by a factor of {ratio:.1f}: {told}. The longest drowns "
        "the others: give it less 'weight', or them more"
    ]
