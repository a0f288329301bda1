"""Whether what the experts changed shows in the output: tensor by tensor, while they are at hand.

A tensor in which an expert differs and which comes out as the base's all the same is named, with
the reason, so that nothing is lost in silence. It costs next to nothing: the first entries of a
chunk nearly always differ from the base's, and then the tensor needs no other look.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import torch
from jaxtyping import Shaped
from torch import Tensor

Effect = Literal["+", ".", "0", "~", "b", "-"]
"""Of one chunk: its output differs from the base (+), no expert does (.), changes were merged to
exactly 0 (0), were rounded away (~), are of a buffer (b), or not all experts have it (-)."""

PROBED = 1 << 10
"""Entries of a chunk that are looked at first."""
_WHY: Mapping[str, str] = {
    "0": "merged to exactly 0: trimmed, dropped or cancelled",
    "~": "less than its dtype can tell",
    "b": "integers or statistics, which {} does not merge",
    "-": "not in every expert in the base's shape",
}


def differs(one: Shaped[Tensor, "..."], other: Shaped[Tensor, "..."], dtype: torch.dtype) -> bool:
    """Whether two tensors of one shape are unequal in this dtype; mostly told by a few entries."""
    one, other = one.reshape(-1), other.reshape(-1)
    head = (one[:PROBED].to(dtype) != other[:PROBED].to(dtype)).any()
    return bool(head) or not torch.equal(one.to(dtype), other.to(dtype))


def any_entry(stack: Shaped[Tensor, "expert ..."]) -> bool:
    """Whether any entry is not 0; mostly told by a few."""
    entries = stack.reshape(len(stack), -1)
    return bool(entries[:, :PROBED].any()) or bool(entries.any())


def effect_of(
    value: Shaped[Tensor, "..."],
    base: Shaped[Tensor, "..."],
    dtype: torch.dtype,
    changed: Callable[[], bool],
) -> Effect:
    """What shows of the experts' changes in a chunk.

    Args:
        value: What comes out, before it is cast.
        base: The base's values.
        dtype: What comes out in.
        changed: Tells whether any expert differs from the base; asked only if it matters.
    """
    if differs(value, base, dtype):
        return "+"
    if not changed():
        return "."
    return "~" if differs(value, base, torch.promote_types(value.dtype, base.dtype)) else "0"


def without_effect(told: Iterable[tuple[str, str]], method: str) -> dict[str, str]:
    """The tensors whose changes show nowhere, with the reason, sorted by name.

    Args:
        told: Name and effect of every chunk.
        method: What merged them, for the reasons.
    """
    shown, lost = set[str](), dict[str, str]()
    for name, effect in told:
        if effect == "+":
            shown.add(name)
        elif effect != ".":
            lost[name] = max(lost.get(name, ""), effect)
    return {name: _WHY[lost[name]].format(method) for name in sorted(lost.keys() - shown)}
