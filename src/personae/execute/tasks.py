"""Codes experts and writes them into packs, one after the other."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from personae.checkpoints.family import Alignment
from personae.checkpoints.naming import shown
from personae.errors import BudgetError
from personae.execute.accounting import cost, counted_bits, largest_rank_fraction
from personae.execute.deltas import Deltas
from personae.execute.describe import class_names
from personae.execute.encode import encode_expert
from personae.execute.family import Family
from personae.execute.scan import Facts, Scanned
from personae.execute.work import Work
from personae.methods import Codec
from personae.packs.manifest import RenamingRecord
from personae.packs.writer import CodedTensor, PackWriter, dtype_name
from personae.recipe import PackSettings, parse_size

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
        scanned: What a first look told.
        writers: The packs.
        settings: Of each pack; they differ in rank fraction and budget alone.
        work: Workers, memory bound, device, progress.
        characteristics: Task name to what the task is about; else its config's class names.

    Raises:
        BudgetError: if a budget cannot be met.
    """
    for name, expert in family.experts.items():
        facts = scanned.facts[name]
        due = [name not in writer.manifest.tasks for writer in writers]
        if not any(due):
            work.note(f"{name}: done by an earlier run")
            continue
        from_base = writers[0].manifest.reference.kind == "base"
        deltas = Deltas(expert, family.base, from_base)
        codecs, coded = _encode_within_budgets(deltas, settings, family, facts, work)
        for writer, codec, tensors, wanted in zip(writers, codecs, coded, due, strict=True):
            if wanted:
                about = characteristics.get(name) or class_names(expert.checkpoint.companions)
                _write_task(writer, codec, family, expert, facts, tensors, about)
                dropped = [key for key, tensor in tensors.items() if not tensor.nbytes]
                if dropped:
                    work.note(
                        f"{name}: rank 0 at rank fraction {codec.model_dump()['rank_fraction']:.3g}"
                        f", so left as in the reference: {shown(dropped)}"
                    )
        expert.checkpoint.close()


def _encode_within_budgets(
    deltas: Deltas, settings: Sequence[PackSettings], family: Family, facts: Facts, work: Work
) -> tuple[list[Codec], list[dict[str, CodedTensor]]]:
    """Code one expert with the codec of each pack, at the largest rank its budget allows.

    Exact zeros inside a factor are known only once it is there, and cost a little. Where a code
    comes out larger than foreseen, it is made again with that much held back.
    """
    expert = deltas.alignment
    shared = family.shared_specs(expert.name)
    spare = [0] * len(settings)
    while True:
        # All packs, also where the task is done: the largest rank decides how it is decomposed.
        codecs = [
            codec_for(setting, family, expert.name, facts, bits)
            for setting, bits in zip(settings, spare, strict=True)
        ]
        coded = encode_expert(
            deltas,
            codecs,
            facts.tensors,
            workers=work.threads,
            memory=work.memory,
            device=work.torch_device,
            progress=work.progress,
        )
        excess = [
            8 * sum(tensor.nbytes for tensor in tensors.values())
            - cost(codec, shared, facts.tensors).stored
            for codec, tensors in zip(codecs, coded, strict=True)
        ]
        held = [
            setting.budget is None or bits <= room + _SLACK_BITS
            for setting, bits, room in zip(settings, excess, spare, strict=True)
        ]
        if all(held):
            return codecs, coded
        spare = [max(pair) for pair in zip(spare, excess, strict=True)]


def codec_for(
    settings: PackSettings, family: Family, name: str, facts: Facts, reserve: int = 0
) -> Codec:
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
            reserve=reserve + 8 * _header_bytes(family.experts[name]),
        )
    except BudgetError as error:
        raise BudgetError(f"Task '{name}': {error}") from error
    return codec.model_copy(update={"rank_fraction": fraction})


def _header_bytes(expert: Alignment) -> int:
    """Bytes that private tensors add to the header of the task file, at most."""
    return sum(len(name) + 128 for name in (*expert.private, *expert.grown, *expert.buffers))


def _write_task(
    writer: PackWriter,
    codec: Codec,
    family: Family,
    expert: Alignment,
    facts: Facts,
    coded: Mapping[str, CodedTensor],
    characteristics: tuple[str, ...],
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
        characteristics=characteristics,
    )


def _private(expert: Alignment, family: Family, facts: Facts) -> dict[str, Tensor]:
    """What is kept whole: private tensors, extra rows of grown ones, buffers with other values."""
    checkpoint = expert.checkpoint
    whole = {name: checkpoint.read(raw) for name, raw in expert.private_files.items()}
    for name in expert.grown:
        rows, own = family.base.specs[name].shape[0], expert.spec(name)
        extra = checkpoint.read_rows(expert.files[name], rows, own.shape[0])
        whole[expert.renaming.expert_name(name)] = extra
    for name in facts.differing_buffers:
        whole[expert.renaming.expert_name(name)] = checkpoint.read(expert.files[name])
    return whole
