"""Packs a family: one reference and, for each expert, a file from which it can be rebuilt."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from personae.checkpoints import open_checkpoint
from personae.checkpoints.adapter import Adapter
from personae.checkpoints.family import Alignment, align, shown
from personae.errors import BudgetError, CheckpointError, Faults, PackError, RecipeError
from personae.execute.accounting import counted_bits, largest_rank_fraction
from personae.execute.deltas import Deltas, Facts, fingerprint, scan
from personae.execute.encode import encode_expert
from personae.execute.family import Family, open_family
from personae.execute.plan import check_output, plan_pack
from personae.execute.reference import write_merged_reference
from personae.execute.work import Work
from personae.methods import Codec
from personae.packs.manifest import Manifest, ReferenceRecord, RenamingRecord
from personae.packs.reader import Pack
from personae.packs.writer import (
    REFERENCE,
    CodedTensor,
    PackWriter,
    dtype_name,
    end_resume,
    resume,
)
from personae.recipe import PackSettings, parse_size
from personae.writers import output_directory, require_space


def pack(
    base: Any,
    experts: Mapping[str, Any],
    out: str | Path,
    *,
    settings: PackSettings | None = None,
    overwrite: bool = False,
    work: Work | None = None,
) -> Pack:
    """Pack a family into one directory.

    Args:
        base: Path, hub id, module or state dict of the base.
        experts: Task name to path, hub id, module or state dict of the expert.
        out: The pack's directory; must not exist, or be empty.
        settings: Codec, reference, budget; by default DTS-T at its paper's rank fraction.
        overwrite: Replace `out` if it exists.
        work: Workers, memory bound, progress.

    Returns:
        The pack, opened.

    Raises:
        PersonaeError: for anything wrong with the input, all faults at once, before work starts.
    """
    settings = settings or PackSettings()
    return pack_many(base, experts, {out: settings}, overwrite=overwrite, work=work)[0]


def pack_many(
    base: Any,
    experts: Mapping[str, Any],
    outs: Mapping[str | Path, PackSettings],
    *,
    overwrite: bool = False,
    work: Work | None = None,
) -> list[Pack]:
    """Pack one family at several ranks or budgets; each delta is decomposed once.

    Args:
        base: As for `pack`.
        experts: As for `pack`.
        outs: Directory to settings, which may differ in `rank_fraction` and budget alone.
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
    for out in variants:
        check_output(out, overwrite)
    first = next(iter(variants.values()))
    with open_family(base, experts, skip=first.skip, private=first.private) as family:
        for out, settings in variants.items():
            planned = plan_pack(family, settings, workers=work.workers, memory=work.memory)
            require_space(out, planned.bytes_out)
        scanned = _Scanned.of(family, work)
        if first.vector == "task":  # else facts are known only once the reference is there
            for settings in variants.values():
                for name, facts in scanned.facts.items():
                    _codec_for(settings, family, name, facts)
        with ExitStack() as stack:
            directories = [
                stack.enter_context(output_directory(out, overwrite=overwrite, resumable=True))
                for out in variants
            ]
            _fill(family, scanned, directories, list(variants.values()), work)
    return [Pack(out) for out in variants]


def add_tasks(
    pack_directory: str | Path,
    experts: Mapping[str, Any],
    *,
    base: Any = None,
    work: Work | None = None,
) -> Pack:
    """Add experts to an existing pack, with its codec, parameters and reference.

    Args:
        pack_directory: The pack.
        experts: Task name to the new expert.
        base: Where the reference is, if not where the pack says.
        work: Workers, memory bound, progress.

    Raises:
        PackError: if the pack has such a task already, or its reference is another.
        CheckpointError: if an expert cannot be read or does not fit.
    """
    work = work or Work()
    opened = Pack(Path(pack_directory))
    manifest = opened.manifest
    there = {name.lower() for name in manifest.tasks}  # file names may ignore case
    taken = [name for name in experts if name.lower() in there]
    if taken:
        raise PackError(
            f"{pack_directory} already has task(s) {shown(taken)}. "
            "Remove them first, or give the new ones other names."
        )
    source = base or opened.reference_directory or manifest.reference.source
    settings = PackSettings(**manifest.settings)
    with open_family(source, experts, skip=settings.skip, private=settings.private) as family:
        from_base = manifest.reference.kind == "base"
        if not from_base:
            _refuse_adapters(family)
        scanned = _Scanned.of(family, work, from_base)
        check_fingerprint(manifest.reference, scanned.reference, family.base.source)
        writer = PackWriter(opened.directory, manifest)
        _add_experts(family, scanned, [writer], [settings], work)
    return Pack(opened.directory)


