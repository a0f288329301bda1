"""Codes experts and writes them into packs, one after the other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from personae.checkpoints.naming import shown
from personae.commands.accounting import cost, paper_bits, within_budget
from personae.commands.describe import class_names
from personae.errors import BudgetError
from personae.family.align import Alignment
from personae.family.deltas import Deltas
from personae.family.opened import Family
from personae.family.small_files import small_files
from personae.methods import Block, Codec
from personae.packs.manifest import RenamingRecord, TaskRecord
from personae.packs.reader import Pack
from personae.packs.writer import CodedTensor, PackWriter
from personae.recipe import PackSettings, parse_size
from personae.run.encode import encode_expert
from personae.run.known import Known, write_shared
from personae.run.passes import passes_over_expert
from personae.run.rebuilt import left_in_words
from personae.run.scan import ExpertScan, Scanned
from personae.run.work import Work

_NOT_CODED = "no rank, no entry or no bit was left for it"
_TOO_SMALL = "the decoded change is too small for its dtype"
_SLACK_BITS = 8 * 192
"""What `HEADER_BYTES` leaves beside any usual header, enough for a few isolated zeros."""


def add_experts(
    family: Family,
    scanned: Scanned,
    writers: Sequence[PackWriter],
    settings: Sequence[PackSettings],
    work: Work,
    characteristics: Mapping[str, tuple[str, ...]],
) -> None:
    """Code every expert that a pack still lacks, once for all packs, and write its task file.

    Args:
        family: The reference and the experts, aligned.
        scanned: What a first pass found.
        writers: The packs.
        settings: Of each pack; they differ in rank fraction and budget alone.
        work: Workers, memory bound, device, progress.
        characteristics: Task name to what the task is about; else its config's class names.

    Raises:
        BudgetError: if a budget cannot be met.
    """
    from_base = writers[0].manifest.reference.kind == "base"
    all_deltas = {
        name: Deltas(expert, family.base, from_base) for name, expert in family.experts.items()
    }
    due = [name for name in family.experts if any(name not in w.manifest.tasks for w in writers)]
    known = _know(all_deltas, due, scanned, writers, settings, family, work)
    filled = _filled_in(writers[0], settings[0], known)
    lost: dict[Path, dict[str, dict[str, str]]] = {writer.directory: {} for writer in writers}
    for name, expert in family.experts.items():
        if name not in due:
            work.note(f"{name}: done by an earlier run")
            continue
        scan = scanned.experts[name]
        coding = _Coding(all_deltas[name], scan, known[name], filled, family, work)
        codecs, coded = coding.within_budgets(settings)
        for writer, codec, tensors in zip(writers, codecs, coded, strict=True):
            if name not in writer.manifest.tasks:
                about = characteristics.get(name) or class_names(expert.checkpoint.auxiliary_files)
                _write_task(writer, codec, family, expert, scan, tensors, about)
                record = writer.manifest.tasks[name]
                lost[writer.directory][name] = _note_what_is_not_coded(
                    name, codec, tensors, record, work
                )
        expert.checkpoint.close()
    work.fact("unchanged", list(lost.values()))


def _know(
    deltas: Mapping[str, Deltas],
    due: Sequence[str],
    scanned: Scanned,
    writers: Sequence[PackWriter],
    settings: Sequence[PackSettings],
    family: Family,
    work: Work,
) -> dict[str, Known]:
    """What the codec has to know of each expert that is due; what is shared is written first."""
    codec, writer = settings[0].codec(), writers[0]
    if codec.shares and writer.manifest.shared is None:
        write_shared(codec, list(deltas.values()), scanned.experts, writer, work)
    elif codec.shares and due:
        work.note(
            "coded against the part that the pack's tasks already share, which does not change"
        )
    shared = Pack(writer.directory).open_shared() if codec.shares else None
    known: dict[str, Known] = {}
    for name in due:
        own = codec_for(settings[0], family, name, scanned.experts[name]).for_task(name)
        known[name] = Known(name, shared)
        found = passes_over_expert(own, deltas[name], scanned.experts[name], known[name], work)
        known[name] = Known(name, shared, found)
        deltas[name].alignment.checkpoint.close()
    return known


def _filled_in(
    writer: PackWriter, settings: PackSettings, known: Mapping[str, Known]
) -> dict[str, Any]:
    """Parameters that depend on the family: as the pack's tasks have them, or from all experts."""
    codec = settings.codec()
    for task in writer.manifest.tasks.values():
        return {name: task.parameters[name] for name in codec.of_family}
    codec = codec.for_family([one.statistics or {} for one in known.values()])
    return {name: getattr(codec, name) for name in codec.of_family}


def _note_what_is_not_coded(
    task: str, codec: Codec, coded: Mapping[str, CodedTensor], record: TaskRecord, work: Work
) -> dict[str, str]:
    """Say which tensors that changed are left as in the reference, or kept exact.

    Returns:
        The tensors that are rebuilt as in the reference, with the reason.
    """
    left = left_in_words(record)
    fraction = codec.model_dump().get("rank_fraction")
    why = "" if fraction is None else f"rank 0 at rank fraction {fraction:.3g}, so "
    if left:
        work.note(f"{task}: {why}{left}")
    exact = [key for key, tensor in coded.items() if tensor.shape and tensor.treatment == "exact"]
    if exact:
        work.note(f"{task}: not coded, kept exact: {shown(exact)}")
    remark = codec.remark(
        (Block(*block).shape_in(tensor.shape), parts)
        for tensor in coded.values()
        if tensor.treatment == "code"
        for block, parts in zip(tensor.blocks, tensor.parts, strict=True)
    )
    if remark:
        work.note(f"{task}: {remark}")
    lost = [key for key, tensor in coded.items() if tensor.nbytes and not tensor.shows]
    if lost:
        work.note(
            f"{task}: rebuilt as in the reference, although the expert differs ({_TOO_SMALL}): "
            f"{shown(lost)}"
        )
    return dict.fromkeys(record.left, _NOT_CODED) | dict.fromkeys(lost, _TOO_SMALL)


