"""The tasks that are served: loaded and unloaded by name, while requests run."""

import gc
import math
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from personae.checkpoints.configuration import CONFIG
from personae.errors import CheckpointError, Faults, PackError, PersonaeError, nearest
from personae.runtime.cache import CACHE
from personae.runtime.loaded import Runtime
from personae.runtime.loading import load
from personae.serve.preprocessing import ImageProcessor, Tokenizer
from personae.serve.refusals import Refusal

GENERATES, CLASSIFIES, PREDICTS, EMBEDS = "generation", "classification", "regression", "embedding"


@dataclass(frozen=True, eq=False)
class ServedTask:
    """A task that requests may name.

    Attributes:
        name: What they call it.
        pack: What its pack is called.
        task: What its pack calls it.
        runtime: What computes it.
        kind: What it answers: generation, classification, regression or embedding.
        model: Its module.
        tokenizer: Of models of texts.
        images: Of models of images.
        tokens: Most of one row, its answer included.
    """

    name: str
    pack: str
    task: str
    runtime: Runtime
    kind: str
    model: Any
    tokenizer: Tokenizer | None
    images: ImageProcessor | None
    tokens: int

    @property
    def key(self) -> tuple[Hashable, ...]:
        """Equal for tasks whose rows can be computed at once."""
        return (id(self.runtime), self.kind, self.runtime.together(self.task))

    def check_kind(self, wanted: Sequence[str], instead: str) -> None:
        """Check that the task answers what is asked for.

        Raises:
            Refusal: naming what it is, and where that is answered.
        """
        if self.kind not in wanted:
            raise Refusal(
                f"Task '{self.name}' is {type(self.model).__name__}, for {self.kind}. "
                f"Use {instead}.",
                param="model",
                code="wrong_kind",
            )

    def to_json(self) -> dict[str, Any]:
        """As /v1/tasks lists it."""
        told: dict[str, Any] = {"id": self.name, "pack": self.pack, "kind": self.kind}
        told["model_class"] = type(self.model).__name__
        if self.kind == CLASSIFIES:
            told["labels"] = [*self.model.config.id2label.values()]
        if self.tokenizer is not None:
            told["max_tokens"] = self.tokens
        return told


@dataclass(frozen=True)
class Loading:
    """How packs are loaded; see `personae.load`."""

    mode: str = "factored"
    base: str | None = None
    device: str | None = None
    dtype: torch.dtype | None = None
    cache: str | int = CACHE


