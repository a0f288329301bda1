"""Plans from headers alone: ranks, bytes, memory, and every fault a header can tell."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from personae._types import TensorSpec
from personae.commands.accounting import (
    HEADER_BYTES,
    Denominator,
    Share,
    amr_percent,
    cost,
    mask_bytes,
    shared_bytes,
    within_budget,
)
from personae.commands.merge_job import job_of
from personae.errors import BudgetError, RecipeError
from personae.family.opened import Family, open_family
from personae.methods import Codec
from personae.recipe import PackSettings, parse_size
from personae.run.costs import (
    checking_bytes,
    coding_bytes,
    sharing_bytes,
)
from personae.run.scan import costs_of_scanning
from personae.run.work import Work, check_memory, held_at_once

RECORD_BYTES = 600
"""What a tensor's record takes in pack.json, about."""


@dataclass(frozen=True)
class ShapesPlan:
    """What coding one model of given shapes costs.

    Attributes:
        parameters: Floating parameters counted (heads left out by the caller).
        tensors: Number of tensors coded.
        rank_fraction: The rank fraction, as asked or as the budget allows; None if not of DTS kind.
        tasks: Number of tasks planned for; None if that does not matter.
        bytes: Bytes of the coded parts of a task if every tensor changed everywhere.
        shared_bytes: Bytes that are stored once for all tasks.
        mask_bytes: Bytes more, at most, where deltas hold exact zeros.
        amr_percent: By rule, a task's share of what all share included; see
            `accounting.amr_percent`.
    """

    parameters: int
    tensors: int
    rank_fraction: float | None
    tasks: int | None
    bytes: int
    shared_bytes: int
    mask_bytes: int
    amr_percent: dict[str, float]


@dataclass(frozen=True)
class TaskPlan:
    """What packing one expert takes.

    Attributes:
        coded: Its cost from shapes; unchanged tensors will cost nothing.
        private_bytes: Bytes of tensors kept whole.
        private: Their names.
        bytes_in: Bytes of the expert read.
    """

    coded: ShapesPlan
    private_bytes: int
    private: tuple[str, ...]
    bytes_in: int


@dataclass(frozen=True)
class PackPlan:
    """What packing a family takes.

    Attributes:
        tasks: By task name.
        bytes_in: Bytes read: reference and experts.
        bytes_out: Bytes written, at most, without small files (configuration, tokenizer).
        peak_memory: Bytes of working memory with this number of workers: the tensors worked on,
            which `memory` bounds, and the finished parts of one task.
        workers: Number of workers.
        notes: What a person should know: prefixes, private tensors.
    """

    tasks: dict[str, TaskPlan]
    bytes_in: int
    bytes_out: int
    peak_memory: int
    workers: int
    notes: list[str] = field(default_factory=list[str])

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def plan_shapes(
    specs: Iterable[TensorSpec], settings: PackSettings, tasks: int | None = None
) -> ShapesPlan:
    """Cost of packing a model with these shapes; no weights are needed.

    Args:
        specs: Names, shapes and dtypes; integer tensors are left out.
        settings: Codec, and rank fraction or budget.
        tasks: Number of tasks, for codecs whose cost depends on it.

    Raises:
        MethodError: for an unknown codec or parameter.
        BudgetError: if the budget cannot be met.
        RecipeError: if the cost depends on the number of tasks, and it is not given.
    """
    floating = [spec for spec in specs if spec.is_floating]
    codec = _codec(settings, floating)
    if tasks is None and (codec.shares or codec.for_family([{}]) != codec):
        raise RecipeError(
            f"What {settings.method} costs depends on the number of tasks. Give it: --tasks N."
        )
    codec = codec.for_family([{}] * (tasks or 0))
    bits = cost(codec, floating)
    whole = Denominator.of(floating)
    shared = shared_bytes(codec, floating)
    share = 8 * shared / tasks if tasks else 0.0
    return ShapesPlan(
        parameters=whole.parameters,
        tensors=len(floating),
        rank_fraction=getattr(codec, "rank_fraction", None),
        tasks=tasks,
        bytes=bits.stored // 8,
        shared_bytes=shared,
        mask_bytes=mask_bytes(codec, floating),
        amr_percent=amr_percent(bits, whole, Share(share, share)),
    )


def plan_pack(
    base: Any,
    experts: Mapping[str, Any],
    settings: PackSettings | None = None,
    work: Work | None = None,
    *,
    codec: Codec | None = None,
    budget: str | None = None,
) -> PackPlan:
    """Plan a pack from the headers of its family.

    Args:
        base: As for `pack`.
        experts: As for `pack`.
        settings: As for `pack`.
        work: Workers and memory bound.
        codec: As for `pack`.
        budget: As for `pack`.

    Raises:
        PersonaeError: for anything wrong that headers tell.
    """
    settings = pack_settings(settings, codec, budget)
    if base is None:
        check_no_base_needed(settings, len(experts))
    with open_family(
        base, experts, skip=settings.skip, private=settings.private, for_pack=True
    ) as family:
        return plan_family(family, settings, work or Work())


def pack_settings(
    settings: PackSettings | None, codec: Codec | None, budget: str | None
) -> PackSettings:
    """The settings, or those of a codec and a budget.

    Raises:
        RecipeError: if both are given.
    """
    if settings is None:
        return PackSettings.of(codec, budget=budget) if codec else PackSettings(budget=budget)
    if codec is not None or budget is not None:
        raise RecipeError("'settings' and 'codec' or 'budget' both say how to pack. Give one.")
    return settings


