"""Which way round a linear layer's weight is stored: (out, in), or (in, out) as GPT-2's Conv1D is.

A header says it only through the bias beside the weight, which has length `out`; of a square
weight not even that, so the nearest relative decides. Stacks of experts (GPT-OSS, Llama 4) are told
by their two projections, of which `gate_up_proj` has twice the width that `down_proj` takes.
"""

import re
from collections.abc import Mapping
from itertools import takewhile

from personae._types import TensorSpec


def transposed_weights(specs: Mapping[str, TensorSpec]) -> frozenset[str]:
    """Names of the matrices stored (in, out)."""
    told = {name: _told_by_bias(name, specs) for name in specs}
    stacks = frozenset(name for name in specs if _is_in_out_stack(name, specs))
    if not any(told.values()):
        return stacks
    return stacks | frozenset(
        name
        for name, spec in specs.items()
        if len(spec.shape) == 2
        and (told[name] if told[name] is not None else _square_in_out(name, specs))
    )


def stored_in_out(name: str, specs: Mapping[str, TensorSpec], otherwise: bool) -> bool:
    """Whether a square weight is (in, out), as its nearest relative with an oblong weight is.

    Nearest is the one whose name has the longest start in common. Without any such relative the
    answer is `otherwise`.
    """
    best, answer = 0, otherwise
    for other in specs:
        told = _told_by_bias(other, specs)
        common = 0 if told is None else _common_parts(name, other)
        if told is not None and common > best:
            best, answer = common, told
    return answer


def _square_in_out(name: str, specs: Mapping[str, TensorSpec]) -> bool:
    rows, columns = specs[name].shape
    has_bias = re.sub(r"weight$", "bias", name) in specs
    return rows == columns and has_bias and stored_in_out(name, specs, False)


def _is_in_out_stack(name: str, specs: Mapping[str, TensorSpec]) -> bool:
    """Whether a stack of experts is (expert, in, out)."""
    stem = re.sub(r"(gate_up|down)_proj", "{}_proj", name)
    pair = [specs.get(stem.format(part)) for part in ("gate_up", "down")]
    shapes = [spec.shape for spec in pair if spec is not None and len(spec.shape) == 3]
    if stem == name or len(shapes) != 2:
        return False
    (_, ins, outs), (_, inner, hidden) = shapes
    return ins == hidden and outs == 2 * inner


def _told_by_bias(name: str, specs: Mapping[str, TensorSpec]) -> bool | None:
    """Whether an oblong weight is (in, out); None if nothing tells."""
    spec = specs[name]
    if len(spec.shape) != 2 or spec.shape[0] == spec.shape[1] or not name.endswith("weight"):
        return None
    bias = specs.get(re.sub(r"weight$", "bias", name))
    if bias is None or len(bias.shape) != 1 or bias.shape[0] not in spec.shape:
        return None
    return bias.shape[0] == spec.shape[1]


def _common_parts(name: str, other: str) -> int:
    """Count the leading dotted parts two names share."""
    same = (a == b for a, b in zip(name.split("."), other.split("."), strict=False))
    return sum(takewhile(bool, same))