@dataclass(frozen=True)
class _Coding:
    """What coding one expert needs."""

    deltas: Deltas
    scan: ExpertScan
    known: Known
    filled: Mapping[str, Any]
    family: Family
    work: Work

    def within_budgets(
        self, settings: Sequence[PackSettings]
    ) -> tuple[list[Codec], list[dict[str, CodedTensor]]]:
        """Code one expert with the codec of each pack, at the largest rank its budget allows.

        Exact zeros inside a factor are known only once it is there, and cost a little. Where a code
        comes out larger than foreseen, it is made again with that much held back.
        """
        spare = [0] * len(settings)
        while True:
            # All packs, also where the task is done: the largest rank decides how it is decomposed.
            codecs = [self._codec(*pair) for pair in zip(settings, spare, strict=True)]
            scan = self.scan.tensors
            coded = encode_expert(self.deltas, codecs, scan, self.known, self.work)
            excess = [self._excess(*three) for three in zip(settings, codecs, coded, strict=True)]
            if all(bits <= room + _SLACK_BITS for bits, room in zip(excess, spare, strict=True)):
                return codecs, coded
            spare = [max(pair) for pair in zip(spare, excess, strict=True)]

    def _codec(self, settings: PackSettings, reserve: int) -> Codec:
        task = self.known.task
        codec = codec_for(settings, self.family, task, self.scan, reserve)
        return codec.model_copy(update=dict(self.filled)).for_task(task)

    def _excess(
        self, settings: PackSettings, codec: Codec, coded: Mapping[str, CodedTensor]
    ) -> int:
        """Bits beyond those foreseen, where a budget is to be held."""
        if settings.budget is None:
            return 0
        shared = self.family.shared_specs(self.known.task)
        foreseen = cost(codec, shared, self.scan.tensors).stored
        return 8 * sum(tensor.nbytes for tensor in coded.values()) - foreseen


def codec_for(
    settings: PackSettings, family: Family, name: str, scan: ExpertScan, reserve: int = 0
) -> Codec:
    """The codec, at the largest rank or size that the budget allows this expert.

    Raises:
        BudgetError: if it allows none.
    """
    codec = settings.codec()
    if settings.budget is None:
        return codec
    try:
        return within_budget(
            codec,
            family.shared_specs(name),
            parse_size(settings.budget, percent=True),
            settings.counting,
            scan.tensors,
            reserve=reserve + 8 * _header_bytes(family.experts[name]),
        )
    except BudgetError as error:
        raise BudgetError(f"Task '{name}': {error}") from error


def _header_bytes(expert: Alignment) -> int:
    """Bytes that private tensors add to the header of the task file, at most."""
    return sum(len(name) + 128 for name in (*expert.private, *expert.grown, *expert.buffers))


def _write_task(
    writer: PackWriter,
    codec: Codec,
    family: Family,
    expert: Alignment,
    scan: ExpertScan,
    coded: Mapping[str, CodedTensor],
    characteristics: tuple[str, ...],
) -> None:
    rule = expert.renaming
    reference = family.base.specs
    shared = family.shared_specs(expert.name)
    paper, lean = paper_bits(codec, shared, {name: t.ranks for name, t in coded.items()})
    if codec.counts_stored:
        paper = lean = 8 * sum(tensor.nbytes for tensor in coded.values())
    writer.add_task(
        expert.name,
        coded,
        _private(expert, family, scan),
        small_files(expert, family.base)[0],
        family.base.auxiliary_files,
        source=expert.checkpoint.source,
        revision=expert.checkpoint.revision,
        fingerprint=scan.fingerprint,
        parameters=codec.model_dump(mode="json"),
        renaming=RenamingRecord(
            add=rule.add,
            strip=rule.strip,
            plain=tuple(sorted(rule.plain)),
            given=dict(sorted(rule.given.items())),
        ),
        grown=expert.grown,
        absent=tuple(sorted((*expert.absent, *expert.copies))),
        spared=expert.spared,
        dtypes={
            name: expert.spec(name).dtype_name
            for name in expert.shared
            if expert.spec(name).dtype != reference[name].dtype
        },
        tied=dict(expert.tied),
        base_parameters=sum(spec.numel for spec in shared),
        base_bytes=sum(spec.nbytes for spec in shared),
        counted_bits=paper,
        counted_lean_bits=lean,
        characteristics=characteristics,
    )


def _private(expert: Alignment, family: Family, scan: ExpertScan) -> dict[str, Tensor]:
    """What is kept whole: private tensors, extra rows of grown ones, buffers with other values."""
    checkpoint = expert.checkpoint
    whole = {name: checkpoint.read(raw) for name, raw in expert.private_files.items()}
    for name in expert.grown:
        rows, own = family.base.specs[name].shape[0], expert.spec(name)
        extra = checkpoint.read_rows(expert.files[name], rows, own.shape[0])
        whole[expert.renaming.expert_name(name)] = extra
    for name in scan.differing_buffers:
        whole[expert.renaming.expert_name(name)] = checkpoint.read(expert.files[name])
    return whole
