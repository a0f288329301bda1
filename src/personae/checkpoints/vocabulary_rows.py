"""Rows of embedding matrices under the vocabulary that comes out of a merge."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from personae._types import TensorSpec
from personae.checkpoints._protocol import Checkpoint
from personae.checkpoints.specs import check_rows
from personae.checkpoints.vocabulary import has_vocabulary_axis

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Lent:
    """A row that a model is given.

    Attributes:
        model: Of which model it is a row; `zero`: of zeros; `mean`: the mean of all others.
        row: Which of that model's own rows.
    """

    model: Checkpoint | Literal["zero", "mean"]
    row: int = 0


@dataclass(frozen=True)
class ModelRows:
    """One model's rows for the vocabulary that comes out.

    Attributes:
        rows: Rows of the model's own embedding matrix.
        index: For each row that comes out the model's own, -1 where it has none; int64. None if
            they are the same rows.
        lent: Rows that come out and are not the model's own, though it has some.
    """

    rows: int
    index: Int64[Tensor, " row"] | None
    lent: Mapping[int, Lent] = field(default_factory=dict)

    def has_axis(self, spec: TensorSpec) -> bool:
        """Whether a tensor of this model has these rows along its first axis."""
        return has_vocabulary_axis(spec, self.rows)

    def present(self, start: int, stop: int) -> Bool[Tensor, " row"]:
        """Which of the rows `start:stop` that come out the model has."""
        if self.index is None:
            return torch.ones(stop - start, dtype=torch.bool)
        own = self.index[start:stop] >= 0
        own[[row - start for row in self.lent if start <= row < stop]] = True
        return own


class WithRows:
    """A checkpoint seen under the vocabulary that comes out: its embeddings have those rows.

    Rows of tokens the model lacks are zero; `ModelRows.present` tells which. All else is as it is.

    Attributes:
        model: The checkpoint itself.
    """

    def __init__(self, model: Checkpoint, rows: ModelRows) -> None:
        """See a model under other rows; reads nothing."""
        self.model = model
        self._rows = rows
        self.source = model.source
        self.revision = model.revision
        self.tied: Mapping[str, str] = model.tied
        self.copies = model.copies
        self.auxiliary_files: Mapping[str, Path] = model.auxiliary_files
        self._means: dict[str, Tensor] = {}
        size = rows.rows if rows.index is None else len(rows.index)
        self.specs: Mapping[str, TensorSpec] = {
            name: replace(spec, shape=(size, *spec.shape[1:])) if rows.has_axis(spec) else spec
            for name, spec in model.specs.items()
        }

    def read(self, name: str) -> Tensor:
        """One tensor, embeddings under the rows that come out."""
        if self._as_it_is(name):
            return self.model.read(name)
        return self.read_rows(name, 0, self.specs[name].shape[0])

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start:stop` of one tensor, reading no others."""
        if self._as_it_is(name) or self._rows.index is None:
            return self.model.read_rows(name, start, stop)
        spec = self.specs[name]
        check_rows(self.source, spec, start, stop)
        parts: list[Tensor] = [torch.zeros(0, *spec.shape[1:], dtype=spec.dtype)]
        for first, count in _runs(self._rows.index[start:stop]):
            if first < 0:
                parts.append(torch.zeros(count, *spec.shape[1:], dtype=spec.dtype))
            else:
                parts.append(self.model.read_rows(name, first, first + count))
        found = torch.cat(parts)
        for row, lent in self._rows.lent.items():
            if start <= row < stop:
                found[row - start] = self._lent(name, lent)
        return found

    def _lent(self, name: str, lent: Lent) -> Tensor:
        """A row that is not the model's own, of the tensor that it is a row of."""
        if lent.model == "zero":
            return torch.zeros(self.specs[name].shape[1:])
        if lent.model == "mean":
            return self._mean(name)
        there = name if name in lent.model.specs else lent.model.tied.get(name, name)
        return lent.model.read_rows(there, lent.row, lent.row + 1)[0]

    def _mean(self, name: str) -> Tensor:
        """The mean of the rows that a model has before the first that is a mean, fp32."""
        if name not in self._means:
            rows = min(row for row, lent in self._rows.lent.items() if lent.model == "mean")
            total = torch.zeros(self.specs[name].shape[1:], dtype=torch.float64)
            had = int(self._rows.present(0, rows).sum())
            for start in range(0, rows, _ROWS_AT_ONCE):
                part = self.read_rows(name, start, min(start + _ROWS_AT_ONCE, rows))
                total += part.sum(dim=0, dtype=torch.float64)
            self._means[name] = (total / max(had, 1)).float()
        return self._means[name]

    def factors(
        self, name: str
    ) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]] | None:
        """The model's own, where the rows are."""
        return self.model.factors(name) if self._as_it_is(name) else None

    def same_as_base(self, name: str) -> bool:
        """Whether it is known to be the base's own, rows and all."""
        return self._as_it_is(name) and self.model.same_as_base(name)

    def close(self) -> None:
        """Close the model."""
        self.model.close()

    def _as_it_is(self, name: str) -> bool:
        if self._rows.index is None or name not in self.model.specs:
            return True
        return not self._rows.has_axis(self.model.specs[name])


def _runs(index: Int64[Tensor, " row"]) -> Iterator[tuple[int, int]]:
    """First row and length of runs of consecutive rows; first -1 for runs of absent ones."""
    if not len(index):
        return
    absent = index < 0
    step = torch.where(absent[1:], 0, 1)
    broken = (index.diff() != step) | (absent[1:] != absent[:-1])
    cuts = broken.nonzero().flatten() + 1
    starts = [0, *cuts.tolist()]
    for start, stop in zip(starts, [*starts[1:], len(index)], strict=True):
        yield int(index[start]), stop - start


def settle(
    values: Float[Tensor, "expert row *rest"],
    reference: Float[Tensor, "row *rest"],
    present: Bool[Tensor, "expert row"],
    in_base: Bool[Tensor, " row"],
) -> None:
    """Turn rows of a vocabulary into reference and deltas, in place.

    A token that the base lacks has the mean of the experts that have it as reference, so one that
    a single expert has is copied. An expert that lacks a token has delta 0 there.

    Args:
        values: The experts' rows; becomes the deltas.
        reference: The base's rows; rows it lacks become the mean.
        present: Which rows each expert has.
        in_base: Which rows the base has; none where there is no base.
    """
    lacking = (~in_base).nonzero().flatten()
    if len(lacking):
        having = present[:, lacking].reshape(len(values), len(lacking), *[1] * (values.ndim - 2))
        total = torch.where(having, values[:, lacking], 0.0).sum(dim=0)
        reference[lacking] = total / having.sum(dim=0).clamp(min=1)
    values.sub_(reference)
    values[~present] = 0.0
