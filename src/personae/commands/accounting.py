"""What a pack costs: additional memory rate (AMR) by each counting rule, and ranks for a budget."""

import bisect
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from personae._types import TensorSpec
from personae.errors import BudgetError
from personae.methods import Bits, Codec, Treatment, block_bits
from personae.packs.manifest import Manifest, TaskRecord
from personae.recipe import Counting
from personae.run.scan import TensorScan

HEADER_BYTES = 768
"""Room left for the header of a task file when a budget is on the bytes on disk."""


@dataclass(frozen=True)
class Denominator:
    """What an AMR is relative to: the shared tensors of the reference, heads excluded."""

    parameters: int
    bytes: int

    @classmethod
    def of(cls, specs: Iterable[TensorSpec]) -> "Denominator":
        """Count the floating tensors given."""
        floating = [spec for spec in specs if spec.is_floating]
        return cls(sum(s.numel for s in floating), sum(s.nbytes for s in floating))


class Share(NamedTuple):
    """A task's share of what all tasks share, in bits: by the papers' rule, and as stored."""

    paper: float = 0.0
    stored: float = 0.0


_NO_SHARE = Share()


def amr_percent(bits: Bits, whole: Denominator, share: Share = _NO_SHARE) -> dict[str, float]:
    """AMR by every rule, in percent (methods.md 1.2, 3.1), the share included.

    Returns:
        `amr_paper`: the papers' rule, over 32 bits a parameter. `amr_paper_lean`: the same with the
        fewest bits that carry the code. `on_disk_fp32`: bits stored, over 32 bits a parameter.
        `on_disk_native`: bits stored, over the reference's own bytes.
    """
    fp32, native = 32 * whole.parameters, 8 * whole.bytes
    stored = bits.stored + share.stored
    return {
        "amr_paper": 100 * (bits.paper + share.paper) / fp32 if fp32 else 0.0,
        "amr_paper_lean": 100 * (bits.paper_lean + share.paper) / fp32 if fp32 else 0.0,
        "on_disk_fp32": 100 * stored / fp32 if fp32 else 0.0,
        "on_disk_native": 100 * stored / native if native else 0.0,
    }


def cost(
    codec: Codec, specs: Sequence[TensorSpec], facts: Mapping[str, TensorScan] | None = None
) -> Bits:
    """Bits of coding these tensors.

    Args:
        codec: The codec with its parameters.
        specs: Shared tensors of the reference.
        facts: What a scan found. Stored bits then leave out unchanged tensors and include masks
            for exact zeros; without facts every tensor is taken as changed everywhere.
    """
    paper = lean = stored = 0
    for (treatment, block_shape), times in _block_shapes(codec, specs).items():
        bits = block_bits(codec, treatment, block_shape)
        paper += times * bits.paper
        lean += times * bits.paper_lean
        stored += times * bits.stored
    if facts is not None:
        stored = sum(_stored(codec, spec, facts[spec.name]) for spec in specs if spec.is_floating)
    most = codec.most_bits()
    return Bits(*((bits if most is None else min(bits, most)) for bits in (paper, lean, stored)))


def mask_bytes(codec: Codec, specs: Iterable[TensorSpec]) -> int:
    """Bytes that deltas with exact zeros take beyond `cost` without facts, at most."""
    return sum(
        times * codec.zero_bits(shape) // 8
        for (treatment, shape), times in _block_shapes(codec, specs).items()
        if treatment == "code"
    )


def shared_bytes(codec: Codec, specs: Iterable[TensorSpec]) -> int:
    """Bytes of what all tasks share of these tensors: fp32, of those that are coded."""
    if not codec.shares:
        return 0
    return sum(4 * s.numel for s in specs if s.is_floating and codec.treats(s) == "code")


def paper_bits(
    codec: Codec, specs: Iterable[TensorSpec], ranks: Mapping[str, Sequence[int | None]]
) -> tuple[int, int]:
    """Bits by the papers' rule, and by its lean form, of one expert as it was coded.

    Args:
        codec: The codec with its parameters.
        specs: Shared tensors of the reference. The rule charges for unchanged ones too.
        ranks: Rank stored of each block of the tensors coded; None where nothing was decomposed.
    """
    paper = lean = 0
    for spec in specs:
        shapes, treatment = block_shapes(codec, spec), codec.treats(spec)
        for shape, rank in zip(shapes, ranks.get(spec.name) or [None] * len(shapes), strict=True):
            bits = block_bits(codec, treatment, shape, rank)
            paper += bits.paper
            lean += bits.paper_lean
    return paper, lean


