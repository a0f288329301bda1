"""What a runtime can activate, a task or a sum of some: an outline, values and factors."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from personae.checkpoints.configuration import CONFIG
from personae.checkpoints.modules import read_auxiliary_file
from personae.errors import MethodError
from personae.packs.reader import Pack
from personae.run import outline
from personae.run.composed import Composed
from personae.run.outline import Outline
from personae.run.rebuilt import Rebuilt
from personae.writers import cast

GENERATION = "generation_config.json"


@runtime_checkable
class Variant(Protocol):
    """A model made of the reference and a little.

    Attributes:
        outline: Its names, dtypes and small files.
        coded: Names of tensors to which a delta is added.
    """

    outline: Outline
    coded: Collection[str]

    def value(self, name: str) -> Tensor:
        """One tensor, as a checkpoint would hold it."""
        ...

    def factors(self, name: str, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """The delta of one tensor as a product of two factors, fp32; None where it is none.

        They are decoded on `device`, and are there.
        """
        ...

    def factor_rank(self, name: str) -> int | None:
        """The rank of these factors, told without decoding."""
        ...


class TaskVariant:
    """A task of a pack as a `Variant`.

    Attributes:
        rebuilt: What its pack tells.
        names: What it calls each of the reference's tensors.
    """

    def __init__(self, pack: Pack, task: str, rebuilt: Rebuilt) -> None:
        """Take what is there; decodes nothing."""
        self.rebuilt = rebuilt
        self.names = {ref_name: name for name, ref_name in rebuilt.reference_names.items()}
        self.outline = outline.of_task(pack, rebuilt, task)
        self.coded: Collection[str] = {
            name
            for name in rebuilt.coded
            if rebuilt.record.tensors[rebuilt.reference_names[name]].treatment != "skipped"
        }

    def value(self, name: str) -> Tensor:
        """One tensor; see `Variant.value`."""
        return cast(self.rebuilt.read(name), self.outline.specs[name], computed=name in self.coded)

    def factors(self, name: str, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """The delta's factors; see `Variant.factors`."""
        return self.rebuilt.factors(self.outline.reference_names[name], device)

    def factor_rank(self, name: str) -> int | None:
        """Their rank; see `Variant.factor_rank`."""
        record = self.rebuilt.record.tensors[self.outline.reference_names[name]]
        if len(record.shape) != 2 or any(block.rank is None for block in record.blocks):
            return None
        return sum(block.rank or 0 for block in record.blocks)


class ComposedVariant:
    """A weighted sum of tasks as a `Variant`; its factors are theirs, side by side."""

    def __init__(self, composed: Composed, tasks: Mapping[str, TaskVariant]) -> None:
        """Take what is there; decodes nothing.

        Args:
            composed: The sum.
            tasks: What it is of, by name.
        """
        self._composed = composed
        self.outline = composed.outline
        weights = composed.weighting.weights
        self._parts = [(weights[name], task) for name, task in tasks.items() if weights.get(name)]
        self.coded: Collection[str] = {n for n in composed.coded if any(self._coded(n))}

    def value(self, name: str) -> Tensor:
        """One tensor; see `Variant.value`."""
        return self._composed[name]

    def factors(self, name: str, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """The delta's factors; see `Variant.factors`."""
        found = [(weight, task.factors(own, device)) for weight, task, own in self._coded(name)]
        lefts = [pair[0] * weight for weight, pair in found if pair is not None]
        rights = [pair[1] for _, pair in found if pair is not None]
        return (torch.cat(lefts, dim=1), torch.cat(rights)) if len(lefts) == len(found) else None

    def factor_rank(self, name: str) -> int | None:
        """Their rank; see `Variant.factor_rank`."""
        ranks = [task.factor_rank(own) for _, task, own in self._coded(name)]
        return None if None in ranks else sum(rank or 0 for rank in ranks)

    def _coded(self, name: str) -> Iterator[tuple[float, TaskVariant, str]]:
        """The tasks that changed a tensor, with their weights and what they call it."""
        ref_name = self.outline.reference_names[name]
        for weight, task in self._parts:
            own = task.names.get(ref_name, "")
            if own in task.coded:
                yield weight, task, own


def check_factored(pack: Pack, task: str) -> None:
    """Check that the matrices of a task are stored as factors; looks at pack.json alone.

    Raises:
        MethodError: if its codec stores them otherwise.
    """
    for name, record in pack.task(task).tensors.items():
        matrix = len(record.shape) == 2 and min(record.shape) > 1
        if matrix and record.treatment == "coded" and record.rank is None:
            raise MethodError(
                f"Codec '{pack.manifest.method}' stores '{name}' of task '{task}' otherwise than "
                "as two factors, so that nothing can be added in the forward pass. Load the pack "
                'with mode="merged", which takes every codec; svd, dts, delta_come, tsv_c and '
                "residual have factors."
            )


def small_file(of: Outline, name: str = CONFIG) -> dict[str, Any]:
    """The content of one of the small JSON files of a model; empty if there is none.

    Raises:
        CheckpointError: if it is damaged.
    """
    files: dict[str, Path | bytes] = {**of.auxiliary_files()}
    content = read_auxiliary_file(files, name)
    return content if isinstance(content, dict) else {}
