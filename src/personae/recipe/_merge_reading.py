"""From a file to a merge recipe: all faults at once, each with its line."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from personae.errors import MethodError
from personae.methods import Conventions, MergeMethod
from personae.recipe._faults import Fault, Place
from personae.recipe._merge_family import (
    NEEDS_NO_REFERENCE,
    Family,
    family_of,
    tokenizer_of,
    tokens_of,
)
from personae.recipe._merge_file import KEYS, MergeFile, read_file
from personae.recipe._places import placed
from personae.recipe._yaml import read_document
from personae.recipe.merge_recipe import MergeRecipe, MergeSettings, find_method
from personae.recipe.mergekit import hint_for, understood


@dataclass
class _Reading:
    """Settings, with what there is to say of them."""

    settings: MergeSettings | None = None
    faults: list[Fault] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def recipe_kind(path: str | Path) -> Literal["merge", "pack"]:
    """Whether a recipe merges (it has `merge_method`) or packs.

    Raises:
        RecipeError: if the file cannot be read, or says both.
    """
    document = read_document(Path(path))
    if "merge_method" in document.content and "pack_method" in document.content:
        fault = Fault(("pack_method",), "A recipe merges or packs: keep one of both methods.")
        raise document.refusal([fault])
    return "merge" if "merge_method" in document.content else "pack"


def read_merge_recipe(path: str | Path) -> MergeRecipe:
    """Read and validate a merge recipe; opens no checkpoint.

    A recipe without a key of personae's own is mergekit's (see `mergekit`); a note says so.

    Raises:
        RecipeError: listing every fault of the file, each with its line.
    """
    document = read_document(Path(path))
    if "pack_method" in document.content and "merge_method" not in document.content:
        text = "This is a pack recipe. Run personae pack with it, or write merge_method."
        raise document.refusal([Fault(("pack_method",), text)])
    meant = understood(document.content, KEYS, document.line)
    conventions = meant.choice.conventions
    file, faults = read_file(meant.content)
    faults += document.faults
    if file is None:
        raise document.refusal(faults + meant.slips)
    family = family_of(file, conventions, faults)
    base, experts = _places(family, document.path, faults)
    reading = _read(file, family, conventions)
    if faults or reading.faults or reading.settings is None:
        if not file.models and faults:  # said already: the models are elsewhere, or wrong
            reading.faults = [f for f in reading.faults if f.place != ("models",)]
        raise document.refusal(faults + reading.faults + meant.slips)
    return MergeRecipe(
        base=base,
        experts=experts,
        settings=reading.settings,
        text=document.text,
        remarks=(*meant.remarks, *family.remarks, *reading.remarks),
    )


def _places(family: Family, recipe: Path, faults: list[Fault]) -> tuple[str | None, dict[str, str]]:
    """Base and experts of a family where they are opened; see `placed`."""
    base = family.base and placed(family.base, ("base_model",), recipe, faults)
    pairs = zip(family.experts.items(), family.entries, strict=True)
    return base, {
        name: placed(model, ("models", n, "model"), recipe, faults)
        for (name, model), (n, _) in pairs
    }


def _read(file: MergeFile, family: Family, conventions: Conventions) -> _Reading:
    """The settings a file means under these conventions."""
    reading = _Reading()
    try:
        method = find_method(file.merge_method, conventions)
    except MethodError:
        method = None  # the settings will say so, with what else is wrong
    places: dict[Place, Place] = {("method",): ("merge_method",), ("experts",): ("models",)}
    if file.tokenizer:
        places["tokenizer_source",] = ("tokenizer", "source")
        places["tokens",] = ("tokenizer", "tokens")
    given: dict[Place, tuple[Place, dict[str, Any]]] = {
        ("parameters",): (("parameters",), file.parameters)
    }
    for expert, (n, entry) in enumerate(family.entries):
        given["expert_parameters", expert] = ("models", n, "parameters"), entry.parameters
    common, *owns = (
        _named(said, method, place, file_place, places, reading)
        for place, (file_place, said) in given.items()
    )
    reading.settings = settings = MergeSettings(
        method=method.name if method else file.merge_method,
        conventions=conventions,
        parameters=common,
        expert_parameters=tuple(owns) if any(owns) else (),
        dtype=file.out_dtype or file.dtype,
        tokenizer_source=tokenizer_of(file, family, reading.faults),
        tokens=tokens_of(file, family),
        pad_to_multiple_of=file.tokenizer.pad_to_multiple_of if file.tokenizer else None,
        chat_template=file.chat_template,
        skip=tuple(file.skip),
        only=tuple(file.only),
        vector=_vector(file, family, method),
    )
    if method:
        reading.faults += _base_faults(family, settings, method)
    if file.dtype and file.out_dtype and file.dtype != file.out_dtype:
        reading.remarks.append(f"dtype: {file.dtype} is not used: sums are in float32 here.")
    for fault in settings.faults(list(family.experts)):
        place = _in_file(fault.place, places)
        hint = hint_for(file.merge_method, str(place[-1])) if conventions == "papers" else ""
        reading.faults.append(Fault(place, fault.text + hint))
    return reading


def _named(
    given: dict[str, Any],
    method: type[MergeMethod] | None,
    place: Place,
    file_place: Place,
    places: dict[Place, Place],
    reading: _Reading,
) -> dict[str, Any]:
    """Parameters by this package's names; notes where in the file each stands."""
    found: dict[str, Any] = {}
    known = method.fields() if method else {}
    for name, value in given.items():
        own = "scale" if name == "lambda" and "scale" in known else name  # the papers' letter
        if own in found:
            text = f"{own} is given twice, as '{name}' too. Keep one."
            reading.faults.append(Fault((*file_place, name), text))
        places[*place, own] = (*file_place, name)
        found[own] = value
    return found


def _vector(
    file: MergeFile, family: Family, method: type[MergeMethod] | None
) -> Literal["task", "difference"]:
    if family.base is not None:
        return file.vector or "task"
    if file.base_model is not None:  # averaged as the experts are
        return "difference"
    no_reference = method is None or method.of_models() or method.name in NEEDS_NO_REFERENCE
    return file.vector or ("difference" if no_reference else "task")


def _base_faults(
    family: Family, settings: MergeSettings, method: type[MergeMethod]
) -> Sequence[Fault]:
    if family.base is not None and settings.vector == "difference":
        text = "Differences are from the experts' average: leave base_model out, or vector."
        return (Fault(("vector",), text),)
    if family.base is not None or settings.vector == "difference":
        return ()
    text = f"{method.name} needs 'base_model', what the models were fine-tuned from."
    if method.needs == "deltas":
        text += " Without one, 'vector: difference' merges their differences from the average."
    return (Fault(("merge_method",), text),)


def _in_file(place: Place, places: dict[Place, Place]) -> Place:
    """Where in the file a place in the settings is."""
    for length in range(len(place), 0, -1):
        if place[:length] in places:
            return places[place[:length]]
    return place
