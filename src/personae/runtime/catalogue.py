"""What a runtime knows of each task: its outline and values, its module, what it changes there."""

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any

from torch import nn

from personae.checkpoints import Checkpoint
from personae.checkpoints.naming import shown
from personae.errors import MethodError, PackError, WorkError, nearest
from personae.packs.reader import Pack
from personae.packs.weighting import Weighting, given
from personae.run.composed import Composed
from personae.run.rebuilt import Rebuilt
from personae.runtime.active import Threads
from personae.runtime.cache import Cache
from personae.runtime.mixed import NotByRow
from personae.runtime.paths import Paths, changed, patch, paths_of
from personae.runtime.routing import AUTO, mixture_name
from personae.runtime.shells import Shell, Shells
from personae.runtime.variants import ComposedVariant, TaskVariant, Variant
from personae.runtime.watch import Watch


class Catalogue:
    """The tasks of a pack, those composed of them, and sums that a router asks for.

    All is found when it is first asked for, by any number of threads.
    """

    def __init__(
        self,
        pack: Pack,
        reference: Checkpoint,
        shells: Shells,
        threads: Threads,
        *,
        factored: bool,
        cache: int,
    ) -> None:
        """Take what is there; opens no task.

        Args:
            pack: The pack.
            reference: Its reference, each tensor once.
            shells: The modules around it.
            threads: What is in force in each.
            factored: Whether modules add what tasks change when they are called.
            cache: Most bytes of decoded tensors held.
        """
        self._pack, self._reference, self._shells = pack, reference, shells
        self._threads, self._factored = threads, factored
        self._variants: dict[str, Variant] = {}
        self._mixtures: dict[str, Variant] = {}
        self._holds = Counter[str]()
        self._placed: dict[str, Shell] = {}
        self._views: dict[str, nn.Module] = {}
        self._patched: dict[int, Callable[[], None]] = {}
        self._paths: dict[str, Paths] = {}
        self._cache: Cache[Any] = Cache(cache, threads.tasks)
        self._lock = threading.RLock()
        self._closed = False

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all tasks; not of a router's sums."""
        return tuple(dict.fromkeys([*self._pack.manifest.tasks, *self._variants]))

    @property
    def cached_bytes(self) -> int:
        """Bytes of the decoded tensors that are held."""
        return self._cache.nbytes

    def bare(self) -> nn.Module:
        """The reference's module.

        Raises:
            CheckpointError: if its class is not known.
        """
        with self._lock:
            return self._shells.bare()

    def variant(self, task: str) -> Variant:
        """What is known of a task, composed ones too.

        Raises:
            PackError: if there is no such task, or its file is missing or damaged.
            WorkError: after `close`, when modules no longer add what a task changes.
        """
        if self._closed:
            raise WorkError(f"Cannot activate '{task}': the pack was closed. Load it again.")
        known = self._mixtures.get(task, self._variants.get(task))
        return self._task(task) if known is None else known

    def files_of(self, task: str) -> dict[str, Path | bytes]:
        """The small files of a task's checkpoint, such as its tokenizer, and the reference's.

        Raises:
            PackError: if there is no such task, or one of its files is missing or changed.
        """
        reference = self._shells.of_reference.auxiliary_files()
        return {**reference, **self.variant(task).outline.auxiliary_files()}

    def shell(self, task: str) -> Shell:
        """The module of a task's class, with the reference's tensors."""
        with self._lock:
            if task not in self._placed:
                shell = self._shells.shell(self.variant(task).outline)
                if self._factored:
                    for unit in itertools.chain.from_iterable(shell.units.values()):
                        if id(unit.module) not in self._patched:
                            key = id(unit.module)
                            self._patched[key] = patch(unit.module, self._current, key)
                self._placed[task] = shell
            return self._placed[task]

    def view(self, task: str) -> nn.Module:
        """The module of a task, with its configuration."""
        with self._lock:
            if task not in self._views:
                shell = self.shell(task)
                view = shell.view(self.variant(task).outline)
                if view is not shell.module and id(shell.module) in self._patched:
                    patch(view, self._current, id(shell.module))
                if self._factored and all(view is not v for v in self._views.values()):
                    self._watch(view, shell)
                self._views[task] = view
            return self._views[task]

    def paths(self, task: str) -> Paths:
        """What a task changes, decoded as modules are called."""
        variant, shell, view = self.variant(task), self.shell(task), self.view(task)
        with self._lock:
            if task not in self._paths:
                held = partial(self._cache.get, task)
                self._paths[task] = paths_of(variant, shell, view, held)
            return self._paths[task]

    def check_readable(self, task: str) -> None:
        """Check that what a task changes is read by the modules that have it alone.

        Raises:
            MethodError: naming the tensors of which that is known not to hold.
        """
        shell = self.shell(task)
        strays = shell.strays or set()
        found = [
            name
            for name, places in changed(self.variant(task), shell).items()
            if any(id(place) in strays for place in places)
        ]
        if found:
            raise MethodError(
                f"{type(shell.module).__name__} reads {shown(found)} without calling the layers "
                f"that have them, so that task '{task}' cannot be added there. Load the pack with "
                'mode="merged".'
            )

    def compose(
        self, name: str, weights: Mapping[str, float] | Weighting, head: str | None
    ) -> None:
        """Know a weighted sum of tasks by this name.

        Raises:
            PackError: if the pack has no such task, or has one of this name.
            RecipeError: if a weight is not finite, or all are 0.
        """
        if name in self.names:
            raise PackError(f"There is a task '{name}' already. Give another name.")
        if name.startswith(AUTO):
            raise PackError(f"Names that begin with '{AUTO}' are the router's. Give another name.")
        if head is not None and head not in self._pack.manifest.tasks:
            known = nearest(head, self._pack.manifest.tasks)
            raise PackError(f"{self._pack.directory} has no task '{head}'. {known}")
        self._variants[name] = self._composed(weights, head)

    @contextmanager
    def mixtures(self, rows: Sequence[Mapping[str, float]]) -> Generator[list[str]]:
        """Name sums of tasks, which are known until the block ends.

        Args:
            rows: Of each row its tasks with their weights; it has the head of the heaviest.
        """
        names = [mixture_name(weights) for weights in rows]
        held = {name: row for name, row in zip(names, rows, strict=True) if len(row) > 1}
        with self._lock:
            self._holds.update([*held])
        try:
            with self._lock:
                for name in held.keys() - self._mixtures.keys():
                    head = max(held[name], key=held[name].__getitem__)
                    self._placed[name], self._views[name] = self.shell(head), self.view(head)
                    self._mixtures[name] = self._composed(held[name], head)
            yield names
        finally:
            with self._lock:
                self._holds.subtract([*held])
                for name in [name for name in held if not self._holds[name]]:
                    for known in (
                        self._holds,
                        self._mixtures,
                        self._placed,
                        self._views,
                        self._paths,
                    ):
                        known.pop(name, None)
                    self._cache.drop(name)

    def close(self) -> None:
        """Let modules compute by themselves again, and release the files."""
        self._closed = True
        for undo in self._patched.values():
            undo()
        self._patched.clear()
        self._reference.close()

    def _composed(
        self, weights: Mapping[str, float] | Weighting, head: str | None
    ) -> ComposedVariant:
        """A weighted sum of tasks, with the head of one of them."""
        weighting = given(weights, self._pack.manifest, self._pack.directory)
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
        if task not in self._pack.manifest.tasks:
            raise PackError(
                f"{self._pack.directory} has no task '{task}'. {nearest(task, self.names)}"
            )
        with self._lock:
            known = self._variants.get(task)
            if not isinstance(known, TaskVariant):
                known = TaskVariant(self._pack, task, Rebuilt(self._pack, task, self._reference))
                self._variants[task] = known
            return known

    def _current(self) -> Mapping[int, Callable[..., Any]] | None:
        return self._threads.paths

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
            active = self._threads.here
            for task in active.tasks if active is not None else ():
                self.check_readable(task)
            if active is not None and active.task is None and shell.apart:
                raise NotByRow
            return result

        view.forward = forward
        if view is shell.module:
            self._patched.setdefault(id(view), lambda: view.__dict__.pop("forward", None))
