"""What a merge will do, from headers alone: which tensors, bytes and memory, and what to know."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from personae.checkpoints.adapter import adapter_of
from personae.checkpoints.configuration import CONFIG
from personae.checkpoints.naming import patterns, shown
from personae.commands.merge_adapter import AdapterMerge, AdapterPlan
from personae.commands.merge_job import MergeJob, all_names, settings_for
from personae.commands.merge_parts import LayersPlan, OpenedParts, open_parts
from personae.family.configurations import disagreements, said_by
from personae.methods import MergeMethod
from personae.recipe import MergePart, MergeSettings
from personae.run.work import Work, check_memory, held_at_once
from personae.writers import with_copies

# Each answers the question of its task; a language model's lm_head is none of them.
_HEAD = re.compile(r"(^|\.)(classifier|score|qa_outputs|classification_head)\.")


@dataclass(frozen=True)
class MergePlan:
    """What a merge takes.

    Attributes:
        method: Its name.
        vector: Whether it merges task vectors, or difference vectors where there is no base.
        merged: Number of tensors merged.
        copied: Names of the tensors that stay as in the base.
        parameters: Floating parameters of the result.
        passes: Passes over the experts before they are merged, usually.
        bytes_in: Bytes of base and experts.
        bytes_read: Bytes read in all: once to merge, and for each pass.
        bytes_out: Bytes of the weights that are written.
        undecided_bytes: Bytes of disk that entries on which no sign wins take beside it until the
            majority is known, at most: as if all were such.
        peak_memory: Bytes of working memory with this number of workers.
        largest: Bytes of memory of the largest item: the least that `--memory` can be.
        workers: Number of workers.
        items: Number of work items.
        notes: What a person should know.
        layers: The layers of the output, where slices choose them.
        adapter: The adapter that is written, where one is.
        computed: Whether it is a model in between that is merged as it is read, and not written.
    """

    method: str
    vector: str
    merged: int
    copied: tuple[str, ...]
    parameters: int
    passes: int
    bytes_in: int
    bytes_read: int
    bytes_out: int
    undecided_bytes: int
    peak_memory: int
    largest: int
    workers: int
    items: int
    notes: list[str] = field(default_factory=list[str])
    layers: list[LayersPlan] = field(default_factory=list[LayersPlan])
    adapter: AdapterPlan | None = None
    computed: bool = False

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def plan_merge(
    base: Any,
    experts: Mapping[str, Any],
    settings: MergeSettings | None = None,
    work: Work | None = None,
    *,
    method: MergeMethod | None = None,
) -> MergePlan:
    """Plan a merge from headers: every fault they show, items, bytes, peak memory.

    Args:
        base: As for `merge`.
        experts: As for `merge`.
        settings: As for `merge`.
        work: Workers and memory bound.
        method: As for `merge`.

    Raises:
        PersonaeError: for anything wrong that headers tell, all faults at once.
    """
    settings = settings_for(base, settings, method, len(experts))
    with open_parts([MergePart(base=base, experts=experts, settings=settings)]) as opened:
        return plan_parts(opened, work or Work())


def plan_parts(opened: OpenedParts, work: Work) -> MergePlan:
    """What a merge takes, all parts together: they are done one after the other.

    Raises:
        BudgetError: if the memory bound is below the largest item.
    """
    if opened.adapter is not None:
        return _plan_adapter(opened.adapter, work)
    plans = [
        _plan_job(job, part.settings, work)
        for job, part in zip(opened.jobs, opened.parts, strict=True)
    ]
    computed = all(job.at_once for job in opened.jobs)
    return MergePlan(
        method=", ".join(dict.fromkeys(plan.method for plan in plans)),
        vector=plans[0].vector,
        merged=sum(plan.merged for plan in plans),
        copied=tuple(name for plan in plans for name in plan.copied),
        parameters=sum(plan.parameters for plan in plans),
        passes=max(plan.passes for plan in plans),
        bytes_in=sum(plan.bytes_in for plan in plans),
        bytes_read=sum(plan.bytes_read for plan in plans),
        bytes_out=0 if computed else sum(plan.bytes_out for plan in plans),
        undecided_bytes=max(plan.undecided_bytes for plan in plans),
        peak_memory=max(plan.peak_memory for plan in plans),
        largest=max(plan.largest for plan in plans),
        workers=work.threads,
        items=sum(plan.items for plan in plans),
        notes=list(dict.fromkeys([n for plan in plans for n in plan.notes] + opened.notes)),
        layers=opened.layers(),
        computed=computed,
    )


def _plan_adapter(merge: AdapterMerge, work: Work) -> MergePlan:
    """What a merge of adapters into one takes.

    Raises:
        BudgetError: if a bound on memory or on the adapter's size is too low.
    """
    job, adapter = merge.job, merge.plan()
    costs = merge.costs()
    check_memory(max(costs), work.memory, "The largest tensor")
    experts = [adapter_of(expert.checkpoint) for expert in job.family.experts.values()]
    stored = sum(one.stored_bytes for one in experts if one is not None)
    whole = sum(job.family.base.specs[n].nbytes for n in {*merge.joint.whole.values()})
    passes = job.method.usual_passes + job.method.can_decide_late
    return MergePlan(
        method=job.method.name,
        vector="task",
        merged=len(merge.joint.tensors),
        copied=(),
        parameters=sum(spec.numel for spec in merge.spec(merge.ranks()).specs),
        passes=1 + passes,
        bytes_in=stored + whole,
        bytes_read=(2 + passes) * (stored + whole),
        bytes_out=adapter.bytes,
        undecided_bytes=0,
        peak_memory=held_at_once(costs, work.threads, work.memory),
        largest=max(costs),
        workers=work.threads,
        items=len(costs),
        notes=_notes_of_models(job, merge.part.settings),
        adapter=adapter,
    )


def _plan_job(job: MergeJob, settings: MergeSettings, work: Work) -> MergePlan:
    """What a job takes, from headers.

    Raises:
        BudgetError: if the memory bound is below the largest item.
    """
    costs = [job.cost(item) for item in job.items]
    check_memory(max(costs, default=0), work.memory, "The largest tensor")
    family = job.family
    own = [family.base] if family.has_base else []
    checkpoints = [*own, *(expert.checkpoint for expert in family.experts.values())]
    voted_on = job.method.can_decide_late and job.stacks.experts > 1
    passes = job.method.usual_passes + (voted_on and not job.decides_late)
    bytes_in = sum(spec.nbytes for c in checkpoints for spec in c.specs.values())
    return MergePlan(
        method=job.method.name,
        vector="task" if family.has_base else "difference",
        merged=len(job.merged),
        copied=tuple(spec.name for spec in job.specs if spec.name not in job.merged),
        parameters=sum(spec.numel for spec in job.specs if spec.is_floating),
        passes=passes,
        bytes_in=bytes_in,
        bytes_read=bytes_in * (1 + passes),
        bytes_out=sum(spec.nbytes for spec in with_copies(job.specs, family.base.tied, job.copies)),
        undecided_bytes=job.undecided_bytes(work.threads),
        peak_memory=_peak_memory(job, costs, work),
        largest=max(costs, default=0),
        workers=work.threads,
        items=len(job.items),
        notes=_notes(job, settings),
    )


def _peak_memory(job: MergeJob, costs: Sequence[int], work: Work) -> int:
    """Peak of a job: of passes that count much, or of merging.

    Passes over each tensor alone are taken by whoever merges it. In those over the model each
    worker adds to what its item came to, and all of these to one more.
    """
    in_loops = job.in_blocks and not job.method.multiplies

    def held(peaks: Iterable[int]) -> int:
        return held_at_once(
            peaks, work.threads, work.memory, in_loops=in_loops, summed=not job.per_tensor
        )

    counting = map(job.counting_bytes, job.items)
    if job.per_tensor:
        return held(map(max, costs, counting))
    return max(held(costs), held(counting) + job.term_bytes)


def _notes_of_models(job: MergeJob, settings: MergeSettings) -> list[str]:
    """What is odd about base and experts, and patterns that match nothing."""
    family = job.family
    notes = family.base_notes if family.has_base else []
    for name, expert in family.experts.items():
        notes += expert.naming_notes
        if expert.private:
            notes.append(f"{name}: not in the base, so not merged: {shown(expert.private)}")
    if unlike := disagreements(family.models):
        keys = "; ".join(f"{key} {said_by(values)}" for key, values in unlike.items())
        notes.append(f"{CONFIG}: the models disagree: {keys}")
    for pattern in settings.unmatched(all_names(family)):
        notes.append(f"{pattern} matches no tensor; '*' matches any text")
    return notes


def _notes(job: MergeJob, settings: MergeSettings) -> list[str]:
    family, notes = job.family, _notes_of_models(job, settings)
    left = [s.name for s in job.specs if s.is_floating and s.name not in job.merged]
    whose = "the base" if family.has_base else f"the first expert, {next(iter(family.experts))}"
    if left:
        notes.append(f"left as in {whose}: {shown(left)}")
    statistics = job.stacks.statistics
    if statistics:
        told = "averaged" if job.merged.issuperset(statistics) else f"as in {whose}"
        notes.append(
            f"statistics of batch normalisation are {told}: {shown(statistics)}; compute them "
            "again by running data through the merged model in training mode"
        )
    heads = [name for name in sorted(job.merged) if _HEAD.search(name)]
    if heads:
        others = [spec.name for spec in job.specs if spec.name not in heads]
        notes.append(
            "merged like all other tensors, although their names are those of heads: "
            f"{shown(heads)}; to leave them as in {whose}: skip: {patterns(heads, others)}"
        )
    files = family.base.auxiliary_files
    if files and "config.json" not in files:
        notes.append(f"{whose} has no config.json, so the result has none: transformers needs one")
    return notes
