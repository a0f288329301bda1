"""Plans from headers alone: ranks, bytes, memory, and every fault a header can tell."""

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from personae._types import TensorSpec
from personae.checkpoints.naming import matches
from personae.errors import BudgetError, OutputError
from personae.execute import pool
from personae.execute.accounting import (
    HEADER_BYTES,
    Denominator,
    amr_percent,
    cost,
    largest_rank_fraction,
    mask_bytes,
)
from personae.execute.deltas import working_bytes
from personae.execute.family import Family
from personae.methods import Codec
from personae.recipe import PackSettings, parse_size

_OUTPUTS = ("pack.json", "*/pack.json", "*.safetensors", "pytorch_model*.bin")
"""What tells that a directory may be replaced on request: nothing else is."""

RECORD_BYTES = 600
"""What a tensor's record takes in pack.json, about."""


@dataclass(frozen=True)
class ShapesPlan:
    """What coding one model of given shapes costs.

    Attributes:
        parameters: Floating parameters counted (heads left out by the caller).
        tensors: Number of tensors coded.
        rank_fraction: The rank fraction, as asked or as the budget allows; None if not of DTS kind.
        bytes: Bytes of the coded parts if every tensor changed everywhere.
        mask_bytes: Bytes more, at most, where deltas hold exact zeros.
        amr_percent: By rule; see `accounting.amr_percent`.
    """

    parameters: int
    tensors: int
    rank_fraction: float | None
    bytes: int
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


def plan_shapes(specs: Iterable[TensorSpec], settings: PackSettings) -> ShapesPlan:
    """Cost of coding a model of these shapes, with no weights at hand.

    Args:
        specs: Names, shapes and dtypes; integer tensors are left out.
        settings: Codec, and rank fraction or budget.

    Raises:
        MethodError: for an unknown codec or parameter.
        BudgetError: if the budget cannot be met.
    """
    floating = [spec for spec in specs if spec.is_floating]
    codec = _codec(settings, floating)
    bits = cost(codec, floating)
    whole = Denominator.of(floating)
    return ShapesPlan(
        parameters=whole.parameters,
        tensors=len(floating),
        rank_fraction=getattr(codec, "rank_fraction", None),
        bytes=bits.stored // 8,
        mask_bytes=mask_bytes(codec, floating),
        amr_percent=amr_percent(bits, whole),
    )


def plan_pack(
    family: Family,
    settings: PackSettings,
    *,
    workers: int | None = None,
    memory: int | None = None,
) -> PackPlan:
    """Plan a pack from the headers of its family.

    Args:
        family: Base and experts, opened and aligned.
        settings: Codec, reference, budget.
        workers: Tensors worked on at once; None for one a core.
        memory: Bound in bytes on the working memory.

    Raises:
        MethodError: for an unknown method or parameter.
        BudgetError: if the budget, or the memory bound, cannot be met.
    """
    workers = workers or pool.default_workers()
    if settings.vector == "difference":
        settings.merge()
    tasks = {name: _plan_task(family, name, settings) for name in family.experts}
    stages = _item_costs(family, settings)
    pool.check_memory(max(map(max, stages)), memory, "The largest tensor")
    peak = max(sum(heapq.nlargest(workers, costs)) for costs in stages)
    base_bytes = sum(spec.nbytes for spec in family.base.specs.values())
    merged = base_bytes if settings.vector == "difference" else 0
    written = sum(
        t.coded.bytes
        + t.coded.mask_bytes
        + t.private_bytes
        + HEADER_BYTES
        + RECORD_BYTES * t.coded.tensors
        for t in tasks.values()
    )
    # One task's parts are together until its file is written: each, and joined into sections.
    held = 2 * max(t.coded.bytes + t.coded.mask_bytes + t.private_bytes for t in tasks.values())
    return PackPlan(
        tasks=tasks,
        bytes_in=base_bytes + sum(t.bytes_in for t in tasks.values()),
        bytes_out=written + merged,
        peak_memory=held + (peak if memory is None else min(peak, memory)),
        workers=workers,
        notes=family.notes,
    )


def check_output(out: Path, overwrite: bool, inputs: Sequence[Any] = ()) -> None:
    """Refuse an output that exists, or that would replace what is read, before any work.

    Args:
        out: The output directory, absolute.
        overwrite: Whether a directory that holds something may be replaced.
        inputs: Sources of the run; those that are no local path do not matter.

    Raises:
        OutputError: if `out` is a file, a directory that holds something, or is, contains or lies
            inside an input.
    """
    for source in inputs:
        if not isinstance(source, str | Path) or not Path(source).exists():
            continue
        read, written = Path(source).resolve(), out.resolve()
        if read == written or read in written.parents or written in read.parents:
            raise OutputError(
                f"'{out}' and the input '{source}' overlap: writing one would harm the other. "
                "Choose an output beside it."
            )
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise OutputError(
            f"'{out}' exists and is not empty. Choose another name, or give --overwrite."
        )
    if out.exists() and not out.is_dir():
        raise OutputError(f"'{out}' is a file. Choose another name.")
    if (
        out.is_dir()
        and any(out.iterdir())
        and not any(any(out.glob(pattern)) for pattern in _OUTPUTS)
    ):
        raise OutputError(
            f"'{out}' holds neither a pack nor a model, so it is not replaced. Choose another "
            "name, or empty it by hand."
        )


def _plan_task(family: Family, name: str, settings: PackSettings) -> TaskPlan:
    expert = family.experts[name]
    try:
        coded = plan_shapes(family.shared_specs(name), settings)
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
    """Working memory of each item of each stage: the base's tensors, then every expert's."""
    stacked = 16 * len(family.experts) if settings.vector == "difference" else 0
    checkpoints = [expert.checkpoint for expert in family.experts.values()]
    return [
        [working_bytes(s.shape) + stacked * s.numel for s in family.base.specs.values()],
        *([working_bytes(s.shape) for s in c.specs.values()] for c in checkpoints),
    ]


def _codec(settings: PackSettings, specs: Sequence[TensorSpec]) -> Codec:
    codec = settings.codec()
    if settings.budget is None:
        return codec
    fraction = largest_rank_fraction(
        codec, specs, parse_size(settings.budget, percent=True), settings.counting
    )
    return codec.model_copy(update={"rank_fraction": fraction})


def specs_of_shapes(
    shapes: Mapping[str, Sequence[int]], skip: Sequence[str] = ()
) -> list[TensorSpec]:
    """Tensor specs (fp32) from a mapping of names to shapes, without those `skip` matches."""
    return [
        TensorSpec(name, tuple(shape), torch.float32)
        for name, shape in shapes.items()
        if not matches(name, skip)
    ]
