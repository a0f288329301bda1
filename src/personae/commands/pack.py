"""Packs a family: one reference and, for each expert, a file from which it can be rebuilt."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from personae._types import Characteristics
from personae.checkpoints.adapter import adapter_of
from personae.checkpoints.naming import is_safe_name
from personae.commands.add_experts import add_experts, codec_for
from personae.commands.describe import checked
from personae.commands.pack_plan import check_no_base_needed, pack_notes, pack_settings, plan_family
from personae.commands.packed import Pack
from personae.commands.reference import make_reference, relative_to_merged
from personae.errors import CheckpointError, Faults, PackError, RecipeError
from personae.family.opened import Family, open_family
from personae.methods import Codec
from personae.packs.manifest import MANIFEST_NAME, REFERENCE, TASKS, Manifest
from personae.packs.soundness import own_path
from personae.packs.writer import PackWriter, begun
from personae.recipe import PackSettings, settings_from
from personae.run.output import check_output
from personae.run.reference import check_fingerprint, note_source
from personae.run.scan import Scanned
from personae.run.work import Work
from personae.writers import (
    JOURNAL,
    finish,
    identity_text,
    locked,
    output_directories,
    require_place,
    require_space,
)


def pack(
    base: Any,
    experts: Mapping[str, Any],
    out: str | Path,
    codec: Codec | None = None,
    *,
    budget: str | None = None,
    settings: PackSettings | None = None,
    characteristics: Characteristics | None = None,
    overwrite: bool = False,
    work: Work | None = None,
) -> Pack:
    """Pack a family into one directory.

    Args:
        base: Path, hub id, module or state dict of the base. None: there is none; difference
            vectors are relative to the experts' average, over the tensors all have in one shape.
        experts: Task name to path, hub id, module or state dict of the expert.
        out: The pack's directory; must not exist, or be empty.
        codec: The codec with its parameters, such as `DTS(rank_fraction=0.1)`; by default DTS at
            its paper's rank fraction.
        budget: What a task may cost, such as "1%" or "900KB", in place of a rank fraction.
        settings: Codec, reference, budget and all else that a recipe says, in place of both.
        characteristics: Task name to what the task is about, class names or a description, kept in
            the pack; if not given, the class names in the `id2label` of the expert's config.json.
        overwrite: Replace `out` if it exists.
        work: Workers, memory bound, progress.

    Returns:
        The pack, opened.

    Raises:
        PersonaeError: for anything wrong with the input, all faults at once, before work starts.
    """
    settings = pack_settings(settings, codec, budget)
    made = pack_many(
        base,
        experts,
        {out: settings},
        characteristics=characteristics,
        overwrite=overwrite,
        work=work,
    )
    return made[0]


def pack_many(
    base: Any,
    experts: Mapping[str, Any],
    outs: Mapping[str | Path, PackSettings],
    *,
    characteristics: Characteristics | None = None,
    overwrite: bool = False,
    work: Work | None = None,
) -> list[Pack]:
    """Pack one family at several ranks, budgets or ablations; each delta is decomposed once.

    Args:
        base: As for `pack`.
        experts: As for `pack`.
        outs: Directory to settings, which may differ in budget and the codec's `free` parameters
            (of DTS the rank fraction and whatever happens after the decomposition).
        characteristics: As for `pack`.
        overwrite: Replace directories that exist.
        work: Workers, memory bound, progress.

    Returns:
        The packs, opened, in the order of `outs`.

    Raises:
        PersonaeError: for anything wrong with the input, all faults at once, before work starts.
    """
    work = work or Work()
    variants = {Path(out).absolute(): settings for out, settings in outs.items()}
    _check_alike(list(variants.values()))
    described = checked(characteristics or {}, experts)
    ended = any((out / JOURNAL).is_file() for out in variants)
    for out in variants:
        check_output(out, overwrite or ended, inputs=[base, *experts.values()])
    first = next(iter(variants.values()))
    if base is None:
        check_no_base_needed(first, len(experts))
    with open_family(
        base, experts, skip=first.skip, private=first.private, for_pack=True
    ) as family:
        for text in pack_notes(family, first):
            work.note(text)
        for out, settings in variants.items():
            # What a task vector leaves unchanged is free, which headers cannot tell: a budget on
            # task vectors is judged after a pass over the weights.
            told = settings if settings.vector == "difference" else settings.without_budget()
            planned = plan_family(family, told, work)
            require_space(out, planned.bytes_out)
        scanned = Scanned.of(family, work) if family.has_base else Scanned.of_weights(family, work)
        if first.vector == "task":  # else zeros are known only once the reference is there
            for settings in variants.values():
                for name, scan in scanned.experts.items():
                    codec_for(settings, family, name, scan)
        runs = {out: _identity(one, scanned, described) for out, one in variants.items()}
        together = json.dumps([str(out) for out in variants])
        if finish({out: f"{text}\n{together}\n" for out, text in runs.items()}, JOURNAL):
            work.note("an earlier run of this command had finished every pack")
            return [Pack(out) for out in variants]
        with output_directories(list(variants), overwrite=overwrite, note=JOURNAL) as partials:
            started = dict(zip(partials, runs.values(), strict=True))
            _fill(family, scanned, started, together, list(variants.values()), described, work)
    return [Pack(out) for out in variants]


def add_tasks(
    pack_directory: str | Path,
    experts: Mapping[str, Any],
    *,
    base: Any = None,
    characteristics: Characteristics | None = None,
    work: Work | None = None,
) -> Pack:
    """Add experts to an existing pack, with its codec, parameters and reference.

    Args:
        pack_directory: The pack.
        experts: Task name to the new expert.
        base: Where the reference is, if not where the pack says.
        characteristics: As for `pack`.
        work: Workers, memory bound, progress.

    Raises:
        PackError: if the pack has such a task already, or its reference is another.
        CheckpointError: if an expert cannot be read or does not fit.
    """
    work = work or Work()
    described = checked(characteristics or {}, experts)
    with locked(Pack(Path(pack_directory)).directory):
        opened = Pack(Path(pack_directory))  # as it is now that nobody else changes it
        require_place(opened.directory / MANIFEST_NAME)
        manifest = opened.manifest
        settings = settings_of(opened)
        for name in experts:  # links are told before the work
            own_path(opened.directory, f"{TASKS}/{name}")
            own_path(opened.directory, f"{TASKS}/{name}.safetensors")
        note_source(opened, base, work)
        source = opened.reference_source(base)
        with open_family(
            source,
            experts,
            skip=settings.skip,
            private=settings.private,
            for_pack=True,
            spared={n for task in manifest.tasks.values() for n in (*task.absent, *task.spared)},
        ) as family:
            from_base = manifest.reference.kind == "base"
            if not from_base:
                _refuse_adapters(family)
            scanned = Scanned.of(family, work, from_base)
            check_fingerprint(manifest.reference, scanned.reference, family.base.source)
            _refuse_taken(opened, scanned)
            writers = [PackWriter(opened.directory, manifest)]
            add_experts(family, scanned, writers, [settings], work, described)
    if writers[0].manifest.unrouted:
        work.note(
            f"the pack's router has no example of {', '.join(writers[0].manifest.unrouted)}, and "
            "is not used until it is fitted again"
        )
    return Pack(opened.directory)


def settings_of(pack: Pack) -> PackSettings:
    """What a pack was made with.

    Raises:
        PackError: if it could not have been.
    """
    try:
        return settings_from(pack.manifest.settings)
    except RecipeError as error:
        raise PackError(
            f"{pack.directory} records settings that no pack can have: {error}"
        ) from error


def remove_task(pack_directory: str | Path, name: str) -> Pack:
    """Remove one task from a pack.

    Raises:
        PackError: if the directory is no pack or has no such task.
    """
    with locked(Pack(Path(pack_directory)).directory):
        opened = Pack(Path(pack_directory))
        writer = PackWriter(opened.directory, opened.manifest)
        if not (is_safe_name(name) and writer.left_of(name)):  # else a killed removal is ended
            opened.task(name)
        writer.remove_task(name)
    return Pack(opened.directory)


def _refuse_taken(pack: Pack, scanned: Scanned) -> None:
    """A task of that name may stand only if it is the same expert: an interrupted run, repeated.

    Raises:
        PackError: naming every task that is another expert.
    """
    faults = Faults()
    there = {name.lower(): name for name in pack.manifest.tasks}  # file names may ignore case
    for name, scan in scanned.experts.items():
        taken = there.get(name.lower())
        if taken and (taken != name or pack.manifest.tasks[taken].fingerprint != scan.fingerprint):
            faults.add(
                f"{pack.directory} already has a task '{taken}'. Remove it first, or give the new "
                "one another name."
            )
    faults.raise_if_any(PackError)


def _refuse_adapters(family: Family) -> None:
    """An adapter was read as if it sat on the merged reference, but it was trained on the base.

    Raises:
        CheckpointError: naming every expert that is one.
    """
    faults = Faults()
    for name, expert in family.experts.items():
        if adapter_of(expert.checkpoint):
            faults.add(
                f"Expert '{name}' is an adapter, which a pack relative to a merged model cannot "
                "take. Merge it into its base (PEFT: merge_and_unload) and add the result."
            )
    faults.raise_if_any(CheckpointError)


def _check_alike(settings: Sequence[PackSettings]) -> None:
    """Several packs share decompositions only if those would be the same.

    Raises:
        RecipeError: if settings differ in what decompositions depend on.
    """
    common = [one.common() for one in settings]
    if any(one != common[0] for one in common):
        free = ", ".join(sorted(settings[0].codec().free)) or "nothing"
        raise RecipeError(
            "Packs made together may differ only in the budget and in parameters that one "
            f"decomposition serves (for {settings[0].method}: {free}). Make these packs one by "
            "one."
        )


def _fill(
    family: Family,
    scanned: Scanned,
    directories: Mapping[Path, str],
    together: str,
    settings: Sequence[PackSettings],
    characteristics: Mapping[str, tuple[str, ...]],
    work: Work,
) -> None:
    """Write the packs into their (partial) directories, going on where a killed run stopped.

    Directories come with the line that tells the run which makes them; `together` tells all.
    """
    writers: list[PackWriter] = []
    for (directory, identity), setting in zip(directories.items(), settings, strict=True):
        manifest = begun(directory, identity, together)
        if manifest is None:
            record = make_reference(family, scanned.reference, setting, directory, work)
            asked = setting.model_dump(exclude={"reference", "reference_parameters"})
            manifest = Manifest(**asked, reference=record)
        writers.append(PackWriter(directory, manifest))
        writers[-1].save()
    if settings[0].vector == "difference":
        merged = writers[0].directory / REFERENCE
        with relative_to_merged(family, merged, settings[0]) as relative:
            again = Scanned.of(relative, work, from_base=False)
            add_experts(relative, again, writers, settings, work, characteristics)
    else:
        add_experts(family, scanned, writers, settings, work, characteristics)
    for writer in writers:
        writer.order_tasks(list(family.experts))


def _identity(
    settings: PackSettings, scanned: Scanned, characteristics: Mapping[str, tuple[str, ...]]
) -> str:
    """The line that tells a run which makes a pack from every other."""
    return identity_text(
        {
            "settings": settings.model_dump(mode="json"),
            "base": scanned.reference,
            "experts": [(name, scan.fingerprint) for name, scan in scanned.experts.items()],
            "characteristics": {name: list(texts) for name, texts in characteristics.items()},
        }
    )
