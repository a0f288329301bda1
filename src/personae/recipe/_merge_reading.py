"""From a file to a merge recipe: all faults at once, each with its line."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from personae.errors import MethodError
from personae.methods import Conventions, MergeMethod
from personae.recipe._documents import in_order, names_of
from personae.recipe._faults import Fault, Place
from personae.recipe._merge_family import (
    NEEDS_NO_REFERENCE,
    Family,
    family_of,
    tokenizer_of,
    tokens_of,
    without_idle_base,
)
from personae.recipe._merge_file import KEYS, MergeFile, read_file
from personae.recipe._places import Places
from personae.recipe._slices import SLICE_KEYS, Part, is_sliced, parts_of, without_slices
from personae.recipe._yaml import Document, read_document, read_documents
from personae.recipe.merge_recipe import MergePart, MergeRecipe, MergeSettings, find_method
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
    document, *others = read_documents(Path(path))
    if "merge_method" in document.content and "pack_method" in document.content:
        fault = Fault(("pack_method",), "A recipe merges or packs: keep one of both methods.")
        raise document.refusal([fault])
    return "merge" if others or "merge_method" in document.content else "pack"


def read_merge_recipe(path: str | Path) -> MergeRecipe:
    """Read and validate a merge recipe; opens no checkpoint.

    A recipe without a key of personae's own is mergekit's (see `mergekit`); a note says so.

    Raises:
        RecipeError: listing every fault of the file, each with its line.
    """
    document = read_document(Path(path))
    faults: list[Fault] = []
    recipe = _read_document(document, faults, frozenset())
    if faults or recipe is None:
        raise document.refusal(faults)
    return recipe


def read_merge_recipes(path: str | Path) -> list[MergeRecipe]:
    """Read the merge recipes of a file, one a document; a recipe may name others as its models.

    Returns:
        The recipes in the order in which they can be merged: the last is that of the output.

    Raises:
        RecipeError: listing every fault of every document, each with its line.
    """
    documents = read_documents(Path(path))
    if len(documents) == 1:
        return [read_merge_recipe(path)]
    found: list[list[Fault]] = [[] for _ in documents]
    names = names_of(documents, found)
    called = {name for name in names if name is not None}
    read: list[MergeRecipe | None] = []
    for document, name, faults in zip(documents, names, found, strict=True):
        content = {key: value for key, value in document.content.items() if key != "name"}
        recipe = _read_document(replace(document, content=content), faults, called)
        read.append(recipe and recipe.model_copy(update={"name": name}))
    if any(found):
        raise documents[0].refusal(found[0], [*zip(documents, found, strict=True)][1:])
    recipes = [recipe for recipe in read if recipe is not None]
    order = in_order(recipes, found)
    if any(found):
        raise documents[0].refusal(found[0], [*zip(documents, found, strict=True)][1:])
    return order


def _read_document(
    document: Document, faults: list[Fault], names: Collection[str]
) -> MergeRecipe | None:
    """What a document says; None if it is wrong.

    Args:
        document: The document.
        faults: Gets what is wrong.
        names: Names of models that are merged before; they are no paths.
    """
    if "pack_method" in document.content and "merge_method" not in document.content:
        text = "This is a pack recipe. Run personae pack with it, or write merge_method."
        faults.append(Fault(("pack_method",), text))
        return None
    meant = understood(document.content, {**KEYS, **SLICE_KEYS}, document.line)
    places = Places(document.path, names)
    faults += document.faults
    remarks = list(meant.remarks)
    if meant.content.get("output") == "adapter":
        faults += _adapter_faults(meant.content, names)
    parts = parts_of(meant.content, faults, remarks)
    if not parts:  # look at all else that is said
        _, others = read_file({**without_slices(meant.content), "models": []})
        faults += others
    conventions = meant.choice.conventions
    absent: list[Fault] = []
    read = [_read_part(part, conventions, places, faults, absent, remarks) for part in parts]
    small_files = _small_files(meant.content, read[0], places, faults, absent) if read else None
    if faults:
        faults += meant.slips + [fault for fault in absent if fault not in faults]
        return None
    return MergeRecipe(
        parts=tuple(part for part in read if part is not None),
        text=document.text,
        remarks=tuple(dict.fromkeys(remarks)),
        small_files=small_files,
    )


def _adapter_faults(content: Mapping[str, Any], names: Collection[str]) -> Iterator[Fault]:
    """What a recipe that gives an adapter cannot have."""
    if is_sliced(content):
        text = "An adapter is merged whole: write 'models' in place of slices, or leave output out."
        yield Fault(("output",), text)
    if names:
        text = "An adapter is for a model that is there: give it a file of its own."
        yield Fault(("output",), text)


def _read_part(
    part: Part,
    conventions: Conventions,
    places: Places,
    faults: list[Fault],
    absent: list[Fault],
    remarks: list[str],
) -> MergePart | None:
    """What a part of a recipe says; None if it is wrong. Models that are not there are `absent`."""
    file, wrong = read_file(part.content)
    if file is None:
        faults += map(part.in_file, wrong)
        return None
    if part.layers:
        file = without_idle_base(file, conventions)
    family = family_of(file, conventions, wrong)
    base, experts = family.base, dict[str, str]()
    not_there: list[Fault] = []
    for place, name, said in _models(family):
        found = places.of(said, place, wrong, not_there)
        if name is None:
            base = found
        else:
            experts[name] = found
    absent += map(part.in_file, not_there)
    reading = _read(file, family, conventions)
    if reading.faults and not file.models and wrong:  # said already: the models are wrong
        reading.faults = [f for f in reading.faults if f.place != ("models",)]
    layers = part.layers_of(family, wrong)
    told = [part.in_file(fault) for fault in wrong + reading.faults]
    faults += told
    remarks += [*family.remarks, *reading.remarks]
    if told or reading.settings is None:
        return None
    settings = reading.settings.model_copy(update={"layers": layers})
    return MergePart(base=base, experts=experts, settings=settings)


def _small_files(
    content: Mapping[str, Any],
    first: MergePart | None,
    places: Places,
    faults: list[Fault],
    absent: list[Fault],
) -> str | None:
    """The base of a recipe with slices, where it is not the base of the first one."""
    base = content.get("base_model")
    if not is_sliced(content) or not isinstance(base, str) or first is None:
        return None
    found = places.of(base, ("base_model",), faults, absent)
    return None if found == first.base else found


def _models(family: Family) -> Iterator[tuple[Place, str | None, str]]:
    """Where a family names a model, its name if it is an expert, and what it says."""
    if family.base:
        yield ("base_model",), None, family.base
    for (name, model), (n, _) in zip(family.experts.items(), family.entries, strict=True):
        yield ("models", n, "model"), name, model


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
        output=file.output,
        rank=file.rank,
        energy=file.energy,
        budget=file.budget,
        max_rank=file.max_rank,
        rank_pattern=file.rank_pattern,
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
    if family.base is not None or file.output == "adapter":
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
    if family.base is not None or settings.vector == "difference" or settings.output == "adapter":
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
