"""Experts of a mixture in either of two layouts: a tensor each, or one stack of all.

transformers before version 5 stores `experts.3.gate_proj.weight` (Mixtral: `experts.3.w1.weight`);
since then models hold `experts.gate_up_proj`, (experts, 2 x inner, hidden), and
`experts.down_proj`, (experts, hidden, inner), and files may hold either. Loaders take both, so a
model in the one layout is read here in the other one where its base is in that.
"""

import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from personae._types import TensorSpec
from personae.checkpoints._protocol import Checkpoint
from personae.checkpoints.specs import by_name, check_rows, no_such_tensor

_APART = re.compile(r"(?P<block>.+\.experts)\.(?P<index>\d+)\.(?P<matrix>\w+)\.weight")
_STACKED = re.compile(r"(?P<block>.+\.experts)\.(gate_up_proj|down_proj)")


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


class _Stack(NamedTuple):
    """A matrix for each expert, each made of some stored matrices below each other."""

    matrices: Sequence[tuple[str, ...]]


def laid_out_like(base: Checkpoint, model: Checkpoint) -> Checkpoint:
    """A full model with its experts in the layout of its base.

    It is the model itself where the layouts are the same, or no known ones.
    """
    theirs, ours = _layout(base.specs), _layout(model.specs)
    if theirs == ours or theirs is None or ours is None:
        return model
    if isinstance(ours, _Names) and isinstance(theirs, _Names):
        return model  # the names alone differ
    made: Mapping[TensorSpec, _Slice | _Stack]
    made = _sliced(model.specs, theirs) if isinstance(theirs, _Names) else _stacked(model.specs)
    return ExpertsLaidOut(model, made) if made else model


def _layout(specs: Mapping[str, TensorSpec]) -> _Names | str | None:
    """What a model calls the matrices of its experts, "stacked", or None if it has none."""
    if any(_STACKED.fullmatch(name) for name in specs):
        return "stacked"
    found = {m["matrix"] for name in specs if (m := _APART.fullmatch(name))}
    return next((names for names in _LAYOUTS if found == set(names)), None)


def _sliced(specs: Mapping[str, TensorSpec], names: _Names) -> dict[TensorSpec, _Slice | _Stack]:
    """A tensor for each matrix of each expert, from stacks of 3 axes."""
    made: dict[TensorSpec, _Slice | _Stack] = {}
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
                made[apart] = _Slice(name, index, start, stop)
    return made


def _stacked(specs: Mapping[str, TensorSpec]) -> dict[TensorSpec, _Slice | _Stack]:
    """Two stacks for each block of experts whose matrices are alike and complete."""
    names = _layout(specs)
    assert isinstance(names, _Names)
    blocks: dict[str, set[int]] = {}
    for name in specs:
        if found := _APART.fullmatch(name):
            blocks.setdefault(found["block"], set()).add(int(found["index"]))
    made: dict[TensorSpec, _Slice | _Stack] = {}
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
            made[TensorSpec(f"{block}.{stack}", shape, dtype)] = _Stack(wanted)
    return made


class ExpertsLaidOut:
    """A `Checkpoint` whose experts are read in the other layout; all else is as stored.

    Attributes:
        note: What a person should be told of it.
    """

    def __init__(self, model: Checkpoint, made: Mapping[TensorSpec, _Slice | _Stack]) -> None:
        """Take the place of the tensors that others are made of. Use `laid_out_like`."""
        self._model, self._last = model, threading.local()
        self._made = {spec.name: how for spec, how in made.items()}
        found, wanted = "a tensor for each expert", "stacks of all experts"
        if any(isinstance(how, _Slice) for how in made.values()):
            found, wanted = wanted, found
        self.note = f"stores {found}, and is read as the base is stored, {wanted}"
        used = {
            name
            for how in made.values()
            for name in ([how.stack] if isinstance(how, _Slice) else sum(how.matrices, ()))
        }
        kept = [spec for name, spec in model.specs.items() if name not in used]
        self.source, self.revision = model.source, model.revision
        self.specs: Mapping[str, TensorSpec] = by_name([*kept, *made])
        self.tied: Mapping[str, str] = {
            dropped: kept for dropped, kept in model.tied.items() if kept not in used
        }
        self.copies = model.copies
        self.auxiliary_files: Mapping[str, Path] = model.auxiliary_files

    def read(self, name: str) -> Tensor:
        """Return one tensor; see `Checkpoint.read`."""
        if name in self._made:
            return self.read_rows(name, 0, self.specs[name].shape[0])
        return self._model.read(self._stored(name))

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows `start:stop`; see `Checkpoint.read_rows`."""
        how = self._made.get(name)
        if how is None:
            return self._model.read_rows(self._stored(name), start, stop)
        check_rows(self.source, self.specs[name], start, stop)
        if isinstance(how, _Slice):
            return self._matrix(how)[how.start + start : how.start + stop]
        matrices = [torch.cat([*map(self._model.read, row)]) for row in how.matrices[start:stop]]
        return torch.stack(matrices) if matrices else torch.empty(0, *self.specs[name].shape[1:])

    def factors(self, name: str) -> None:
        """None: it is no adapter."""
        del name

    def same_as_base(self, name: str) -> bool:
        """False: it is no adapter."""
        del name
        return False

    def close(self) -> None:
        """Release the model's files."""
        self._model.close()

    def _matrix(self, how: _Slice) -> Tensor:
        """One matrix of a stack; this thread's last one is kept, as rows come a few at a time."""
        key = how.stack, how.expert
        if getattr(self._last, "key", None) != key:
            self._last.matrix = self._model.read_rows(how.stack, how.expert, how.expert + 1)[0]
            self._last.key = key
        return self._last.matrix

    def _stored(self, name: str) -> str:
        return name if name in self.specs else no_such_tensor(self.source, name, self.specs)
