"""Several tasks in one forward pass: the rows of each follow each other, and each has its task.

A linear layer multiplies all rows with its own matrix at once; then each task's factors are added
to its rows, as one product of batched matrices where there are as many rows of each task and the
factors have one shape. Any other module that a task changes computes for the rows of each task in
turn. What heads of unlike width give is filled up with -inf, which no softmax and no argmax sees.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from personae.runtime.paths import LowRank, Path, Paths, adding, is_transposed
from personae.runtime.rows import joined

Within = Callable[[Paths], AbstractContextManager[None]]


class NotByRow(Exception):
    """A module that tasks change is not given the rows of the batch."""


@dataclass(frozen=True)
class MixedPath:
    """What several tasks change of one module.

    Attributes:
        module: The module.
        parts: Of each task its path, if it changes the module.
        paths: All paths of each task.
        counts: Rows of each task; they follow each other.
        within: Lets modules inside compute for one task alone.
    """

    module: nn.Module
    parts: tuple[Path | None, ...]
    paths: tuple[Paths, ...]
    counts: tuple[int, ...]
    within: Within

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module computes for all rows.

        Raises:
            NotByRow: if it is given no rows.
        """
        args, kwargs = self._by_row(args, kwargs)
        given = _first(args, kwargs)
        each = len(given) // sum(self.counts)
        sizes = [each * count for count in self.counts]
        if self._is_added():
            return self._added(given, sizes)
        return self._in_turn(args, kwargs, sizes)

    def _by_row(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments, with a look-up that all rows share made one for each.

        Raises:
            NotByRow: if there are no rows in them.
        """
        rows, given = sum(self.counts), _first(args, kwargs)
        if isinstance(self.module, nn.Embedding) and len(given) == 1:
            return tree_map_only(
                Tensor, lambda one: one.expand(rows, *one.shape[1:]), (args, kwargs)
            )
        if len(given) % rows or getattr(self.module, "batch_first", True) is False:
            raise NotByRow
        return args, kwargs

    def _is_added(self) -> bool:
        """Whether it is a linear layer of which tasks change no more than factors and the bias."""
        add = adding(self.module)
        return (
            add is not None
            and not isinstance(self.module, nn.Embedding)
            and all(part is None or part.whole.keys() <= {"bias"} for part in self.parts)
        )

    def _added(self, given: Tensor, sizes: Sequence[int]) -> Tensor:
        transposed, parts = is_transposed(self.module), self.parts
        weight, own = cast(Tensor, self.module.weight), cast(Tensor | None, self.module.bias)
        one_bias = None if any(part and part.whole for part in parts) else own
        result = functional.linear(given, weight.T if transposed else weight, one_bias).contiguous()
        changes = [part.low_rank.get("weight") if part else None for part in parts]
        _add_products(result, given, changes, sizes, transposed)
        if own is not None and one_bias is None:
            biases = [part.whole["bias"]() if part and part.whole else own for part in parts]
            for rows, bias in zip(_cuts(result, sizes), biases, strict=True):
                rows.add_(bias)
        return result

    def _in_turn(self, args: Any, kwargs: Any, sizes: Sequence[int]) -> Any:
        """One task's rows after another's.

        Raises:
            NotByRow: if modules inside are given more than rows, such as a cache of keys.
        """
        plain = all(_is_plain(one, sum(sizes)) for one in (*args, *kwargs.values()))
        if not plain and any(True for _ in self.module.children()):
            raise NotByRow
        results: list[Any] = []
        total, start = sum(sizes), 0
        for part, paths, size in zip(self.parts, self.paths, sizes, strict=True):

            def cut(one: Tensor, start: int = start, size: int = size) -> Tensor:
                has_rows = one.ndim > 0 and len(one) == total
                return one.narrow(0, start, size) if has_rows else one

            args_of, kwargs_of = tree_map_only(Tensor, cut, (args, kwargs))
            with self.within(paths):
                if part is None:
                    results.append(type(self.module).forward(self.module, *args_of, **kwargs_of))
                else:
                    results.append(part(*args_of, **kwargs_of))
            start += size
        return joined(results, sizes)


def mixed(
    paths: Sequence[Paths], counts: Sequence[int], widths: Collection[int], within: Within
) -> dict[int, MixedPath]:
    """What several tasks change of all modules of a shell, by their ids.

    Args:
        paths: Those of each task.
        counts: Rows of each task; they follow each other.
        widths: Of what the shell's layers take.
        within: Lets modules compute for one task alone.

    Raises:
        NotByRow: if tasks change a table that gives no layer its input, such as T5's of relative
            positions: what is looked up there has no rows.
    """
    found: dict[int, MixedPath] = {}
    for key in {key for one in paths for key in one}:
        parts = tuple(one.get(key) for one in paths)
        module = next(part.module for part in parts if part is not None)
        if isinstance(module, nn.Embedding) and module.embedding_dim not in widths:
            raise NotByRow
        found[key] = MixedPath(module, parts, tuple(paths), tuple(counts), within)
    return found


def _add_products(
    result: Tensor,
    given: Tensor,
    changes: Sequence[Callable[[], LowRank] | None],
    sizes: Sequence[int],
    transposed: bool,
) -> None:
    """Add (X Rᵀ) Lᵀ to the rows of each task, in place.

    The factors of one batched product are copied next to each other, which a CPU notices where
    they are larger than what they are multiplied with. Otherwise those of one task at a time are
    decoded.
    """
    decoded = (None if change is None else _of(change(), transposed) for change in changes)
    if len({*sizes}) == 1 and None not in changes:
        first, number = cast(LowRank, next(decoded)), len(sizes)
        decoded = chain([first], decoded)
        if given.device.type != "cpu" or number * first.right.numel() <= given.numel():
            there = [cast(LowRank, change) for change in decoded]
            if len({change.right.shape for change in there}) == 1:
                rights = torch.stack([change.right for change in there]).mT
                lefts = torch.stack([change.left for change in there]).mT
                inner = given.reshape(number, -1, given.shape[-1]) @ rights
                result.view(number, -1, result.shape[-1]).baddbmm_(inner, lefts)
                return
            decoded = iter(there)
    for out, rows, change in zip(_cuts(result, sizes), _cuts(given, sizes), decoded, strict=True):
        if change is not None:
            inner = functional.linear(rows.reshape(-1, rows.shape[-1]), change.right)
            out.view(-1, out.shape[-1]).addmm_(inner, change.left.T)


def _of(change: LowRank, transposed: bool) -> LowRank:
    """A change of a matrix (out, in)."""
    return LowRank(change.right.T, change.left.T) if transposed else change


def _cuts(tensor: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    starts = accumulate(sizes, initial=0)
    return [tensor.narrow(0, start, size) for start, size in zip(starts, sizes, strict=False)]


def _is_plain(one: Any, rows: int) -> bool:
    """Whether an argument has a part for each row, or none that depends on them."""
    if isinstance(one, Tensor):
        return one.ndim == 0 or len(one) == rows
    return one is None or isinstance(one, bool | int | float | str)


def _first(args: Any, kwargs: Any) -> Tensor:
    """The first tensor among arguments.

    Raises:
        NotByRow: if there is none with rows.
    """
    for one in (*args, *kwargs.values()):
        if isinstance(one, Tensor) and one.ndim:
            return one
    raise NotByRow