def check_no_base_needed(settings: PackSettings, experts: int) -> None:
    """Without a base there are difference vectors alone, and methods that merge these.

    Raises:
        RecipeError: if something else is asked for.
    """
    if settings.vector == "task":
        raise RecipeError(
            "Task vectors need the base: give it (--base), or pack difference vectors, which are "
            "relative to a merged model (vector: difference, --vector difference)."
        )
    method = settings.merge(experts, has_base=False)
    if method.needs != "deltas":
        raise RecipeError(
            f"{method.name} merges task vectors, which need the base: give it (--base), or another "
            "merge method of the reference, such as average."
        )


def plan_family(family: Family, settings: PackSettings, work: Work) -> PackPlan:
    """Plan a pack of a family that is open.

    Raises:
        MethodError: for an unknown method or parameter.
        RecipeError: for a single expert relative to its own average.
        BudgetError: if the budget, or the memory bound, cannot be met.
    """
    workers, memory = work.threads, work.memory
    if settings.vector == "difference":
        settings.merge(len(family.experts))
    if settings.from_average and len(family.experts) == 1:
        raise RecipeError(
            "A single expert equals its own average. Give more experts, or pack it with task "
            "vectors (vector: task, --vector task)."
        )
    for name in family.experts:
        settings.codec().for_task(name)
    tasks = {name: _plan_task(family, name, settings) for name in family.experts}
    stages = _item_costs(family, settings)
    check_memory(max(max(costs, default=0) for costs in stages), memory, "The largest tensor")
    peak = max(held_at_once(costs, workers, memory) for costs in stages)
    base_bytes = sum(spec.nbytes for spec in family.base.specs.values())
    merged = base_bytes if settings.vector == "difference" else 0
    merged += max(task.coded.shared_bytes for task in tasks.values())
    written = sum(
        t.coded.bytes
        + t.coded.mask_bytes
        + t.private_bytes
        + HEADER_BYTES
        + RECORD_BYTES * t.coded.tensors
        for t in tasks.values()
    )
    # One task's parts are together until its file is written: each, and joined into sections.
    parts = max(t.coded.bytes + t.coded.mask_bytes for t in tasks.values())
    kept = max(2 * (t.coded.bytes + t.coded.mask_bytes) + t.private_bytes for t in tasks.values())
    return PackPlan(
        tasks=tasks,
        bytes_in=base_bytes * family.has_base + sum(t.bytes_in for t in tasks.values()),
        bytes_out=written + merged,
        peak_memory=max(kept, parts + peak),
        workers=workers,
        notes=pack_notes(family, settings),
    )


def pack_notes(family: Family, settings: PackSettings) -> list[str]:
    """What a person should know of this pack before it is made."""
    notes = family.notes
    if settings.from_average:
        left = settings.codec().degenerates(len(family.experts))
        if left:
            notes.append(f"On difference vectors from the average, {settings.method} keeps {left}.")
    return notes


def _plan_task(family: Family, name: str, settings: PackSettings) -> TaskPlan:
    expert = family.experts[name]
    try:
        coded = plan_shapes(family.shared_specs(name), settings, len(family.experts))
    except BudgetError as error:
        raise BudgetError(f"Task '{name}': {error}") from error
    extra = sum(
        (expert.spec(n).shape[0] - family.base.specs[n].shape[0])
        * (expert.spec(n).nbytes // expert.spec(n).shape[0])
        for n in expert.grown
    )
    return TaskPlan(
        coded=coded,
        private_bytes=extra + sum(expert.private_spec(n).nbytes for n in expert.private),
        private=(*expert.private, *expert.grown),
        bytes_in=sum(spec.nbytes for spec in expert.checkpoint.specs.values()),
    )


def _item_costs(family: Family, settings: PackSettings) -> Sequence[Sequence[int]]:
    """Working memory of each item of each stage.

    The first pass over all models, the merged reference if there is one, what all tasks share; then
    the coding of every expert.
    """
    experts = len(family.experts)
    codec = settings.codec().for_family([{}] * experts)
    base = family.base.specs
    stages = [costs_of_scanning(family, from_base=settings.vector == "task")]
    if settings.vector == "difference":
        for expert in family.experts.values():  # before there is anything to compare them with
            stages.append([checking_bytes(s) for s in expert.checkpoint.specs.values()])
        method = settings.merge(experts)
        job = job_of(family, lambda _: method)
        stages.append([job.cost(item) for item in job.items])
    if codec.shares:
        kept = sum(expert.kept_bytes for expert in family.experts.values())
        stages.append([kept + sharing_bytes(spec.numel, experts) for spec in base.values()])
    for name, expert in family.experts.items():
        own = family.shared_specs(name)
        coder = _codec(settings, own).for_family([{}] * experts)
        kept = expert.kept_bytes
        stages.append([kept + coding_bytes([coder], base[spec.name]) for spec in own])
    return stages


def _codec(settings: PackSettings, specs: Sequence[TensorSpec]) -> Codec:
    codec = settings.codec()
    if settings.budget is None:
        return codec
    budget = parse_size(settings.budget, percent=True)
    return within_budget(codec, specs, budget, settings.counting)
