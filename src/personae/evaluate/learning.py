"""What a suite says of a learned method, and the data that the method is given."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch
from pydantic import Field

from personae.errors import Faults, MethodError
from personae.evaluate.metrics import METRICS
from personae.evaluate.tasks import Examples, Split, Task, batches, taken
from personae.methods import LEARNED_METHODS, LearnedMethod, build, lookup
from personae.recipe._base import Given, Strict
from personae.recipe._faults import Fault


class LearnData(Strict):
    """Which examples of each task a learned method is given."""

    split: Split
    examples: int | None = Field(default=None, gt=0)
    batch_size: int = Field(default=16, gt=0)
    seed: int = Field(default=0, ge=0)


class LearnSettings(Strict):
    """A learned method, with its parameters and its data."""

    method: str
    parameters: Given = Field(default={})
    data: LearnData

    def learned(self) -> LearnedMethod:
        """The method with its parameters.

        Raises:
            MethodError: if there is none of this name, or a parameter is wrong.
        """
        return build(lookup(LEARNED_METHODS, self.method), self.parameters)

    def faults(self, splits: Mapping[str, Collection[str]]) -> Iterator[Fault]:
        """What is wrong with it, a fault each.

        Args:
            splits: Expert to the splits that its task declares; none for one without a task.
        """
        told = Faults()
        try:
            self.learned().check_experts(len(splits), told, has_base=True)
        except MethodError as error:
            told.take(error)
        for text in told.messages:
            place = ("parameters",) if self.method in LEARNED_METHODS else ("method",)
            yield Fault(place, text)
        lacking = [name for name, declared in splits.items() if self.data.split not in declared]
        if lacking:
            yield Fault(
                ("data", "split"),
                f"There is no data for a method that needs it: {self.method} looks at the split "
                f"'{self.data.split}' of every expert's task, and there is none of "
                f"{', '.join(lacking)}. Declare it under data.splits of the task, or name another.",
            )

    def examples_of(self, task: Task) -> Examples:
        """The task's examples that the method is given: so many of the split, drawn by the seed.

        Labels are there where they are numbers, which Fisher's gradients of regressions need.
        """
        split = {"train": task.train, "validation": task.validation, "test": task.test}
        examples = split[self.data.split]
        if not examples:
            return {}
        draw = torch.Generator().manual_seed(self.data.seed)
        count = len(examples["labels"])
        order = torch.randperm(count, generator=draw)[: self._most(count)]
        found = taken(examples, order)
        if METRICS[task.metric].answers != "numbers":
            del found["labels"]
        return found

    def batches_of(self, task: Task) -> list[Examples]:
        """The same in batches, as the task's models take them, in an order drawn by the seed."""
        examples = self.examples_of(task)
        if not examples:
            return []
        draw = torch.Generator().manual_seed(self.data.seed)
        count = len(next(iter(examples.values())))
        places = {**examples, "labels": torch.arange(count)}  # of which batches are always made
        found: list[Examples] = []
        for batch in batches(places, self.data.batch_size, draw):
            labels = {n: examples[n][batch["labels"]] for n in examples if n == "labels"}
            found.append(task.inputs(batch, torch.device("cpu")) | labels)
        return found

    def seen(self, tasks: Sequence[Task]) -> str:
        """What the method sees of these tasks, in words."""
        method = lookup(LEARNED_METHODS, self.method)
        counts = [len(next(iter(self.examples_of(task).values()), ())) for task in tasks]
        text = f"{method.sees}: {counted(counts)} a task of the split {self.data.split}"
        if ("transductive" in method.sees) == (self.data.split == "test"):
            return text
        return text + (" (transductive)" if self.data.split == "test" else " (not transductive)")

    def _most(self, count: int) -> int:
        """How many examples are given; no more than the method's own limit, if it has one."""
        limits = [self.data.examples, getattr(self.learned(), "examples", None)]
        return min([count, *(one for one in limits if one is not None)])


def counted(counts: Iterable[int]) -> str:
    """Least and most, or what all are."""
    found = {*counts}
    return "–".join(map(str, sorted({min(found), max(found)})))
