"""Suites: a family, its tasks and the methods to compare, from YAML to one table.

All that can be known before work starts is refused at once, each fault with its line: unknown
methods, missing columns, labels outside a head's range, splits without examples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from personae.checkpoints.naming import name_of
from personae.errors import Faults, MethodError, PersonaeError, nearest
from personae.evaluate.data import DataSettings
from personae.evaluate.declared import TaskSettings, read_task
from personae.evaluate.fetching import fetched
from personae.evaluate.learning import LearnData, LearnSettings
from personae.evaluate.rows import PRESETS, Row
from personae.evaluate.search import (
    Search,
    SearchSettings,
    Tune,
    TuneSettings,
    no_validation,
    read_search,
    read_tune,
)
from personae.evaluate.tasks import Task
from personae.recipe import MergeSettings, PackSettings
from personae.recipe._base import Patterns, Strict
from personae.recipe._faults import Fault, Place, file_name_faults, validated
from personae.recipe._places import placed
from personae.recipe._yaml import Document, read_document


class _Model(Strict):
    model: str = Field(min_length=1)
    name: str | None = None


def _word(value: Any) -> Any:
    """A row that is one word, `individual` or `base`."""
    return {value: True} if value in ("individual", "base") else value


class _Method(Strict):
    name: str | None = None
    individual: Literal[True] | None = None
    base: Literal[True] | None = None
    merge: MergeSettings | None = None
    pack: PackSettings | None = None
    learn: LearnSettings | None = None
    tune: TuneSettings | None = None
    preset: str | None = None

    @model_validator(mode="after")
    def _is_one(self) -> "_Method":
        kinds = ("individual", "base", "merge", "pack", "learn", "tune", "preset")
        given = [kind for kind in kinds if getattr(self, kind) is not None]
        if len(given) != 1:
            told = " and ".join(given) or "nothing"
            raise ValueError(
                f"a method is one of {', '.join(kinds[:-1])} and {kinds[-1]}, not {told}"
            )
        return self


class _File(Strict):
    base_model: str = Field(min_length=1)
    models: list[_Model] = Field(min_length=1)
    heads: Patterns = Field(default=[])
    tasks: list[TaskSettings] = Field(min_length=1)
    methods: list[Annotated[_Method, BeforeValidator(_word)]] = Field(min_length=1)
    search: SearchSettings | None = None


_NESTED: dict[str | tuple[str, ...], type[BaseModel]] = {
    "models": _Model,
    "tasks": TaskSettings,
    "methods": _Method,
    "search": SearchSettings,
    "data": DataSettings,
    "merge": MergeSettings,
    "pack": PackSettings,
    "learn": LearnSettings,
    "tune": TuneSettings,
    ("learn", "data"): LearnData,
}


@dataclass(frozen=True)
class Suite:
    """What a suite says, with its data read.

    Attributes:
        base: The base's checkpoint directory.
        experts: Model name to checkpoint directory, in order.
        tasks: What is scored on, each of the expert of its name.
        rows: Row name to what it is.
        heads: Patterns of tensors that are each expert's own, beside those of which the shapes
            tell it.
        search: What `tune_suite` searches; None if nothing.
        fixed: Checkpoint directory to the hub id or absolute path that the suite calls it by.
    """

    base: Path
    experts: Mapping[str, Path]
    tasks: Sequence[Task]
    rows: Mapping[str, Row | Tune]
    heads: tuple[str, ...] = ()
    search: Search | None = None
    fixed: Mapping[Path, str] = field(default_factory=dict)


def read_suite(path: str | Path) -> Suite:
    """Read a suite and the data of its tasks.

    Raises:
        RecipeError: listing every fault of the file, each with its line.
    """
    document = read_document(Path(path), "suite")
    faults = list(document.faults)
    content = {**document.content}
    content["tasks"] = _with_defaults(content, faults)
    file = validated(content, _File, _NESTED, faults)
    if file is None:
        raise document.refusal(faults)
    names = [entry.name or name_of(entry.model) for entry in file.models]
    faults += file_name_faults((("models", n), name) for n, name in enumerate(names))
    rows = _rows(file, names, faults)
    search = read_search(file.search, names, faults) if file.search else None
    places = _Places(document, faults)
    base = places.directory(file.base_model, ("base_model",))
    experts = {
        name: places.directory(entry.model, ("models", n, "model"))
        for n, (name, entry) in enumerate(zip(names, file.models, strict=True))
    }
    tasks = _tasks(file, experts, base, places)
    if faults:
        raise document.refusal(faults)
    known = {name: found for name, found in experts.items() if found is not None}
    assert base is not None
    return Suite(base, known, tasks, rows, tuple(file.heads), search, places.fixed)


def _with_defaults(content: dict[str, Any], faults: list[Fault]) -> Any:
    """Tasks with what all have in common, which `task_defaults` says; taken out of the content."""
    defaults, tasks = content.pop("task_defaults", None) or {}, content.get("tasks")
    if not isinstance(defaults, dict):
        faults.append(Fault(("task_defaults",), "task_defaults: expected keys with values."))
        return tasks
    if not isinstance(tasks, list):
        return tasks
    return [
        _over(_named(defaults, str(task.get("name"))), task) if isinstance(task, dict) else task
        for task in tasks
    ]


def _over(defaults: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A mapping over another, and so inside."""
    found = defaults | own
    for key, value in own.items():
        if isinstance(value, dict) and isinstance(defaults.get(key), dict):
            found[key] = _over(defaults[key], value)
    return found


