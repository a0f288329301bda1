"""A pack in use: one model in memory, and every task of the pack on demand."""

import threading
from collections.abc import Callable, Generator, Hashable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from personae.checkpoints import Checkpoint
from personae.errors import MethodError, WorkError
from personae.methods import Batch, Choice, Pool, Voting, build
from personae.packs.reader import Pack
from personae.packs.weighting import Weighting
from personae.runtime.active import Active, Threads
from personae.runtime.catalogue import Catalogue
from personae.runtime.generating import generating, padding_of
from personae.runtime.in_place import InPlace
from personae.runtime.mixed import NotByRow, mixed
from personae.runtime.paths import Paths
from personae.runtime.routing import AUTO, TaskRouter, fit_router, stored_router
from personae.runtime.rows import check_rows, in_order, joined, take_rows
from personae.runtime.shells import Shells


class Runtime:
    """A reference in memory, and the tasks of a pack around it; see `load`.

    Attributes:
        pack: The pack.
        mode: `merged` or `factored`.
    """

    def __init__(
        self, pack: Pack, reference: Checkpoint, shells: Shells, mode: str, cache: int
    ) -> None:
        """Take what is there; builds no model yet."""
        self.pack, self.mode = pack, mode
        self._router: TaskRouter | None = None
        self._threads = Threads()
        self._in_place = InPlace(self._threads)
        self._catalogue = Catalogue(
            pack, reference, shells, self._threads, factored=mode == "factored", cache=cache
        )
        self._closed = False

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of all tasks."""
        return self._catalogue.names

    @property
    def task(self) -> str | None:
        """The task that is active in this thread; None if none is."""
        return self.task_of(threading.current_thread())

    def task_of(self, thread: threading.Thread) -> str | None:
        """The task that is active in a thread; None if none is."""
        return self._threads.task_of(thread)

    @property
    def cached_bytes(self) -> int:
        """Bytes of the decoded tensors that are held for tasks."""
        return self._catalogue.cached_bytes

    @property
    def model(self) -> nn.Module:
        """The module of the task that is active in this thread, else the reference's.

        Modules of all tasks share the reference's tensors. One of `factored` computes for
        whichever task is active in the thread that calls it.

        Raises:
            WorkError: if another thread has a task active in `merged` mode.
            CheckpointError: if the class of the reference is not known.
        """
        active = self._threads.here
        if active is not None:
            return active.model
        with self._in_place.lock:
            self._in_place.check_free("use the reference", weights_change=False)
            self._in_place.put_back()
            return self._catalogue.bare()

    def model_of(self, task: str) -> nn.Module:
        """The module of a task, with its configuration; it computes for it while it is active.

        Raises:
            PackError: if there is no such task, or its file is missing or damaged.
            CheckpointError: if the class of the task is not known.
        """
        return self._catalogue.view(task)

    def files_of(self, task: str) -> dict[str, Path | bytes]:
        """The small files of a task's checkpoint, such as its tokenizer, and the reference's.

        Raises:
            PackError: if there is no such task, or one of its files is missing or changed.
        """
        return self._catalogue.files_of(task)

    def together(self, task: str) -> Hashable:
        """Equal for tasks whose rows are computed in one pass."""
        shell = self._catalogue.shell(task)
        return task if self.mode == "merged" or shell.apart else id(shell)

    def activate(self, task: str) -> "Activation":
        """Make a task the one that `model` computes for, in this thread.

        It stays so until another is activated or `deactivate` is called; as a context manager,
        until the block ends, when the task before is active again.

        Args:
            task: Its name.

        Raises:
            PackError: if there is no such task, or its file is missing or damaged.
            WorkError: if another thread has a task active, or computes, in `merged` mode; after
                `close`.
            CheckpointError: if the class of the task is not known, or the module given to `load`
                lacks tensors of it.
        """
        before, view = self.task, self._catalogue.view(task)
        if self.mode == "factored":
            self._catalogue.check_readable(task)
            self._threads.put(Active(task, (task,), view, self._catalogue.paths(task)))
        else:
            with self._in_place.lock:
                self._in_place.check_free(f"activate '{task}'", weights_change=True)
                if self.task != task:
                    self._in_place.put(self._catalogue.variant(task), self._catalogue.shell(task))
                self._threads.put(Active(task, (task,), view))
        return Activation(self, before)

    def deactivate(self) -> None:
        """Make this thread's model the reference again, to the bit."""
        with self._in_place.lock:
            if self.task is not None:
                self._threads.put(None)
                self._in_place.put_back()

    def __call__(self, *args: Any, tasks: str | Iterable[str] | None = None, **inputs: Any) -> Any:
        """What the model computes for this thread's task, or for the task of each row.

        Args:
            *args: As the module takes them.
            tasks: The task of each row of the inputs, or of all; or `auto`, for what `route` says.
            **inputs: As the module takes them; what is batched has its rows along the first axis.

        Returns:
            As the module returns it, rows in the order given. Of several tasks, narrower heads are
            filled up with -inf along the last axis, and where their rows are computed one task
            after another, caches are left out.

        Raises:
            PackError: if there is no such task, or its file is missing or damaged.
            MethodError: if inputs have not as many rows as `tasks` names tasks, or hold labels of
                several tasks.
            WorkError: if another thread has a task active in `merged` mode.
        """
        if tasks is not None:
            return self._batch(tasks, args, inputs, lambda model: model, lambda _: -torch.inf)
        with self._call() as model:
            return model(*args, **inputs)

    def generate(self, *args: Any, tasks: str | Iterable[str] | None = None, **inputs: Any) -> Any:
        """What the model generates, as `generate` of transformers.

        Args:
            *args: As `generate` takes them.
            tasks: The task of each row of the inputs, or of all; or `auto`, for what `route` says.
            **inputs: As `generate` takes them.

        Returns:
            As `generate` returns it, rows in the order given.

        Raises:
            PackError: if there is no such task, or its file is missing or damaged.
            MethodError: if the model's class does not generate, or as for a call.
            WorkError: if another thread has a task active in `merged` mode.
        """
        if tasks is not None:
            return self._batch(tasks, args, inputs, generating, padding_of)
        with self._call() as model:
            return generating(model)(*args, **inputs)

    def compose(
        self, name: str, weights: Mapping[str, float] | Weighting, *, head: str | None = None
    ) -> None:
        """Make a task of others, as `personae compose` does: the reference and a weighted sum.

        It is activated like any other, and is no part of the pack.

        Args:
            name: What it is called.
            weights: Task to weight, or what `weigh` found; tasks not named count 0.
            head: The task whose head it has; without one it is of the reference's class.

        Raises:
            PackError: if the pack has no such task, or has one of this name.
            RecipeError: if a weight is not finite, or all are 0.
        """
        self._catalogue.compose(name, weights, head)

    def fit_router(
        self,
        batches: Mapping[str, Iterable[Batch]],
        *,
        neighbours: int = 10,
        mode: Choice = "mix",
        examples: int = 100,
        pool: Pool = "first",
    ) -> None:
        """Keep features of a few examples of each task in the pack, by which `route` decides.

        Features are the reference's last hidden states (what its last linear layer is given, of
        modules that are not of transformers; the encoder's, of encoder-decoders). Auto-Switch
        (arXiv:2412.00054), but that each sample is weighed by itself.

        Args:
            batches: Task to batches of its inputs, by the names of the model's arguments; without
                labels. Every task of the pack is needed.
            neighbours: Examples that vote.
            mode: `mix` weighs tasks by their share of the votes; `pick` takes the one with most.
            examples: Most examples of a task that are kept.
            pool: Which states count: the `first` token's, or their `mean`. The first token of a
                decoder has seen nothing of the rest: take the mean.

        Raises:
            MethodError: if a task has no data or is not in the pack, or a parameter is wrong.
            PackError: if the pack is gone or was changed.
            WorkError: if another thread has a task active in `merged` mode.
        """
        asked = build(
            Voting, {"neighbours": neighbours, "mode": mode, "examples": examples, "pool": pool}
        )
        with self._at_rest() as model:
            self._router = fit_router(self.pack, model, batches, asked)

    def route(self, **inputs: Any) -> list[dict[str, float]]:
        """The tasks of each row with their weights, which sum to 1, as the pack's router says.

        Args:
            **inputs: As the reference takes them; those that are no tensors are not looked at.

        Raises:
            PackError: if the pack has no router, or one that does not know all of its tasks.
            MethodError: if features are of another width than the router's.
            WorkError: if another thread has a task active in `merged` mode.
        """
        with self._at_rest() as model:
            if self._router is None:
                self._router = stored_router(self.pack)
            return self._router.weights(model, inputs)

    def close(self) -> None:
        """Let the model be the reference, compute by itself again, and release the files."""
        with self._in_place.lock:
            self._closed = True
            self._threads.clear()
            self._in_place.put_back()
            self._catalogue.close()

    def _batch(
        self,
        tasks: str | Iterable[str],
        args: tuple[Any, ...],
        inputs: dict[str, Any],
        how: Callable[[nn.Module], Callable[..., Any]],
        fill: Callable[[nn.Module], int | float],
    ) -> Any:
        """Compute rows of several tasks: those of models of one class at once, where that can be.

        Args:
            tasks: The task of each row, or of all.
            args: Inputs without a name.
            inputs: Inputs with one.
            how: What is called, of a module.
            fill: What narrower results of a module are filled up with.

        Raises:
            MethodError: if tasks are to be found by inputs without names.
        """
        if tasks == AUTO and AUTO not in self.tasks:
            if args:
                raise MethodError(f'tasks="{AUTO}" takes inputs by their names alone.')
            with self._catalogue.mixtures(self.route(**inputs)) as found:
                return self._batch(found, args, inputs, how, fill)
        if isinstance(tasks, str):
            with self.activate(tasks):
                return how(self.model)(*args, **inputs)
        tasks = list(tasks)
        check_rows(tasks, {str(n): one for n, one in enumerate(args)} | inputs)
        order: list[int] = []
        sizes: list[int] = []
        results: list[Any] = []
        fills: list[int | float] = []
        waiting = [*self._passes([*dict.fromkeys(tasks)])]
        while waiting:
            at_once = waiting.pop(0)
            rows = [row for task in at_once for row, of in enumerate(tasks) if of == task]
            own_args, own_inputs = take_rows((args, inputs), rows, len(tasks))
            try:
                with self._several(at_once, [*map(tasks.count, at_once)]) as model:
                    results.append(how(model)(*own_args, **own_inputs))
            except NotByRow:
                self._catalogue.shell(at_once[0]).apart = True
                waiting = [*([task] for task in at_once), *waiting]
                continue
            order += rows
            sizes.append(len(rows))
            fills.append(fill(model))
        return in_order(joined(results, sizes, fills[0]), order)

    @contextmanager
    def _at_rest(self) -> Generator[nn.Module]:
        """The reference, while this thread computes with it; then the task before is active again.

        Raises:
            WorkError: if another thread has a task active in `merged` mode; after `close`.
        """
        if self._closed:
            raise WorkError("Cannot use the reference: the pack was closed. Load it again.")
        before = self.task
        self.deactivate()
        try:
            with self._call() as model:
                yield model
        finally:
            if before is not None:
                self.activate(before)

    def _passes(self, tasks: Sequence[str]) -> list[list[str]]:
        """The tasks of a batch, those together that are computed at once."""
        found: dict[Hashable, list[str]] = {}
        for task in tasks:
            found.setdefault(self.together(task), []).append(task)
        return [*found.values()]

    @contextmanager
    def _several(self, tasks: Sequence[str], counts: Sequence[int]) -> Generator[nn.Module]:
        """The model for so many rows of each of some tasks, which follow each other."""
        if len(tasks) == 1:
            with self.activate(tasks[0]), self._call() as model:
                yield model
            return
        paths = [self._catalogue.paths(task) for task in tasks]
        model, shell = self._catalogue.view(tasks[0]), self._catalogue.shell(tasks[0])
        whole = mixed(paths, counts, shell.widths, self._within)
        with self._threads.during(Active(None, tuple(tasks), model, whole)):
            yield model

    @contextmanager
    def _within(self, paths: Paths) -> Generator[None]:
        """Let modules compute for one task of several."""
        here = self._threads.here
        assert here is not None
        with self._threads.during(replace(here, paths=paths)):
            yield

    @contextmanager
    def _call(self) -> Generator[nn.Module]:
        """The model, while this thread computes with it; others wait for weights in place."""
        if self.mode == "factored":
            yield self.model
            return
        with self._in_place.lock:
            model = self.model
            self._in_place.begin()
        try:
            yield model
        finally:
            self._in_place.end()


class Activation:
    """A task made active: as a context manager, it is until the block ends."""

    def __init__(self, runtime: Runtime, before: str | None) -> None:
        """Take the task that was active before."""
        self._runtime, self._before = runtime, before

    def __enter__(self) -> nn.Module:
        """The model, with the task active."""
        return self._runtime.model

    def __exit__(self, *_: object) -> None:
        """Activate the task that was before, or none."""
        if self._before is None:
            self._runtime.deactivate()
        else:
            self._runtime.activate(self._before)
