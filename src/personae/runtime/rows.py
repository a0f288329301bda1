"""Rows of a batch: taken from inputs, put together in outputs."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from personae.errors import Faults, MethodError


def check_rows(tasks: Sequence[str], inputs: Mapping[str, Any]) -> None:
    """Check that the inputs have a row for each task.

    Args:
        tasks: The task of each row.
        inputs: Name to input.

    Raises:
        MethodError: naming each input that has not, or if there is none.
    """
    if not tasks:
        raise MethodError("tasks= is empty. Name one task for each row.")
    faults = Faults()
    tensors = {name: one for name, one in inputs.items() if isinstance(one, Tensor) and one.ndim}
    for name, one in tensors.items():
        if one.ndim > 1 and len(one) not in (1, len(tasks)):
            faults.add(
                f"tasks= names {len(tasks)} tasks, but '{name}' has {len(one)} rows. "
                "Name one task for each row."
            )
    if not faults.messages and not any(len(one) == len(tasks) for one in tensors.values()):
        faults.add(f"tasks= names {len(tasks)} tasks, but no input has so many rows.")
    if len({*tasks}) > 1 and inputs.get("labels") is not None:
        faults.add("A loss over rows of several tasks is no task's: leave labels out.")
    faults.raise_if_any(MethodError)


def take_rows(inputs: Any, rows: Sequence[int], total: int) -> Any:
    """The same inputs with these rows of `total` alone; what has no rows stays as it is."""
    if [*rows] == [*range(total)]:
        return inputs

    def cut(one: Tensor) -> Tensor:
        has_rows = one.ndim > 0 and len(one) == total
        return one[torch.tensor(rows, device=one.device)] if has_rows else one

    return tree_map_only(Tensor, cut, inputs)


def joined(results: Sequence[Any], sizes: Sequence[int], fill: int | float = -torch.inf) -> Any:
    """Results for parts of a batch as one: tensors after each other, also in what holds them.

    Args:
        results: Of the same kind: tensors, tuples, lists, mappings (such as outputs of
            transformers) of these, or None.
        sizes: Rows of each part.
        fill: What the last axis of narrower tensors is filled up with, of sequences of tokens too.

    Returns:
        The same kind. None stands for what cannot be put together, such as caches.

    Raises:
        MethodError: if they are of unlike kinds.
    """
    first = results[0]
    kinds = {(type(one), one.ndim if isinstance(one, Tensor) else 0) for one in results}
    if len(kinds) > 1 or (isinstance(first, Mapping) and len({tuple(one) for one in results}) > 1):
        raise MethodError(
            "The tasks of these rows answer in unlike kinds, such as a label for a row and labels "
            "for its tokens. Give them in batches of their own."
        )
    if len(results) == 1:
        return first
    if isinstance(first, Tensor):
        by_row = all(
            one.ndim and len(one) % size == 0 and len(one) // size == len(first) // sizes[0]
            for one, size in zip(results, sizes, strict=True)
        )
        return torch.cat(_of_one_width(results, fill)) if by_row and len(first) else None
    if isinstance(first, Mapping):
        content: dict[str, Any] = {
            key: joined([one[key] for one in results], sizes, fill) for key in first
        }
        content = {key: value for key, value in content.items() if value is not None}
        return type(first)(**content)
    if isinstance(first, tuple | list):
        return type(first)(joined(parts, sizes, fill) for parts in zip(*results, strict=True))
    return None


def in_order(result: Any, order: Sequence[int]) -> Any:
    """A result whose row `i` belongs to row `order[i]` of the batch, with the rows in order.

    Of several rows for each, as several sequences are generated, all keep their place.
    """
    if [*order] == sorted(order):
        return result
    total = len(order)
    places = torch.tensor(order).argsort()

    def put(one: Tensor) -> Tensor:
        if not one.ndim or len(one) % total or not len(one):
            return one
        each = len(one) // total
        index = (places[:, None] * each + torch.arange(each)).flatten().to(one.device)
        return one[index]

    if isinstance(result, Tensor):
        return put(result)
    if isinstance(result, Mapping):
        return type(result)(**{key: in_order(value, order) for key, value in result.items()})
    if isinstance(result, tuple | list):
        return type(result)(in_order(one, order) for one in result)
    if hasattr(result, "reorder_cache"):
        result.reorder_cache(places)
    return result


def _of_one_width(tensors: Sequence[Tensor], fill: int | float) -> list[Tensor]:
    """Tensors whose last axis is filled up to that of the widest."""
    widest = max(one.shape[-1] for one in tensors) if tensors[0].ndim > 1 else 0
    return [
        torch.nn.functional.pad(one, (0, widest - one.shape[-1]), value=fill)
        if one.ndim > 1 and one.shape[-1] < widest
        else one
        for one in tensors
    ]
