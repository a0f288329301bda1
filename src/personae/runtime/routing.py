"""Which tasks the rows of a batch are of, by the examples nearest to each: a router of a pack.

Auto-Switch (arXiv:2412.00054) is such a router on a pack by `t_switch`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from personae.errors import Faults, MethodError, PackError, nearest
from personae.family.finite import is_finite
from personae.methods import Batch, NearestNeighbours, Pool, Voting, features, limited
from personae.packs.reader import Pack
from personae.packs.writer import PackWriter
from personae.writers import locked

AUTO = "auto"
"""In the place of a task: those that the router says. Sums of tasks that it asks for begin so."""


@dataclass(frozen=True)
class TaskRouter:
    """Weighs tasks for each row.

    Attributes:
        votes: Features to weights.
        width: Of features.
        pool: How they are made of the states of tokens.
    """

    votes: NearestNeighbours
    width: int
    pool: Pool

    def weights(self, model: nn.Module, inputs: Mapping[str, Any]) -> list[dict[str, float]]:
        """The tasks of each row with their weights, but those of none.

        Args:
            model: The reference.
            inputs: What it takes, by name.

        Raises:
            MethodError: if features are of another width or not finite, or no input is a tensor.
        """
        batch = {name: one for name, one in inputs.items() if isinstance(one, Tensor)}
        if not batch:
            raise MethodError("No input is a tensor, of which a router could tell the task.")
        seen = features(model, batch, {}, self.pool).cpu()
        if seen.shape[1] != self.width:
            raise MethodError(
                f"The router was fitted on features of {self.width} numbers; this model's have "
                f"{seen.shape[1]}. Fit it again with this model."
            )
        odd = [row for row, one in enumerate(seen) if not is_finite(one)]
        if odd:
            raise MethodError(
                f"Features of row {odd[0]} are NaN or infinite, so that no example is near it. "
                "Repair the inputs or the model."
            )
        return [
            {task: weight for task, weight in zip(self.votes.tasks, row, strict=True) if weight}
            for row in self.votes.weights(seen).tolist()
        ]


def fit_router(
    pack: Pack, model: nn.Module, batches: Mapping[str, Iterable[Batch]], asked: Voting
) -> TaskRouter:
    """Take the features of examples of each task, and store them in the pack.

    Args:
        pack: The pack.
        model: Its reference.
        batches: Task to batches of inputs.
        asked: How tasks are told by them.

    Raises:
        MethodError: naming every task without data, every one that the pack does not have.
        PackError: if the pack is gone, or has other tasks than when it was loaded.
    """
    faults, tasks = Faults(), pack.manifest.tasks
    for task in batches.keys() - tasks.keys():
        faults.add(f"{pack.directory} has no task '{task}'. {nearest(task, tasks)}")
    for task in tasks.keys() - batches.keys():
        faults.add(f"There is no data of the task '{task}'. Give batches of it by this name.")
    if AUTO in tasks:
        faults.add(f"'{AUTO}' is a task here, so that it cannot stand for what a router says.")
    faults.raise_if_any(MethodError)
    examples: dict[str, Tensor] = {}
    for task in sorted(tasks):
        some = limited(batches[task], asked.examples)
        found = [features(model, batch, {}, asked.pool).cpu() for batch in some]
        if not found:
            faults.add(f"The data of the task '{task}' has no sample. Give batches of it.")
            continue
        examples[task] = torch.cat(found)
    faults.raise_if_any(MethodError)
    votes = NearestNeighbours(examples, asked.neighbours, asked.mode)
    with locked(Pack(pack.directory).directory):
        now = Pack(pack.directory).manifest
        _check_same(pack, now.tasks.keys() == tasks.keys())
        PackWriter(pack.directory, now).set_router(
            examples, neighbours=asked.neighbours, mode=asked.mode, pool=asked.pool
        )
    return TaskRouter(votes, next(iter(examples.values())).shape[1], asked.pool)


def stored_router(pack: Pack) -> TaskRouter:
    """The router of a pack.

    Raises:
        PackError: if there is none, it is damaged, it does not know all tasks, or it is another
            than when the pack was loaded.
    """
    _check_same(pack, Pack(pack.directory).manifest.router == pack.manifest.router)
    examples, record = pack.read_router(), pack.manifest.router
    assert record is not None
    if pack.manifest.unrouted:
        raise PackError(
            f"The router of {pack.directory} has no example of "
            f"{', '.join(pack.manifest.unrouted)}, which came later. Fit it again: fit_router."
        )
    votes = NearestNeighbours(examples, record.neighbours, record.mode)
    return TaskRouter(votes, record.width, record.pool)


def _check_same(pack: Pack, same: bool) -> None:
    """Refuse a pack that is not what it was.

    Raises:
        PackError: It is not.
    """
    if not same:
        raise PackError(
            f"{pack.directory} has other tasks, or another router, than when it was loaded. Load "
            "it again."
        )


def mixture_name(weights: Mapping[str, float]) -> str:
    """What a sum of tasks goes by; of one task its name."""
    if len(weights) == 1:
        return next(iter(weights))
    return f"{AUTO}: " + " + ".join(f"{weight!r} {task}" for task, weight in weights.items())
