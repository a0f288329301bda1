"""Merges a family into one ordinary checkpoint, streamed through bounded memory."""

import hashlib
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from personae._version import __version__
from personae.checkpoints import Checkpoint
from personae.checkpoints.modules import weight_layout
from personae.checkpoints.naming import shown
from personae.commands.merge_adapter import write_merged_adapter
from personae.commands.merge_job import MergeJob, settings_for
from personae.commands.merge_parts import LayersPlan, OpenedParts, open_parts
from personae.commands.merge_plan import plan_parts
from personae.commands.merge_rows import Rows, merge_rows
from personae.errors import CheckpointError, Faults
from personae.family.chunks import Chunk, Item
from personae.family.effects import (
    Effect,
    any_entry,
    effect_of,
    without_effect,
)
from personae.family.finite import converging, is_finite
from personae.family.opened import Family
from personae.methods import MergeMethod, NotFinite, Statistics
from personae.recipe import MergePart, MergeSettings, merge_recipe_text
from personae.run.output import check_output
from personae.run.passes import kept, passes_over_family, passes_over_tensor
from personae.run.undecided import UndecidedEntries
from personae.run.work import Work
from personae.writers import (
    JOURNAL,
    SHARD_BYTES,
    CheckpointWriter,
    Journal,
    finish,
    free_space,
    identity_text,
    output_directory,
    require_space,
    write_auxiliary_files,
)
from personae.writers.model_card import CardFacts, Source, model_card


@dataclass(frozen=True)
class Between:
    """A model that another recipe of the same file gives.

    Attributes:
        name: What recipes call it.
        identity: What tells it from every other where its files do not: it is not written.
    """

    name: str
    identity: Mapping[str, Any] | None = None


def merge(
    base: Any,
    experts: Mapping[str, Any],
    out: str | Path,
    method: MergeMethod | None = None,
    *,
    settings: MergeSettings | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    recipe: str | None = None,
    work: Work | None = None,
) -> Path:
    """Merge a family into one checkpoint directory.

    Args:
        base: Path, hub id, module or state dict of the base; None for difference vectors, which
            are relative to the experts' average.
        experts: Name to path, hub id, module or state dict of the expert, in recipe order.
        out: Directory to write; must not exist, or be empty.
        method: The method with its parameters, such as `TIES(density=0.2)`; by default the average.
        settings: Method, parameters and all else that a recipe says, in place of `method`.
        overwrite: Replace `out` if it exists.
        shard_bytes: Most bytes in one weight file.
        recipe: The recipe's text for the model card; by default written from the settings.
        work: Workers, memory bound, device, progress.

    Returns:
        The directory written.

    Raises:
        PersonaeError: for anything wrong with the input, all faults at once, before work starts
            (but for values that are not finite, which only reading finds).
    """
    settings = settings_for(base, settings, method, len(experts))
    part = MergePart(base=base, experts=experts, settings=settings)
    return merge_parts(
        [part], out, overwrite=overwrite, shard_bytes=shard_bytes, recipe=recipe, work=work
    )


def merge_parts(
    parts: Sequence[MergePart],
    out: str | Path,
    *,
    small_files: str | Checkpoint | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    recipe: str | None = None,
    work: Work | None = None,
    between: Mapping[str, Between] | None = None,
    beside: int = 0,
) -> Path:
    """Merge a family, or slices that are stacked on each other, into one checkpoint directory.

    Args:
        parts: What is merged, and how.
        out: As for `merge`.
        small_files: The model whose configuration and tokenizer the output has; by default the
            first part's base, or its first expert.
        overwrite: As for `merge`.
        shard_bytes: As for `merge`.
        recipe: As for `merge`.
        work: As for `merge`.
        between: Source of a model in between to what is known of it.
        beside: Bytes that computing what these give takes beside an item.

    Returns:
        The directory written.

    Raises:
        PersonaeError: as for `merge`.
    """
    work, out, between = work or Work(), Path(out).absolute(), between or {}
    models = [model for part in parts for model in (part.base, *part.experts.values())]
    check_output(out, overwrite, inputs=[*models, small_files])
    with open_parts(parts, small_files, beside=beside) as opened:
        plan = plan_parts(opened, work)
        for text in plan.notes:
            work.note(text)
        if opened.adapter is not None:
            return write_merged_adapter(
                opened.adapter, out, overwrite=overwrite, recipe=recipe, work=work
            )
        auxiliary_files = opened.auxiliary_files()
        require_space(out, plan.bytes_out)
        if free_space(out) < plan.bytes_out + plan.undecided_bytes:
            work.note(
                f"the disk could fill up: entries on which no sign wins take up to "
                f"{plan.undecided_bytes:,} bytes more while they wait (usually one in some "
                "hundreds is such); if it does, free some and run the same command, it goes on"
            )
        identity = identity_text(identity_of(opened, between) | {"shard_bytes": shard_bytes})
        if finish({out: f"{identity}\n"}, JOURNAL):
            work.note(f"an earlier run of this command had finished '{out}'")
            return out
        with output_directory(out, overwrite=overwrite, note=JOURNAL) as directory:
            with Journal(directory, identity) as journal:
                if journal.done:
                    done = min(len(journal.done), plan.items)
                    work.note(
                        f"going on with an interrupted run: {done} of {plan.items} items are done"
                    )
                lost = run(opened.jobs, directory, work, shard_bytes, journal)
                work.fact("unchanged", dict(lost))
                tell_lost(lost, opened.families[0], work)
                write_auxiliary_files(auxiliary_files, directory)
                card = merge_card(opened, recipe, between)
                (directory / "README.md").write_text(card, encoding="utf-8")
    return out