def task_amr_percent(record: TaskRecord, manifest: Manifest) -> dict[str, float]:
    """AMR of one packed task by every rule, with its share of what all tasks of the pack share.

    Private tensors are left out, headers are in.
    """
    stored = 8 * (record.bytes - record.private_bytes)
    bits = Bits(record.counted_bits, record.counted_lean_bits, stored)
    share, tasks = _NO_SHARE, len(manifest.tasks)
    if manifest.shared is not None:
        share = Share(manifest.shared.counted_bits / tasks, 8 * manifest.shared.bytes / tasks)
    return amr_percent(bits, Denominator(record.base_parameters, record.base_bytes), share)


def within_budget(
    codec: Codec,
    specs: Sequence[TensorSpec],
    budget: float | int,
    counting: Counting,
    facts: Mapping[str, TensorScan] | None = None,
    reserve: int = 0,
) -> Codec:
    """The codec with the parameter that a budget sets; see `largest_rank_fraction`.

    Raises:
        BudgetError: if the budget cannot be met, naming the smallest that can.
    """
    find = largest_rank_fraction if codec.by_budget == "rank_fraction" else _largest_size
    found = find(codec, specs, budget, counting, facts, reserve)
    return codec.model_copy(update={codec.by_budget: found})


def _largest_size(
    codec: Codec,
    specs: Iterable[TensorSpec],
    budget: float | int,
    counting: Counting,
    facts: Mapping[str, TensorScan] | None = None,
    reserve: int = 0,
) -> int:
    """The bytes that a budget leaves for the code.

    Raises:
        BudgetError: if they hold no code, naming the smallest budget that can be met.
    """
    floating = [spec for spec in specs if spec.is_floating]
    whole = Denominator.of(floating)
    changed = floating if facts is None else [s for s in floating if facts[s.name].changed]
    shapes = [shape for spec in changed for shape in block_shapes(codec, spec)]
    exact = sum(codec.least_bits(shape) for shape in shapes if not shape)
    least = exact + min((codec.least_bits(shape) for shape in shapes if shape), default=0)

    def size(bits: int) -> float:
        return _size(Bits(bits, bits, bits + reserve), whole, budget, counting)

    if size(least) > budget:
        raise BudgetError(_unmet(budget, size(least), counting))
    per_bit = (size(1 << 20) - size(0)) / (1 << 20)
    return max(int((budget - size(0)) / per_bit) // 8, 1)


def largest_rank_fraction(
    codec: Codec,
    specs: Iterable[TensorSpec],
    budget: float | int,
    counting: Counting,
    facts: Mapping[str, TensorScan] | None = None,
    reserve: int = 0,
) -> float:
    """The largest rank fraction whose cost fits a budget (methods.md 6.3).

    At the smallest the widest of the matrices that changed has one direction; a budget that allows
    less would store nothing.

    Args:
        codec: A codec with a `rank_fraction`.
        specs: Shared tensors of the reference.
        budget: A fraction below 1 (of the model, by the rule), or a number of bytes.
        counting: The rule: a key of `amr_percent`.
        facts: What a scan found of one expert; None plans from headers.
        reserve: Stored bits to keep free for what neither shapes nor facts foresee.

    Raises:
        BudgetError: if even the smallest rank exceeds the budget, naming the smallest that fits.
    """
    floating = [spec for spec in specs if spec.is_floating]
    whole = Denominator.of(floating)
    changed = floating if facts is None else [s for s in floating if facts[s.name].changed]
    shapes = [s for _, s in _block_shapes(codec, changed) if _at(codec, 1.0).rank(s)]
    widths = {_at(codec, 1.0).rank(shape) for shape in shapes}
    steps = sorted({j / width for width in widths for j in range(1, width + 1)})

    def size(fraction: float) -> float:
        bits = cost(_at(codec, fraction), floating, facts)
        bits = bits._replace(stored=bits.stored + reserve)
        return _size(bits, whole, budget, counting)

    if not steps:  # nothing to decompose: the cost is what it is
        steps = [codec.model_dump()["rank_fraction"]]
    if size(steps[0]) > budget:
        raise BudgetError(_unmet(budget, size(steps[0]), counting))
    return steps[bisect.bisect_right(steps, budget, key=size) - 1]


def _unmet(budget: float | int, least: float, counting: Counting) -> str:
    return (
        f"The budget of {_asked(budget)} cannot be met: the smallest pack of this family "
        f"costs {_at_least(least, budget)} counted as '{counting}'. Give that much or more, "
        f"or keep fewer tensors with 'skip'.{_or_percent(budget)}"
    )


def _or_percent(budget: float | int) -> str:
    """What a number without a unit may have meant."""
    small = not is_fraction(budget) and budget < 100
    return f" A share of the model is written with its sign: {budget}%." if small else ""


def _size(bits: Bits, whole: Denominator, budget: float | int, counting: Counting) -> float:
    """The cost in the budget's own item: a fraction of the model, or bytes."""
    if counting.startswith("on_disk"):
        bits = bits._replace(stored=bits.stored + 8 * HEADER_BYTES)
    if is_fraction(budget):
        return amr_percent(bits, whole)[counting] / 100
    return {"amr_paper": bits.paper, "amr_paper_lean": bits.paper_lean}.get(
        counting, bits.stored
    ) / 8


def is_fraction(budget: float | int) -> bool:
    """Whether a parsed budget is a fraction of the model (float) rather than bytes (int)."""
    return isinstance(budget, float)


def _asked(budget: float | int) -> str:
    return f"{100 * budget:g} %" if is_fraction(budget) else f"{budget:,} bytes"


def _at_least(size: float | int, budget: float | int) -> str:
    """A size in the budget's item, rounded up: given as the budget, it is enough."""
    if is_fraction(budget):
        return f"{math.ceil(1e5 * size) / 1e3:g} %"
    return f"{math.ceil(size):,} bytes"


def _at(codec: Codec, fraction: float) -> Codec:
    return codec.model_copy(update={"rank_fraction": fraction})


def _block_shapes(
    codec: Codec, specs: Iterable[TensorSpec]
) -> Counter[tuple[Treatment, tuple[int, ...]]]:
    """How often each block shape occurs: a hundred thousand tensors have a few dozen shapes."""
    return Counter(
        (codec.treats(spec), shape)
        for spec in specs
        if spec.is_floating
        for shape in block_shapes(codec, spec)
    )


def block_shapes(codec: Codec, spec: TensorSpec) -> list[tuple[int, ...]]:
    """Shapes of the blocks a codec makes of one tensor."""
    if not spec.shape or codec.treats(spec) != "code":
        return [spec.shape]
    return [block.shape_in(spec.shape) for block in codec.blocks(spec)]


def _stored(codec: Codec, spec: TensorSpec, facts: TensorScan) -> int:
    """Bits stored for one tensor, with the masks its zeros need; an upper bound."""
    treatment = codec.treats(spec)
    if not facts.changed or treatment != "code":
        return block_bits(codec, treatment, spec.shape).stored if facts.changed else 0
    shapes = block_shapes(codec, spec)
    bits = sum(codec.bits(shape).stored for shape in shapes)
    if bits and facts.zero_rows and len(shapes) == 1:  # zero rows have a bit each and no codes
        rows, columns = spec.shape
        live = (rows - facts.zero_rows, columns)
        rank = min(codec.rank(spec.shape), *live)
        bits = codec.bits(live, rank).stored + 8 * math.ceil(rows / 8)
    elif bits and facts.zero_rows:
        bits += 8 * sum(math.ceil(shape[0] / 8) for shape in shapes)
    if bits and facts.zero_columns:  # at most a bit for each code of both factors
        vectors = [(codec.rank(shape), sum(shape)) for shape in shapes]
        bits += sum(rank * width + 16 for rank, width in vectors)
    if bits and facts.zeros:
        bits += 8 * math.ceil(spec.numel / 8)
    return bits