def remove_task(pack_directory: str | Path, name: str) -> Pack:
    """Remove one task from a pack.

    Raises:
        PackError: if the directory is no pack or has no such task.
    """
    opened = Pack(Path(pack_directory))
    opened.task(name)
    PackWriter(opened.directory, opened.manifest).remove_task(name)
    return Pack(opened.directory)


def check_fingerprint(reference: ReferenceRecord, found: str, source: str) -> None:
    """Check that a checkpoint is the reference a pack was made from.

    Raises:
        PackError: if its weights are others.
    """
    if found != reference.fingerprint:
        raise PackError(
            f"{source} is not the reference this pack was made from: its fingerprint is {found}, "
            f"the pack was made from {reference.source} with {reference.fingerprint}. "
            "Give the right one with --base."
        )


def _refuse_adapters(family: Family) -> None:
    """An adapter was read as if it sat on the merged reference, but it was trained on the base.

    Raises:
        CheckpointError: naming every expert that is one.
    """
    faults = Faults()
    for name, expert in family.experts.items():
        if isinstance(expert.checkpoint, Adapter):
            faults.add(
                f"Expert '{name}' is an adapter, which a pack relative to a merged model cannot "
                "take. Merge it into its base (PEFT: merge_and_unload) and add the result."
            )
    faults.raise_if_any(CheckpointError)


@dataclass(frozen=True)
class _Scanned:
    """The reference's fingerprint, and what a first look at each expert told."""

    reference: str
    facts: dict[str, Facts]

    @classmethod
    def of(cls, family: Family, work: Work, from_base: bool = True) -> "_Scanned":
        """Read every weight once; `from_base` as in `Deltas`.

        Raises:
            CheckpointError: naming every weight that is not finite, and experts equal to the base.
        """
        faults = Faults()
        found = fingerprint(family.base, workers=work.threads, faults=faults, label="The base")
        facts: dict[str, Facts] = {}
        for done, (name, expert) in enumerate(family.experts.items(), 1):
            facts[name] = scan(
                Deltas(expert, family.base, from_base),
                workers=work.threads,
                memory=work.memory,
                faults=faults,
            )
            expert.checkpoint.close()
            work.progress("reading the family", done, len(family.experts))
        faults.raise_if_any(CheckpointError)
        return cls(found, facts)


def _check_alike(settings: Sequence[PackSettings]) -> None:
    """Several packs share decompositions only if nothing but the rank differs.

    Raises:
        RecipeError: if something else does.
    """
    stripped = [one.without_rank() for one in settings]
    if any(one != stripped[0] for one in stripped):
        raise RecipeError(
            "Settings of packs made together differ in more than rank_fraction and budget. "
            "Make these packs one by one."
        )


def _fill(
    family: Family,
    scanned: _Scanned,
    directories: Sequence[Path],
    settings: Sequence[PackSettings],
    work: Work,
) -> None:
    """Write the packs into their (partial) directories, going on where a killed run stopped."""
    writers: list[PackWriter] = []
    experts = {name: facts.fingerprint for name, facts in scanned.facts.items()}
    for directory, setting in zip(directories, settings, strict=True):
        identity = {
            "settings": setting.model_dump(mode="json"),
            "base": scanned.reference,
            "experts": experts,
        }
        manifest = resume(directory, identity)
        if manifest is None:
            record = _reference(family, scanned, setting, directory, work)
            asked = setting.model_dump(exclude={"reference", "reference_parameters"})
            manifest = Manifest(**asked, reference=record)
        writers.append(PackWriter(directory, manifest))
        writers[-1].save()
    if settings[0].vector == "difference":
        with _relative_to_merged(family, directories[0] / REFERENCE, settings[0]) as relative:
            again = _Scanned.of(relative, work, from_base=False)
            _add_experts(relative, again, writers, settings, work)
    else:
        _add_experts(family, scanned, writers, settings, work)
    for writer in writers:
        writer.order_tasks(list(family.experts))
        end_resume(writer.directory)