def identity_of(opened: OpenedParts, between: Mapping[str, Between]) -> dict[str, Any]:
    """What tells this merge from every other."""

    def weights(checkpoint: Checkpoint) -> Any:
        known = between.get(checkpoint.source)
        if known is not None and known.identity is not None:
            return known.identity
        return _weights_of(checkpoint)

    parts = [
        {
            "settings": part.settings.model_dump(mode="json"),
            "base": weights(family.base) if family.has_base else None,
            "experts": [weights(e.checkpoint) for e in family.experts.values()],
        }
        for part, family in zip(opened.parts, opened.families, strict=True)
    ]
    return {"parts": parts}


def run(
    jobs: Sequence[MergeJob],
    directory: Path,
    work: Work,
    shard_bytes: int = SHARD_BYTES,
    journal: Journal | None = None,
) -> dict[str, str]:
    """Write the weights of a merge into a directory, but for items that the journal has as done.

    Args:
        jobs: What is done, one after the other; together they have each tensor once.
        directory: Where.
        work: Workers, memory bound, device, progress.
        shard_bytes: Most bytes in one weight file.
        journal: What is done already.

    Returns:
        The tensors that came out as the base's although an expert has them otherwise and nobody
        asked to skip them, with the reason.

    Raises:
        CheckpointError: naming every weight that is not finite.
        OutputError: if the disk refuses.
    """
    bases = [job.family.base for job in jobs]
    lost: dict[str, str] = {}
    with CheckpointWriter(
        directory,
        [spec for job in jobs for spec in job.specs],
        shard_bytes=shard_bytes,
        tied={dropped: kept for base in bases for dropped, kept in base.tied.items()},
        copies={copy: dtype for job in jobs for copy, dtype in job.copies.items()},
        again=True,
        computed=frozenset[str]().union(*(job.merged for job in jobs)),
        **weight_layout(bases[0].auxiliary_files)._asdict(),
    ) as writer:
        for job in jobs:
            lost |= _run_job(job, directory, writer, work, journal)
    return lost


def _run_job(
    job: MergeJob,
    directory: Path,
    writer: CheckpointWriter,
    work: Work,
    journal: Journal | None,
) -> dict[str, str]:
    """Write the tensors of one job; see `run`.

    Raises:
        CheckpointError: naming every weight that is not finite.
        OutputError: if the disk refuses.
    """
    undecided = UndecidedEntries(directory, per_tensor=job.per_tensor)
    faults = Faults()
    before = set(journal.done) if journal else set[int]()
    if job.decides_at_the_end and job.last_step not in before:
        before = {number for number in before if undecided.has(number)}
    due = [item for item in job.items if item.number not in before]
    told = {number: journal.done[number] if journal else "" for number in before}
    seen = {name for name, effect in _by_name(job.items, told) if effect == "+"}
    for item in job.items:
        for chunk in item.chunks if item.number in before else ():
            writer.mark(chunk.spec.name, chunk.start, chunk.stop)
    statistics = _statistics(job, directory, work) if due else None
    for item, (found, effects) in work.map(
        due,
        partial(_merge_item, job, statistics, writer, undecided, work.torch_device, seen),
        cost=job.cost,
        stage=f"merging ({job.method.name})",
        done=len(job.items) - len(due),
        in_order=True,
    ):
        for fault in found:
            faults.add(fault)
        told[item.number] = effects
        if journal and not found:
            journal.add(item.number, effects)
    faults.raise_if_any(CheckpointError)
    if job.decides_at_the_end and job.last_step not in before:
        undecided.decide(job.items, writer, work)
        if journal:
            journal.add(job.last_step)
    undecided.clear()
    _statistics_file(job, directory).unlink(missing_ok=True)
    return without_effect(_by_name(job.items, told), job.method.name)