class Tasks:
    """The tasks that are served, by name."""

    def __init__(
        self,
        loading: Loading,
        *,
        folder: Path | None = None,
        tokens: int = 8192,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Serve none yet.

        Args:
            loading: How packs are loaded.
            folder: Where packs are that requests may load; None lets them change nothing.
            tokens: Most of one row.
            note: Told of tasks that are not served.
        """
        self._loading, self._folder, self._tokens, self._note = loading, folder, tokens, note
        self._tasks: dict[str, ServedTask] = {}
        self._changing = threading.Lock()

    def __getitem__(self, name: str) -> ServedTask:
        """A task by its name.

        Raises:
            Refusal: if there is none, with the names that there are.
        """
        tasks = self._tasks
        if name not in tasks:
            raise Refusal(
                f"There is no task '{name}'. {nearest(name, tasks)}",
                404,
                "model_not_found",
                "model",
            )
        return tasks[name]

    def __iter__(self) -> Iterator[ServedTask]:
        """All of them."""
        return iter([*self._tasks.values()])

    @property
    def cached_bytes(self) -> int:
        """Bytes of decoded tensors that are held."""
        return sum({id(t.runtime): t.runtime.cached_bytes for t in self}.values())

    def load(self, path: Path, name: str | None = None, only: Sequence[str] | None = None) -> None:
        """Serve the tasks of a pack, or some of them.

        Args:
            path: The pack.
            name: What it is called, and put before the names of its tasks; without one it is called
                as its folder, and tasks by their own names.
            only: Its own names of those to serve; by default all.

        Raises:
            PackError: if a name is taken, or there is no such task.
            PersonaeError: if the pack or a task cannot be used.
        """
        with self._changing:
            called = name or path.resolve().name
            loaded = next((t.runtime for t in self if t.pack == called), None)
            same = loaded is not None and loaded.pack.directory.resolve() == path.resolve()
            if loaded is not None and not same:
                raise PackError(
                    f"A pack called '{called}' is served already. Give this one another name."
                )
            runtime = loaded or load(path, **vars(self._loading))
            own = [*runtime.pack.manifest.tasks]
            faults = Faults()
            for task in only or ():
                if task not in own:
                    faults.add(f"{path} has no task '{task}'. {nearest(task, own)}")
            wanted = {f"{name}/{t}" if name else t: t for t in own if only is None or t in only}
            if same and only is None:
                wanted = {n: t for n, t in wanted.items() if n not in self._tasks}
            for taken in sorted(wanted.keys() & self._tasks.keys()):
                faults.add(
                    f"A task '{taken}' is served already, of pack '{self._tasks[taken].pack}'. "
                    "Unload it, or give the pack a name of its own, which is put before its tasks'."
                )
            faults.raise_if_any(PackError)
            found = self._served(runtime, called, wanted)
            self._tasks = {**self._tasks, **found}

    def load_from_folder(self, pack: str, name: str | None, only: Sequence[str] | None) -> None:
        """Serve a pack for a request.

        Raises:
            Refusal: if requests may not, or it cannot be used.
        """
        folder = self._changeable()
        try:
            path = (folder / pack).resolve()
        except (OSError, ValueError) as error:  # too long, or a NUL in it
            raise Refusal("The name of the pack is no file name.", param="pack") from error
        if path == folder or not path.is_relative_to(folder):
            raise Refusal(
                f"'{pack}' is not in the folder of packs. Give the name of one inside.",
                403,
                param="pack",
            )
        try:
            self.load(path, name, only)
        except (PersonaeError, OSError) as error:
            raise Refusal(str(error), param="pack") from error

    def unload(self, name: str) -> None:
        """Serve a task no longer; with its last task a pack leaves the memory.

        Rows of it that wait already are answered.

        Raises:
            Refusal: if there is no such task, or requests may not unload.
        """
        self._changeable()
        with self._changing:
            found = self[name]
            self._tasks = {n: task for n, task in self._tasks.items() if task is not found}
        del found
        gc.collect()  # modules and what is put around them refer to each other

    def _changeable(self) -> Path:
        """The folder of packs.

        Raises:
            Refusal: if requests may change nothing.
        """
        if self._folder is None:
            raise Refusal(
                "This server loads and unloads nothing on request. Start it with --packs FOLDER.",
                403,
            )
        return self._folder.resolve()

    def _served(
        self, runtime: Runtime, pack: str, wanted: Mapping[str, str]
    ) -> dict[str, ServedTask]:
        """Tasks as they are served, by the names that requests use.

        Raises:
            CheckpointError: with what is wrong with all of them; or if none can be served.
        """
        faults, found = Faults(), dict[str, ServedTask]()
        tokenizers: dict[Hashable, Tokenizer] = {}
        for name, task in wanted.items():
            try:
                model: Any = runtime.model_of(task)
                kind = kind_of(model)
                if kind is None:
                    self._note(
                        f"'{name}' is not served: {type(model).__name__} is of no kind that "
                        "the server knows."
                    )
                    continue
                files = runtime.files_of(task)
                tokenizer, images, tokens = None, None, 0
                if model.main_input_name == "pixel_values":
                    images = ImageProcessor(files, model.config)
                else:
                    key = _of_tokenizer(files)
                    if key not in tokenizers:
                        whose = f"Task '{task}' of {runtime.pack.directory}"
                        tokenizers[key] = Tokenizer(files, whose)
                    tokenizer = tokenizers[key]
                    tokens = int(min(tokenizer.longest, positions(model), self._tokens))
                found[name] = ServedTask(
                    name, pack, task, runtime, kind, model, tokenizer, images, tokens
                )
            except PersonaeError as error:
                faults.take(error)
        faults.raise_if_any(CheckpointError)
        if wanted and not found:
            raise CheckpointError(
                f"{runtime.pack.directory} has no task that can be served: causal models, "
                "classifiers of texts or images, and models without a head can."
            )
        return found


def kind_of(model: Any) -> str | None:
    """What a model answers; None for what the server does not know."""
    name = type(model).__name__
    if model.can_generate():
        return GENERATES
    if name.endswith(("ForSequenceClassification", "ForImageClassification")):
        config = model.config
        return (
            PREDICTS
            if config.problem_type == "regression" or config.num_labels == 1
            else CLASSIFIES
        )
    return EMBEDS if "For" not in name else None


def positions(model: nn.Module) -> int | float:
    """Most tokens that a model has positions for."""
    config: Any = model.config
    most = getattr(config, "max_position_embeddings", None) or math.inf
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            offset = module.padding_idx  # RoBERTa and its like count from the padding token on
            most = min(most, module.num_embeddings - (0 if offset is None else offset + 1))
    return most


def _of_tokenizer(files: Mapping[str, Path | bytes]) -> Hashable:
    """Equal for files that make the same tokenizer."""
    return tuple(sorted((n, str(at)) for n, at in files.items() if n != CONFIG))
