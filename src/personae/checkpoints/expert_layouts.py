"""Experts of a mixture in either of two layouts: a tensor each, or one stack of all.

transformers before version 5 stores `experts.3.gate_proj.weight` (Mixtral: `experts.3.w1.weight`);
since then models hold `experts.gate_up_proj`, (experts, 2 x inner, hidden), and
`experts.down_proj`, (experts, hidden, inner), and files may hold either. Loaders take both, so a
model in the one layout is read here in the other one where its base is in that.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from personae._types import TensorSpec
from personae.checkpoints._protocol import Checkpoint
from personae.checkpoints.laid_out import Kept, LaidOut, Made

_APART = re.compile(r"(?P<block>.+\.experts)\.(?P<index>\d+)\.(?P<matrix>\w+)\.weight")
_STACKED = re.compile(r"(?P<block>.+\.experts)\.(gate_up_proj|down_proj)")


_EACH, _ALL = "a tensor for each expert", "stacks of all experts"


class _Names(NamedTuple):
    """What a layout of a tensor each calls the three matrices of an expert."""

    gate: str
    up: str
    down: str


_LAYOUTS = (_Names("gate_proj", "up_proj", "down_proj"), _Names("w1", "w3", "w2"))


class _Slice(NamedTuple):
    """Rows `start:stop` of one matrix of a stack."""

    stack: str
    expert: int
    start: int
    stop: int
    kept_bytes: int

    @property
    def used(self) -> tuple[str, ...]:
        return (self.stack,)

    def read_rows(self, model: Checkpoint, keep: Kept, start: int, stop: int) -> Tensor:
        def matrix() -> Tensor:
            return model.read_rows(self.stack, self.expert, self.expert + 1)[0]

        return keep((self.stack, self.expert), matrix)[self.start + start : self.start + stop]


class _Stack(NamedTuple):
    """A matrix for each expert, each made of some stored matrices below each other."""

    matrices: Sequence[tuple[str, ...]]
    shape: tuple[int, ...]
    dtype: torch.dtype
    kept_bytes: int = 0

    @property
    def used(self) -> tuple[str, ...]:
        return (*chain.from_iterable(self.matrices),)

    def read_rows(self, model: Checkpoint, keep: Kept, start: int, stop: int) -> Tensor:
        del keep
        matrices = [torch.cat([*map(model.read, row)]) for row in self.matrices[start:stop]]
        if matrices:
            return torch.stack(matrices)
        return torch.empty(0, *self.shape[1:], dtype=self.dtype)


def with_experts_like(base: Checkpoint, model: Checkpoint) -> Checkpoint:
    """A full model with its experts in the layout of its base.

    It is the model itself where the layouts are the same, or no known ones.
    """
    theirs, ours = _layout(base.specs), _layout(model.specs)
    if theirs == ours or theirs is None or ours is None:
        return model
    if isinstance(ours, _Names) and isinstance(theirs, _Names):
        return model  # the names alone differ
    if isinstance(theirs, _Names):
        found, wanted, made = _ALL, _EACH, _sliced(model.specs, theirs)
    else:
        found, wanted, made = _EACH, _ALL, _stacked(model.specs)
    note = f"stores {found}, and is read as the base is stored, {wanted}"
    return LaidOut(model, made, note) if made else model


def _layout(specs: Mapping[str, TensorSpec]) -> _Names | str | None:
    """What a model calls the matrices of its experts, "stacked", or None if it has none."""
    if any(_STACKED.fullmatch(name) for name in specs):
        return "stacked"
    found = {m["matrix"] for name in specs if (m := _APART.fullmatch(name))}
    return next((names for names in _LAYOUTS if found == set(names)), None)


def _sliced(specs: Mapping[str, TensorSpec], names: _Names) -> dict[TensorSpec, Made]:
    """A tensor for each matrix of each expert, from stacks of 3 axes."""
    made: dict[TensorSpec, Made] = {}
    for name, spec in specs.items():
        found = _STACKED.fullmatch(name)
        if not found or len(spec.shape) != 3:
            continue
        experts, rows, columns = spec.shape
        parts = {names.down: (0, rows)}
        if name.endswith("gate_up_proj"):
            parts = {names.gate: (0, rows // 2), names.up: (rows // 2, rows)}
        for index in range(experts):
            for matrix, (start, stop) in parts.items():
                own = f"{found['block']}.{index}.{matrix}.weight"
                apart = TensorSpec(own, (stop - start, columns), spec.dtype)
                made[apart] = _Slice(name, index, start, stop, spec.nbytes // experts)
    return made


def _stacked(specs: Mapping[str, TensorSpec]) -> dict[TensorSpec, Made]:
    """Two stacks for each block of experts whose matrices are alike and complete."""
    names = _layout(specs)
    assert isinstance(names, _Names)
    blocks: dict[str, set[int]] = {}
    for name in specs:
        if found := _APART.fullmatch(name):
            blocks.setdefault(found["block"], set()).add(int(found["index"]))
    made: dict[TensorSpec, Made] = {}
    for block, indices in blocks.items():
        for stack, matrices in (
            ("gate_up_proj", (names.gate, names.up)),
            ("down_proj", (names.down,)),
        ):
            wanted = [
                tuple(f"{block}.{index}.{matrix}.weight" for matrix in matrices)
                for index in range(len(indices))
            ]
            found = {specs.get(name) for row in wanted for name in row}
            kinds = {(spec.shape, spec.dtype) for spec in found if spec is not None}
            if None in found or len(kinds) != 1:
                continue
            (((rows, columns), dtype),) = kinds
            shape = (len(indices), rows * len(matrices), columns)
            made[TensorSpec(f"{block}.{stack}", shape, dtype)] = _Stack(wanted, shape, dtype)
    return made