def _by_name(items: Sequence[Item], told: Mapping[int, str]) -> Iterator[tuple[str, str]]:
    """Name and effect of every chunk of the items that told theirs."""
    for item in items:
        for chunk, effect in zip(item.chunks, told.get(item.number, ""), strict=False):
            yield chunk.spec.name, effect


def tell_lost(lost: Mapping[str, str], family: Family, work: Work) -> None:
    """Say what came out as in the base although experts differ, and why."""
    whose = "the base" if family.has_base else f"the first expert, {next(iter(family.experts))}"
    for why in sorted(set(lost.values())):
        names = [name for name in lost if lost[name] == why]
        work.note(f"as in {whose}, although experts differ ({why}): {shown(names)}")


def _statistics(job: MergeJob, directory: Path, work: Work) -> Statistics | None:
    """What passes over the whole model find; from an earlier run of the same merge, if any."""
    if not job.method.has_passes() or job.per_tensor:
        return None

    def find() -> Statistics:
        stacks, items = job.stacks, job.merged_items
        late = job.decides_late
        return passes_over_family(job.method_of, stacks, items, job.cost, work, late=late)

    return kept(_statistics_file(job, directory), find)


def _statistics_file(job: MergeJob, directory: Path) -> Path:
    return directory / f"statistics-{job.first}.safetensors"


def _merge_item(
    job: MergeJob,
    statistics: Statistics | None,
    writer: CheckpointWriter,
    undecided: UndecidedEntries,
    device: torch.device,
    seen: set[str],
    item: Item,
) -> tuple[list[str], str]:
    """Merge and write one item, but for what is wrong.

    Args:
        job: What is done.
        statistics: What passes over the whole model found.
        writer: Where it is written.
        undecided: Where entries that are decided late wait.
        device: Where whole matrices are merged.
        seen: Tensors that are known to come out otherwise than in the base; more are added.
        item: The item.

    Returns:
        What is wrong with its weights, and the effect of each chunk.
    """
    faults: list[str] = []
    effects: list[str] = []
    left_open = undecided.of(item) if job.decides_late else None
    for spec, group in groupby(item.chunks, key=lambda chunk: chunk.spec):
        chunks = list(group)
        if spec.name not in job.merged:
            for chunk in chunks:
                try:
                    effects.append(job.stacks.left_alone(chunk))
                    _put(writer, chunk, job.stacks.reference(chunk))
                except NotFinite as error:  # of a model that is merged as it is read
                    faults += error.faults
            continue
        own = statistics
        if job.per_tensor:
            method = job.method_of(spec.name)
            try:
                own = passes_over_tensor(method, job.stacks, chunks, late=job.decides_late)
            except NotFinite as error:
                faults += error.faults or job.stacks.why_not_finite(chunks[0])
                continue
        for chunk in chunks:
            asked = job.family.has_base and spec.name not in seen
            try:
                rows = (
                    _merge_whole(job, own, chunk, device, asked)
                    if item.whole
                    else merge_rows(job, own, chunk, left_open, asked)
                )
            except NotFinite as error:
                faults += error.faults or job.stacks.why_not_finite(chunk)
                effects.append("+")
                continue
            effects.append(rows.effect)
            if rows.effect == "+":
                seen.add(spec.name)
            _put(writer, chunk, rows.value, finite=rows.finite)
            del rows  # not held beside the next
        if left_open is not None and job.per_tensor and not faults:
            left_open.decide(writer)
    if left_open is not None and job.decides_at_the_end and not faults:
        left_open.keep()
    return faults, "".join(effects)


def _effect(job: MergeJob, chunk: Chunk, value: Tensor, reference: Tensor, changed: bool) -> Effect:
    """The effect of a matrix whose deltas were at hand, and are 0 or not.

    What is lost is rare enough for the experts to be read again: do more than roundings differ?
    """
    dtype = job.dtype_of(chunk.spec.name)
    return effect_of(
        value, reference, dtype, lambda: changed and job.stacks.changed(chunk, reference)
    )


def _merge_whole(
    job: MergeJob,
    statistics: Statistics | None,
    chunk: Chunk,
    device: torch.device,
    asked: bool,
) -> Rows:
    """A matrix of the result; adapters enter as factors, where the method allows it.

    Raises:
        NotFinite: if a model holds values that are not.
    """
    name = chunk.spec.name
    method = job.method_of(name)
    stack, site, expand, reference = job.stacks.given(method, chunk, undivided=True)
    if reference is None:
        reference = job.stacks.reference(chunk).float()
    if not (is_finite(stack) and is_finite(reference)):
        raise NotFinite
    changed = asked and any_entry(stack)
    with converging(name):
        merged = method.apply(stack.to(device), statistics, site).cpu()
    value = expand(merged) + reference
    effect = _effect(job, chunk, value, reference, changed) if asked else "+"
    return Rows(value, False, effect)


