"""A pack in use: one model in memory, and every task of the pack on demand."""

import threading
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn

from personae.checkpoints import Checkpoint
from personae.errors import Faults, MethodError, PackError, RecipeError, WorkError, nearest
from personae.packs.reader import Pack
from personae.recipe import parse_size
from personae.run.rebuilt import Rebuilt
from personae.run.reference import open_reference
from personae.run.work import Work
from personae.runtime.cache import Cache
from personae.runtime.paths import Paths, changed, patch, paths_bytes, paths_of
from personae.runtime.shells import Shell, Shells
from personae.runtime.variants import TaskVariant, Variant, check_factored

MODES = ("merged", "factored")
CACHE = "1GB"
"""Bytes of decoded factors held, by default."""


def load(
    pack: str | Path | Pack,
    *,
    mode: str = "merged",
    base: Any = None,
    model: nn.Module | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    cache: str | int = CACHE,
    work: Work | None = None,
) -> "Runtime":
    """Load the reference of a pack, and activate any task of it.

    Args:
        pack: The pack, or its directory.
        mode: `merged` puts a task's rebuilt weights in the place of the reference's, which stay in
            memory beside them; it takes every codec, and one thread at a time has a task.
            `factored` adds low-rank factors in the forward pass; it takes the codecs that store
            factors (`svd`, `dts`, `delta_come`, `tsv_c`), and each thread has its own task.
        base: Where the reference is, if not where the pack says.
        model: The module to use, named as the experts are; its tensors become the reference's. By
            default the models are built by the classes of `transformers` that their configurations
            name. Without `base` it has to be the reference itself.
        device: Where the model goes; by default the CPU.
        dtype: Of the model's floating tensors; by default as the reference has most of them.
        cache: Most bytes of decoded factors held, such as "256MB"; of no use to `merged`.
        work: Workers and progress of checking the reference.

    Raises:
        PackError: if the pack is damaged, or its reference is another or missing.
        MethodError: if `factored` was asked for of a codec without factors.
        RecipeError: if the mode, device or size is none of those.
        CheckpointError: if the class of the reference is not known, or `model` lacks tensors.
    """
    faults = Faults()
    if mode not in MODES:
        faults.add(f"Unknown mode '{mode}'. {nearest(mode, MODES)}")
    limit = _size(cache, faults)
    place = _device(device, faults)
    faults.raise_if_any(RecipeError)
    opened = Pack(pack.directory if isinstance(pack, Pack) else Path(pack))
    if mode == "factored":
        for task in opened.manifest.tasks:
            check_factored(opened, task)
    reference = open_reference(opened, model if base is None else base, work or Work())
    return Runtime(opened, reference, Shells(reference, model, place, dtype), mode, limit)


def _size(cache: str | int, faults: Faults) -> int:
    if isinstance(cache, int):
        return cache
    try:
        return int(parse_size(cache))
    except ValueError as error:
        faults.add(f"cache: {error}")
        return 0


def _device(device: str | torch.device | None, faults: Faults) -> torch.device:
    try:
        return Work(device=str(device or "cpu")).torch_device
    except RecipeError as error:
        faults.take(error)
        return torch.device("cpu")