def _named(value: Any, name: str) -> Any:
    """A default with the task's name in the place of {name}."""
    if isinstance(value, str):
        return value.replace("{name}", name)
    if isinstance(value, dict):
        return {key: _named(inner, name) for key, inner in value.items()}
    return value


@dataclass(frozen=True)
class _Places:
    """Where the models of a suite are."""

    document: Document
    faults: list[Fault]
    fixed: dict[Path, str] = field(default_factory=dict)

    def directory(self, model: str, place: Place) -> Path | None:
        """A checkpoint's directory, from the hub if it is there; None if there is none."""
        where = placed(model, place, self.document.path, self.faults)
        try:
            found = fetched(where)
        except PersonaeError as error:
            self.faults.append(Fault(place, str(error)))
            return None
        if where == model and found.is_absolute():
            self.fixed[found] = model
        return found


def _rows(file: _File, experts: Sequence[str], faults: list[Fault]) -> dict[str, Row | Tune]:
    """The methods with their names, presets in the place of theirs."""
    rows: dict[str, Row | Tune] = {}
    for n, method in enumerate(file.methods):
        place: Place = ("methods", n)
        if method.preset is not None:
            if method.preset not in PRESETS:
                text = f"Unknown preset '{method.preset}'. {nearest(method.preset, PRESETS)}"
                faults.append(Fault((*place, "preset"), text))
                continue
            # The first rows of every preset are those of the others, too.
            rows |= {k: v for k, v in PRESETS[method.preset]().items() if k not in rows}
            continue
        row = _row(method, place, experts, file.tasks, faults)
        name = method.name or _called(row)
        if name in rows:
            text = f"Two methods are named '{name}'. Give each its own 'name'."
            faults.append(Fault(place, text))
        rows[name] = row
    return rows


def _row(
    method: _Method,
    place: Place,
    experts: Sequence[str],
    tasks: Sequence[TaskSettings],
    faults: list[Fault],
) -> Row | Tune:
    """What a method is; what is wrong with its settings is noted."""
    if method.merge is not None:
        for fault in method.merge.faults(experts):
            faults.append(Fault((*place, "merge", *fault.place), fault.text))
        return method.merge
    if method.learn is not None:
        splits = {task.name: task.data.splits for task in tasks}
        for fault in method.learn.faults({name: splits.get(name, ()) for name in experts}):
            faults.append(Fault((*place, "learn", *fault.place), fault.text))
        return method.learn
    if method.tune is not None:
        lacking = [task.name for task in tasks if "validation" not in task.data.splits]
        if lacking:
            faults.append(Fault((*place, "tune"), no_validation(lacking)))
        return read_tune(method.tune, experts, faults, (*place, "tune"))
    if method.pack is not None:
        for check in (method.pack.codec, lambda: method.pack and method.pack.merge(len(experts))):
            try:
                check()
            except MethodError as error:
                faults.append(Fault((*place, "pack"), str(error)))
        return method.pack
    return "individual" if method.individual else "base"


def _called(row: Row | Tune) -> str:
    """The name of a method that was given none."""
    if isinstance(row, str):
        return row
    if isinstance(row, Tune):
        return f"{_called(row.search.settings)} tuned"
    said = {**row.parameters}
    if isinstance(row, PackSettings) and row.budget:
        said["budget"] = row.budget
    words = [row.method] + [f"{key}={value}" for key, value in said.items()]
    if isinstance(row, LearnSettings):
        return " ".join(words)
    if row.vector == "difference":
        words.append("diff")
    return " ".join(words)


def _tasks(
    file: _File, experts: Mapping[str, Path | None], base: Path | None, places: _Places
) -> list[Task]:
    """The tasks with their data; what is wrong with them is noted."""
    found: list[Task] = []
    seen: set[str] = set()
    for n, settings in enumerate(file.tasks):
        place: Place = ("tasks", n)
        if settings.name in seen:
            places.faults.append(Fault(place, f"Two tasks are named '{settings.name}'."))
        seen.add(settings.name)
        if settings.name not in experts:
            text = (
                f"There is no model '{settings.name}' whose task this could be. "
                f"{nearest(settings.name, experts)} A task has the name of its expert."
            )
            places.faults.append(Fault((*place, "name"), text))
            continue
        text_model = base
        if settings.text_model is not None:
            text_model = places.directory(settings.text_model, (*place, "text_model"))
        expert = experts[settings.name]
        if expert is None or text_model is None:
            continue  # that is said already
        try:
            found.append(read_task(settings, expert, places.document.path.parent, text_model))
        except PersonaeError as error:
            told = Faults()
            told.take(error)
            for text in told.messages:
                places.faults.append(Fault(place, f"Task '{settings.name}': {text}"))
    return found