def _put(writer: CheckpointWriter, chunk: Chunk, value: Tensor, *, finite: bool = False) -> None:
    if chunk.is_whole:
        writer.write(chunk.spec.name, value, finite=finite)
    else:
        rows = value[None] if chunk.is_matrix else value
        writer.write_rows(chunk.spec.name, chunk.start, rows, finite=finite)


def _weights_of(checkpoint: Checkpoint) -> list[Any]:
    """What tells that a model is the one an interrupted run read, from its headers alone."""
    path = Path(checkpoint.source).expanduser()
    if path.exists():
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        headers = hashlib.sha256(repr(sorted(checkpoint.specs.items())).encode()).hexdigest()
        return [str(path.resolve()), headers, [_stamp(file) for file in files]]
    if checkpoint.revision is not None:
        return [checkpoint.source, checkpoint.revision]
    return [uuid.uuid4().hex]  # a model in memory: nothing tells


def _stamp(file: Path) -> tuple[str, int, int, int, int]:
    """Name, size, times and place of a file: a copy that keeps its time has another place."""
    status = file.stat()
    return file.name, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def merge_card(
    opened: OpenedParts,
    recipe: str | None = None,
    between: Mapping[str, Between] | None = None,
) -> str:
    """The README of a merged model.

    It depends on what is merged and how alone, so that a merge done again writes the same bytes.

    Args:
        opened: What is merged, and how.
        recipe: The recipe's text; by default one is written from the settings.
        between: Source of a model in between to what is known of it.
    """
    (part, *others), family = opened.parts, opened.families[0]
    settings, method = part.settings, part.settings.merge_method()
    base = Source("base", family.base.source, family.base.revision) if family.has_base else None
    owns = settings.expert_parameters or ({},) * len(family.experts)
    experts = [
        Source(name, expert.checkpoint.source, expert.checkpoint.revision, own)
        for (name, expert), own in zip(family.experts.items(), owns, strict=True)
    ]
    places = {expert.name: expert.place for expert in experts}
    text = recipe or merge_recipe_text(base.place if base else None, places, settings)
    if others:
        experts, base = _sources(opened), None
    experts = [_renamed(expert, between or {}) for expert in experts]
    base = base and _renamed(base, between or {})
    facts = CardFacts(
        title=f"{', '.join(dict.fromkeys(one.name for one in experts))}: merged by {method.name}",
        method=method.name,
        summary=method.summary,
        paper=method.paper,
        conventions=method.conventions,
        parameters={} if others else _parameters(settings),
        base=base,
        experts=experts,
        recipe=text,
        versions={"personae": __version__, "torch": version("torch")},
        dtype=settings.dtype or "",
        tokenizer=settings.tokenizer_source or "",
        layers=[_layers(one) for one in opened.layers()],
    )
    return model_card(facts)


def _renamed(source: Source, between: Mapping[str, Between]) -> Source:
    for place, known in between.items():
        rest = source.place.removeprefix(place)
        if rest != source.place and rest[:1] in ("", "+"):
            return replace(source, place=known.name + rest)
    return source


def _sources(opened: OpenedParts) -> list[Source]:
    """Every model of all parts, each once."""
    found: dict[str, Source] = {}
    for family in opened.families:
        models = {"base": family.base} if family.has_base else {}
        models |= {name: expert.checkpoint for name, expert in family.experts.items()}
        for name, model in models.items():
            found.setdefault(model.source, Source(name, model.source, model.revision))
    return list(found.values())


def _layers(plan: LayersPlan) -> tuple[str, str, str]:
    """Layers of the output, what they are merged of, and how."""
    start, stop = plan.span
    of = f"{plan.module}: " if plan.module else ""
    sources = ", ".join(f"{name} {a} to {b - 1}" for name, (a, b) in plan.sources.items())
    return f"{of}{start} to {stop - 1}", sources, plan.method


def _parameters(settings: MergeSettings) -> dict[str, Any]:
    """Every parameter that is not each expert's own, with its default where nothing is said."""
    own = {name for expert in settings.expert_parameters for name in expert}
    return {
        name: settings.parameters.get(name, field.default)
        for name, field in settings.merge_method().fields().items()
        if name in settings.parameters or name not in own
    }