@dataclass(frozen=True)
class Active:
    """A task as it is in force in one thread.

    Attributes:
        task: Its name.
        model: The module to call.
        paths: What it changes of the modules; empty where its weights are in place.
    """

    task: str
    model: nn.Module
    paths: Paths = field(default_factory=Paths)


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
        self._views: dict[str, nn.Module] = {}
        self._patched: dict[int, nn.Module] = {}
        self._active: WeakKeyDictionary[threading.Thread, Active] = WeakKeyDictionary()
        self._cache: Cache[Paths] = Cache(cache, self._in_use)
        self._switching = threading.RLock()
        self._in_place: InPlace | None = None
        self._calling = Counter[threading.Thread]()

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
            return self._bare()

    def activate(self, task: str) -> "Activation":
        """Make a task the one that `model` computes for, in this thread.

        It stays so until another is activated or `deactivate` is called; as a context manager,
        until the block ends, when the task before is active again.

        Args:
            task: Its name.

        Raises:
            PackError: if there is no such task, or its file is missing or damaged.
            WorkError: if another thread has a task active, or computes, in `merged` mode.
            BudgetError: if the task takes more than the cache holds.
            CheckpointError: if the class of the task is not known, or the module given to `load`
                lacks tensors of it.
        """
        before = self.task
        variant = self._variant(task)
        with self._switching:
            shell = self._shell(variant)
            view = self._view(task, variant, shell)
            if self.mode == "merged":
                self._put(task, variant, shell)
                active = Active(task, view)
            else:
                active = Active(task, view, self._paths(task, variant, shell, view))
            self._active[threading.current_thread()] = active
        return Activation(self, before)

    def deactivate(self) -> None:
        """Make this thread's model the reference again, to the bit."""
        with self._switching:
            if self._active.pop(threading.current_thread(), None) is not None:
                self._put_back()

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        """What the model of this thread's task computes; arguments and result are the module's.

        Raises:
            WorkError: if another thread has a task active in `merged` mode.
        """
        with self._call() as model:
            return model(*args, **inputs)

    def generate(self, *args: Any, **inputs: Any) -> Any:
        """What the model of this thread's task generates; as `generate` of transformers.

        Raises:
            WorkError: if another thread has a task active in `merged` mode.
            MethodError: if the model's class does not generate.
        """
        with self._call() as model:
            if not hasattr(model, "generate"):
                raise MethodError(f"{type(model).__name__} does not generate: call it instead.")
            return cast(Any, model).generate(*args, **inputs)

    def close(self) -> None:
        """Let the model be the reference, compute by itself again, and release the files."""
        with self._switching:
            self._active.clear()
            self._in_place = self._in_place and self._in_place._replace(
                thread=threading.current_thread()
            )
            self._put_back()
            for module in self._patched.values():
                module.__dict__.pop("forward", None)
            self._patched.clear()
            self._reference.close()

    @contextmanager
    def _call(self) -> Generator[nn.Module]:
        """The model, while this thread computes with it."""
        thread = threading.current_thread()
        with self._switching:
            model = self.model
            self._calling[thread] += 1
        try:
            yield model
        finally:
            with self._switching:
                self._calling[thread] -= 1

    def _variant(self, task: str) -> Variant:
        """What is known of a task; its file is opened when it is first asked for.

        Raises:
            PackError: if there is no such task, or its file is missing or damaged.
        """
        if task not in self.tasks:
            raise PackError(
                f"{self.pack.directory} has no task '{task}'. {nearest(task, self.tasks)}"
            )
        if task not in self._variants:
            rebuilt = Rebuilt(self.pack, task, self._reference)
            self._variants[task] = TaskVariant(self.pack, task, rebuilt)
        return self._variants[task]

    def _shell(self, variant: Variant) -> Shell:
        shell = self._shells.shell(variant.outline)
        if self.mode == "factored":
            for module in {unit.module for units in shell.units.values() for unit in units}:
                if id(module) not in self._patched:
                    self._patched[id(module)] = module
                    patch(module, self._current, id(module))
        return shell

    def _view(self, task: str, variant: Variant, shell: Shell) -> nn.Module:
        if task not in self._views:
            view = shell.view(variant.outline)
            if view is not shell.module and id(shell.module) in self._patched:
                patch(view, self._current, id(shell.module))
            self._views[task] = view
        return self._views[task]

    def _bare(self) -> nn.Module:
        return self._shells.bare()

    def _current(self) -> Paths | None:
        active = self._active.get(threading.current_thread())
        return None if active is None else active.paths

    def _in_use(self) -> set[str]:
        """The tasks that other threads have active."""
        here = threading.current_thread()
        return {
            active.task
            for thread, active in [*self._active.items()]
            if thread is not here and thread.is_alive()
        }

    def _paths(self, task: str, variant: Variant, shell: Shell, view: nn.Module) -> Paths:
        return self._cache.get(
            task, lambda: paths_of(variant, shell, view), paths_bytes(variant, shell)
        )

    def _put(self, task: str, variant: Variant, shell: Shell) -> None:
        """Put rebuilt weights in place, once all are rebuilt."""
        self._refuse_others(f"activate '{task}'")
        if self.task == task:
            return
        places = changed(variant, shell)
        values = {
            name: variant.value(name).to(at[0].device, at[0].dtype) for name, at in places.items()
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
