"""From a file to a pack recipe: all faults at once, each with its line."""

from pathlib import Path

from pydantic import BaseModel, Field, ValidationError

from personae.checkpoints.naming import name_of
from personae.errors import MethodError, RecipeError
from personae.recipe._base import Given, Patterns, Strict, Vector
from personae.recipe._faults import Fault, faults_in, file_name_faults, validated
from personae.recipe._places import Places
from personae.recipe._yaml import read_document
from personae.recipe.pack_recipe import Budget, Counting, PackRecipe, PackSettings


class _Model(Strict):
    model: str = Field(min_length=1)
    name: str | None = None
    describe: str | list[str] = Field(default=[])


class _Reference(Strict):
    merge_method: str | None = None
    parameters: Given = Field(default={})


class _File(Strict):
    pack_method: str = "dts"
    base_model: str | None = None
    models: list[_Model]
    parameters: Given = Field(default={})
    budget: Budget = None
    counting: Counting = "on_disk_native"
    vector: Vector = "task"
    reference: _Reference = Field(default=_Reference())
    skip: Patterns = Field(default=[])
    private: Patterns = Field(default=[])


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
    names = [_name(entry) for entry in file.models]
    faults += file_name_faults((("models", n), name) for n, name in enumerate(names))
    places, absent = Places(document.path), list[Fault]()
    base = file.base_model and places.of(file.base_model, ("base_model",), faults, absent)
    models = [
        places.of(entry.model, ("models", n, "model"), faults, absent)
        for n, entry in enumerate(file.models)
    ]
    settings = _settings(file, faults)
    if faults or settings is None:
        raise document.refusal(faults + absent)
    return PackRecipe(
        base=base,
        experts=dict(zip(names, models, strict=True)),
        settings=settings,
        characteristics={
            name: (said,) if isinstance(said := entry.describe, str) else tuple(said)
            for name, entry in zip(names, file.models, strict=True)
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
    except RecipeError as error:
        assert isinstance(error.__cause__, ValidationError)
        faults += faults_in(error.__cause__, PackSettings, {})  # which say where
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