def _reference(
    family: Family, scanned: _Scanned, settings: PackSettings, directory: Path, work: Work
) -> ReferenceRecord:
    """The record of the reference; a merged one is written first."""
    base = family.base
    if settings.vector == "task":
        return ReferenceRecord(
            kind="base",
            source=base.source,
            revision=base.revision,
            fingerprint=scanned.reference,
        )
    method, parameters = settings.merge()
    write_merged_reference(
        family,
        method,
        parameters,
        directory / REFERENCE,
        workers=work.threads,
        memory=work.memory,
        progress=work.progress,
    )
    faults = Faults()
    merged = open_checkpoint(directory / REFERENCE)
    found = fingerprint(merged, workers=work.threads, faults=faults, label="The merged reference")
    merged.close()
    faults.raise_if_any(CheckpointError)
    return ReferenceRecord(
        kind="merged",
        source=REFERENCE,
        fingerprint=found,
        method=method.name,
        method_parameters=parameters.model_dump(mode="json"),
        experts=tuple(family.experts),
    )


def _relative_to_merged(family: Family, directory: Path, settings: PackSettings) -> Family:
    """The same experts, aligned with the merged reference as it stands on disk."""
    merged = open_checkpoint(directory)
    experts = {name: expert.checkpoint for name, expert in family.experts.items()}
    return Family(merged, align(merged, experts, skip=settings.skip, private=settings.private))


def _add_experts(
    family: Family,
    scanned: _Scanned,
    writers: Sequence[PackWriter],
    settings: Sequence[PackSettings],
    work: Work,
) -> None:
    for name, expert in family.experts.items():
        facts = scanned.facts[name]
        due = [name not in writer.manifest.tasks for writer in writers]
        if not any(due):
            continue
        # All codecs, also where the task is done: the largest rank decides how it is decomposed.
        codecs = [_codec_for(setting, family, name, facts) for setting in settings]
        from_base = writers[0].manifest.reference.kind == "base"
        coded = encode_expert(
            Deltas(expert, family.base, from_base),
            codecs,
            facts.tensors,
            workers=work.threads,
            memory=work.memory,
            device=work.torch_device,
            progress=work.progress,
        )
        for writer, codec, tensors, wanted in zip(writers, codecs, coded, due, strict=True):
            if wanted:
                _write_task(writer, codec, family, expert, facts, tensors)
        expert.checkpoint.close()


def _codec_for(settings: PackSettings, family: Family, name: str, facts: Facts) -> Codec:
    """The codec, at the largest rank the budget allows this expert.

    Raises:
        BudgetError: if it allows none.
    """
    codec = settings.codec()
    if settings.budget is None:
        return codec
    try:
        fraction = largest_rank_fraction(
            codec,
            family.shared_specs(name),
            parse_size(settings.budget, percent=True),
            settings.counting,
            facts.tensors,
        )
    except BudgetError as error:
        raise BudgetError(f"Task '{name}': {error}") from error
    return codec.model_copy(update={"rank_fraction": fraction})


def _write_task(
    writer: PackWriter,
    codec: Codec,
    family: Family,
    expert: Alignment,
    facts: Facts,
    coded: Mapping[str, CodedTensor],
) -> None:
    rule = expert.renaming
    reference = family.base.specs
    shared = family.shared_specs(expert.name)
    counted, lean = counted_bits(codec, shared, {name: t.ranks for name, t in coded.items()})
    writer.add_task(
        expert.name,
        coded,
        _private(expert, family, facts),
        expert.checkpoint.companions,
        family.base.companions,
        source=expert.checkpoint.source,
        revision=expert.checkpoint.revision,
        fingerprint=facts.fingerprint,
        parameters=codec.model_dump(mode="json"),
        renaming=RenamingRecord(add=rule.add, strip=rule.strip, plain=tuple(sorted(rule.plain))),
        grown=expert.grown,
        absent=expert.absent,
        dtypes={
            name: dtype_name(expert.spec(name).dtype)
            for name in expert.shared
            if expert.spec(name).dtype != reference[name].dtype
        },
        tied=dict(expert.tied),
        base_parameters=sum(spec.numel for spec in shared),
        base_bytes=sum(spec.nbytes for spec in shared),
        counted_bits=counted,
        counted_lean_bits=lean,
    )


def _private(expert: Alignment, family: Family, facts: Facts) -> dict[str, Tensor]:
    """What is kept whole: private tensors, extra rows of grown ones, buffers with other values."""
    checkpoint = expert.checkpoint
    whole = {name: checkpoint.read(expert.files[name]) for name in expert.private}
    for name in expert.grown:
        rows, own = family.base.specs[name].shape[0], expert.spec(name)
        extra = checkpoint.read_rows(expert.files[name], rows, own.shape[0])
        whole[expert.renaming.expert_name(name)] = extra
    for name in facts.differing_buffers:
        whole[expert.renaming.expert_name(name)] = checkpoint.read(expert.files[name])
    return whole
