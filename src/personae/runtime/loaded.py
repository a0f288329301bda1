"""A pack in use: one model in memory, and every task of the pack on demand."""

import itertools
import threading
from collections import Counter
from collections.abc import (
    Callable,
    Collection,
    Generator,
    Hashable,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from personae.checkpoints import Checkpoint
from personae.checkpoints.naming import shown
from personae.errors import MethodError, PackError, WorkError, nearest
from personae.methods import Batch, Choice, Pool, Voting, build
from personae.packs.reader import Pack
from personae.packs.weighting import Weighting, given
from personae.run.composed import Composed
from personae.run.rebuilt import Rebuilt
from personae.runtime.cache import Cache
from personae.runtime.generating import generating, padding_of
from personae.runtime.mixed import NotByRow, mixed
from personae.runtime.paths import Paths, changed, patch, paths_bytes, paths_of
from personae.runtime.routing import AUTO, TaskRouter, fit_router, mixture_name, stored_router
from personae.runtime.rows import check_rows, in_order, joined, take_rows
from personae.runtime.shells import Shell, Shells
from personae.runtime.variants import ComposedVariant, TaskVariant, Variant
from personae.runtime.watch import Watch


@dataclass(frozen=True)
class Active:
    """A task, or several for a batch, as in force in one thread.

    Attributes:
        task: Its name; None of several.
        tasks: The names of all.
        model: The module to call.
        paths: What they change of the modules; empty where weights are in place.
    """

    task: str | None
    tasks: tuple[str, ...]
    model: nn.Module
    paths: Mapping[int, Callable[..., Any]] = field(default_factory=dict[int, Any])


class InPlace(NamedTuple):
    """Rebuilt weights in the place of the reference's.

    Attributes:
        thread: Which thread has them.
        shell: In which module.
        names: Which ones.
    """

    thread: threading.Thread
    shell: Shell
    names: frozenset[str]


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
        self._reference, self._shells = reference, shells
        self._variants: dict[str, Variant] = {}
        self._mixtures: dict[str, Variant] = {}
        self._holds = Counter[str]()
        self._router: TaskRouter | None = None
        self._placed: dict[str, Shell] = {}
        self._views: dict[str, nn.Module] = {}
        self._patched: dict[int, Callable[[], None]] = {}
        self._active: WeakKeyDictionary[threading.Thread, Active] = WeakKeyDictionary()
        self._cache: Cache[Paths] = Cache(cache, self._in_use)
        self._switching, self._registering = threading.RLock(), threading.Lock()
        self._in_place: InPlace | None = None
        self._calling = Counter[threading.Thread]()
        self._closed = False

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of all tasks."""
        return tuple(dict.fromkeys([*self.pack.manifest.tasks, *self._variants]))

    @property
    def task(self) -> str | None:
        """The task that is active in this thread; None if none is."""
        return self.task_of(threading.current_thread())

    def task_of(self, thread: threading.Thread) -> str | None:
        """The task that is active in a thread; None if none is."""
        active = self._active.get(thread)
        return None if active is None else active.task

    @property
    def cached_bytes(self) -> int:
        """Bytes of the decoded tensors that are held for tasks."""
        return self._cache.nbytes

    @property
    def model(self) -> nn.Module:
        """The module of the task that is active in this thread, else the reference's.

        Modules of all tasks share the reference's tensors. One of `factored` computes for
        whichever task is active in the thread that calls it.

        Raises:
            WorkError: if another thread has a task active in `merged` mode.
            CheckpointError: if the class of the reference is not known.
        """
        active = self._active.get(threading.current_thread())
        if active is not None:
            return active.model
        with self._switching:
            self._refuse_others("use the reference")
            self._put_back()
            return self._shells.bare()

    def model_of(self, task: str) -> nn.Module:
        """The module of a task, with its configuration; it computes for it while it is active.

        Raises:
            PackError: if there is no such task, or its file is missing or damaged.
            CheckpointError: if the class of the task is not known.
        """
        return self._view(task)

    def files_of(self, task: str) -> dict[str, Path | bytes]:
        """The small files of a task's checkpoint, such as its tokenizer, and the reference's.

        Raises:
            PackError: if there is no such task, or one of its files is missing or changed.
        """
        reference = self._shells.of_reference.auxiliary_files()
        return {**reference, **self._variant(task).outline.auxiliary_files()}

    def together(self, task: str) -> Hashable:
        """Equal for tasks whose rows are computed in one pass."""
        shell = self._shell(task)
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
            BudgetError: if the task takes more than the cache holds.
            CheckpointError: if the class of the task is not known, or the module given to `load`
                lacks tensors of it.
        """
        before = self.task
        view = self._view(task)
        if self.mode == "factored":
            _refuse_strays(task, self._variant(task), self._shell(task))
            self._register(Active(task, (task,), view, self._paths(task)))
        else:
            with self._switching:
                self._put(task)
                self._register(Active(task, (task,), view))
        return Activation(self, before)

    def deactivate(self) -> None:
        """Make this thread's model the reference again, to the bit."""
        with self._switching:
            if self.task is not None:
                self._register(None)
                self._put_back()

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
            BudgetError: if the tasks of a batch take more than the cache holds.
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
            BudgetError: if the tasks of a batch take more than the cache holds.
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
        if name in self.tasks:
            raise PackError(f"There is a task '{name}' already. Give another name.")
        if name.startswith(AUTO):
            raise PackError(f"Names that begin with '{AUTO}' are the router's. Give another name.")
        if head is not None and head not in self.pack.manifest.tasks:
            known = nearest(head, self.pack.manifest.tasks)
            raise PackError(f"{self.pack.directory} has no task '{head}'. {known}")
        self._variants[name] = self._composed(weights, head)

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
        with self._switching:
            self._closed = True
            self._active.clear()
            self._in_place = self._in_place and self._in_place._replace(
                thread=threading.current_thread()
            )
            self._put_back()
            for undo in self._patched.values():
                undo()
            self._patched.clear()
            self._reference.close()

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
            with self._routed(inputs) as found:
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
                self._shell(at_once[0]).apart = True
                waiting = [*([task] for task in at_once), *waiting]
                continue
            order += rows
            sizes.append(len(rows))
            fills.append(fill(model))
        return in_order(joined(results, sizes, fills[0]), order)

    @contextmanager
    def _routed(self, inputs: Mapping[str, Any]) -> Generator[list[str]]:
        """The task of each row as the router says; sums of tasks are there until the block ends."""
        rows = self.route(**inputs)
        names = [mixture_name(weights) for weights in rows]
        held = {name: row for name, row in zip(names, rows, strict=True) if len(row) > 1}
        with self._switching:
            self._holds.update([*held])
        try:
            with self._switching:
                for name in held.keys() - self._mixtures.keys():
                    head = max(held[name], key=held[name].__getitem__)
                    self._placed[name], self._views[name] = self._shell(head), self._view(head)
                    self._mixtures[name] = self._composed(held[name], head)
            yield names
        finally:
            with self._switching:
                self._holds.subtract([*held])
                for name in [name for name in held if not self._holds[name]]:
                    for known in (self._holds, self._mixtures, self._placed, self._views):
                        known.pop(name, None)

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
        paths = [self._paths(task, beside=tasks) for task in tasks]
        model = self._view(tasks[0])
        whole = mixed(paths, counts, self._shell(tasks[0]).widths, self._within)
        with self._in_force(Active(None, tuple(tasks), model, whole)):
            yield model

    @contextmanager
    def _within(self, paths: Paths) -> Generator[None]:
        """Let modules compute for one task of several."""
        with self._in_force(replace(self._active[threading.current_thread()], paths=paths)):
            yield

    @contextmanager
    def _in_force(self, active: Active) -> Generator[None]:
        """Something else than what is in force in this thread, for a while."""
        before = self._active.get(threading.current_thread())
        self._register(active)
        try:
            yield
        finally:
            self._register(before)

    def _register(self, active: Active | None) -> None:
        """Note what is in force in this thread."""
        with self._registering:
            if active is None:
                self._active.pop(threading.current_thread(), None)
            else:
                self._active[threading.current_thread()] = active

    @contextmanager
    def _call(self) -> Generator[nn.Module]:
        """The model, while this thread computes with it; others wait for weights in place."""
        if self.mode == "factored":
            yield self.model
            return
        thread = threading.current_thread()
        with self._switching:
            model = self.model
            self._calling[thread] += 1
        try:
            yield model
        finally:
            with self._switching:
                self._calling[thread] -= 1
                self._calling += Counter()  # keeps no thread that does not compute

    def _variant(self, task: str) -> Variant:
        """What is known of a task, composed ones too.

        Raises:
            PackError: if there is no such task, or its file is missing or damaged.
            WorkError: after `close`, when modules no longer add what a task changes.
        """
        if self._closed:
            raise WorkError(f"Cannot activate '{task}': the pack was closed. Load it again.")
        known = self._mixtures.get(task, self._variants.get(task))
        return self._task(task) if known is None else known

    def _composed(
        self, weights: Mapping[str, float] | Weighting, head: str | None
    ) -> ComposedVariant:
        """A weighted sum of tasks, with the head of one of them."""
        weighting = given(weights, self.pack.manifest, self.pack.directory)
        named = [task for task, weight in weighting.weights.items() if weight]
        parts = {task: self._task(task) for task in [*named, *([head] if head else [])]}
        rebuilt = {task: part.rebuilt for task, part in parts.items()}
        of = self._shells.of_reference if head is None else parts[head].outline
        return ComposedVariant(Composed(self._reference, rebuilt, weighting, of), parts)

    def _task(self, task: str) -> TaskVariant:
        """What is known of a task of the pack; its file is opened when it is first asked for.

        Raises:
            PackError: if there is no such task, or its file is missing or damaged.
        """
        if task not in self.pack.manifest.tasks:
            raise PackError(
                f"{self.pack.directory} has no task '{task}'. {nearest(task, self.tasks)}"
            )
        with self._switching:
            known = self._variants.get(task)
            if not isinstance(known, TaskVariant):
                known = TaskVariant(self.pack, task, Rebuilt(self.pack, task, self._reference))
                self._variants[task] = known
            return known

    def _shell(self, task: str) -> Shell:
        """The module of a task's class, with the reference's tensors."""
        with self._switching:
            if task not in self._placed:
                shell = self._shells.shell(self._variant(task).outline)
                if self.mode == "factored":
                    for unit in itertools.chain.from_iterable(shell.units.values()):
                        if id(unit.module) not in self._patched:
                            key = id(unit.module)
                            self._patched[key] = patch(unit.module, self._current, key)
                self._placed[task] = shell
            return self._placed[task]

    def _view(self, task: str) -> nn.Module:
        """The module of a task, with its configuration."""
        with self._switching:
            if task not in self._views:
                shell = self._shell(task)
                view = shell.view(self._variant(task).outline)
                if view is not shell.module and id(shell.module) in self._patched:
                    patch(view, self._current, id(shell.module))
                if self.mode == "factored" and all(view is not v for v in self._views.values()):
                    self._watch(view, shell)
                self._views[task] = view
            return self._views[task]

    def _watch(self, view: nn.Module, shell: Shell) -> None:
        """Let the first call of a shell be watched."""
        inner = view.forward

        @wraps(inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if shell.strays is not None:
                return inner(*args, **kwargs)
            units = {key: [unit.module for unit in units] for key, units in shell.units.items()}
            with Watch(units, (args, kwargs)) as watch:
                result = inner(*args, **kwargs)
            shell.strays = watch.strays
            shell.apart |= any(not isinstance(m, nn.Embedding) for m in watch.without_rows)
            active = self._active.get(threading.current_thread())
            for task in active.tasks if active is not None else ():
                _refuse_strays(task, self._variant(task), shell)
            if active is not None and active.task is None and shell.apart:
                raise NotByRow
            return result

        view.forward = forward
        if view is shell.module:
            self._patched.setdefault(id(view), lambda: view.__dict__.pop("forward", None))

    def _current(self) -> Mapping[int, Callable[..., Any]] | None:
        active = self._active.get(threading.current_thread())
        return None if active is None else active.paths

    def _in_use(self) -> set[str]:
        """The tasks that other threads have active."""
        here = threading.current_thread()
        with self._registering:
            known = [*self._active.items()]
        return {
            task
            for thread, active in known
            if thread is not here and thread.is_alive()
            for task in active.tasks
        }

    def _paths(self, task: str, beside: Collection[str] = ()) -> Paths:
        """What a task changes, decoded; `beside` others that must stay."""
        variant, shell, view = self._variant(task), self._shell(task), self._view(task)
        return self._cache.get(
            task,
            make=lambda: paths_of(variant, shell, view),
            size=lambda: paths_bytes(variant, shell),
            beside=beside,
        )

    def _put(self, task: str) -> None:
        """Put rebuilt weights in place, once all are rebuilt."""
        self._refuse_others(f"activate '{task}'")
        if self.task == task:
            return
        variant, shell = self._variant(task), self._shell(task)
        values = {
            name: variant.value(name).to(at[0].device, at[0].dtype)
            for name, at in changed(variant, shell).items()
        }
        self._put_back()
        self._in_place = InPlace(threading.current_thread(), shell, frozenset(values))
        shell.put(values)

    def _put_back(self) -> None:
        """Put the reference's weights in place, if others are."""
        if self._in_place is not None:
            shell = self._in_place.shell
            shell.put({name: shell.at_rest[name] for name in self._in_place.names})
            self._in_place = None

    def _refuse_others(self, what: str) -> None:
        """Check that no other thread needs the weights as they are.

        Raises:
            WorkError: naming it.
        """
        if self.mode != "merged":
            return
        here, held = threading.current_thread(), self._in_place
        remedy = 'or load the pack with mode="factored", in which each thread has its own task.'
        if held is not None and held.thread is not here and held.thread.is_alive():
            raise WorkError(
                f"Cannot {what}: thread '{held.thread.name}' has task "
                f"'{self.task_of(held.thread)}' active, whose weights are in the model. "
                f"Deactivate it there, {remedy}"
            )
        busy = [thread for thread, calls in self._calling.items() if calls and thread is not here]
        if busy and what != "use the reference":
            raise WorkError(
                f"Cannot {what}: thread '{busy[0].name}' computes with the model. "
                f"Wait for it, {remedy}"
            )


def _refuse_strays(task: str, variant: Variant, shell: Shell) -> None:
    """Check that what a task changes is read by the modules that have it alone.

    Raises:
        MethodError: naming the tensors of which that does not hold.
    """
    strays = shell.strays or set()
    found = [
        name
        for name, places in changed(variant, shell).items()
        if any(id(place) in strays for place in places)
    ]
    if found:
        raise MethodError(
            f"{type(shell.module).__name__} reads {shown(found)} without calling the layers that "
            f"have them, so that task '{task}' cannot be added there. Load the pack with "
            'mode="merged".'
        )


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
