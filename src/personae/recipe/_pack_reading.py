"""From a file to a pack recipe: all faults at once, each with its line."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from personae.checkpoints.naming import name_of
from personae.errors import MethodError
from personae.recipe._base import Strict, Vector
from personae.recipe._faults import Fault, faults_in, validated
from personae.recipe._yaml import read_document
from personae.recipe.pack_recipe import Budget, Counting, PackRecipe, PackSettings


class _Model(Strict):
    model: str = Field(min_length=1)
    name: str | None = None
    describe: str | list[str] = Field(default=[])


class _Reference(Strict):
    merge_method: str | None = None
    parameters: dict[str, Any] = Field(default={})


class _File(Strict):
    pack_method: str = "dts"
    base_model: str | None = None
    models: list[_Model]
    parameters: dict[str, Any] = Field(default={})
    budget: Budget = None
    counting: Counting = "on_disk_native"
    vector: Vector = "task"
    reference: _Reference = Field(default=_Reference())
    skip: list[str] = Field(default=[])
    private: list[str] = Field(default=[])


_NESTED: dict[str, type[BaseModel]] = {"models": _Model, "reference": _Reference}


def read_recipe(path: str | Path) -> PackRecipe:
    """Read and validate a pack recipe; opens no checkpoint.

    Raises:
        RecipeError: listing every fault of the file, each with its line.
    """
    document = read_document(Path(path))
    if "merge_method" in document.content and "pack_method" not in document.content:
        text = "This is a merge recipe. Run personae merge with it, or write pack_method."
        raise document.refusal([Fault(("merge_method",), text)])
    faults = list(document.faults)
    file = validated(document.content, _File, _NESTED, faults)
    if file is None:
        raise document.refusal(faults)
    faults += _named_twice(file.models)
    settings = _settings(file, faults)
    if faults or settings is None:
        raise document.refusal(faults)
    experts = {_name(entry): entry for entry in file.models}
    return PackRecipe(
        base=file.base_model,
        experts={name: entry.model for name, entry in experts.items()},
        settings=settings,
        characteristics={
            name: (said,) if isinstance(said := entry.describe, str) else tuple(said)
            for name, entry in experts.items()
            if entry.describe
        },
    )


def _settings(file: _File, faults: list[Fault]) -> PackSettings | None:
    """The settings a file means; what is wrong with them is added to `faults`."""
    try:
        settings = PackSettings(
            method=file.pack_method,
            parameters=file.parameters,
            budget=file.budget,
            counting=file.counting,
            vector=file.vector,
            reference=file.reference.merge_method,
            reference_parameters=file.reference.parameters,
            skip=tuple(file.skip),
            private=tuple(file.private),
        )
    except ValidationError as error:
        faults += faults_in(error, PackSettings, {})
        return None
    try:
        settings.codec()
    except MethodError as error:
        faults.append(Fault(("parameters",) if file.parameters else ("pack_method",), str(error)))
    try:
        settings.merge(len(file.models))
    except MethodError as error:
        faults.append(Fault(("reference",), str(error)))
    return settings


def _name(entry: _Model) -> str:
    return entry.name or name_of(entry.model)


def _named_twice(models: list[_Model]) -> Iterator[Fault]:
    names: set[str] = set()
    for n, entry in enumerate(models):
        if (name := _name(entry)) in names:
            text = f"Two models are named '{name}'. Give each its own 'name'."
            yield Fault(("models", n), text)
        names.add(name)
