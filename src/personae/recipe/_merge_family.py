"""Base and experts of a merge recipe: which model is what, and how it is called."""

from collections.abc import Iterator
from typing import NamedTuple

from personae.checkpoints.naming import labels
from personae.family.vocabularies import TokenRow
from personae.methods import ALIASES, Conventions
from personae.recipe._faults import Fault
from personae.recipe._merge_file import MergeFile, Model
from personae.recipe.merge_recipe import methods_under

NEEDS_NO_REFERENCE = ("average", "linear")
"""What they give does not depend on what the deltas are taken from."""

Entry = tuple[int, Model]
"""A model, and its position under `models`."""


class Family(NamedTuple):
    """Base and experts of a file.

    Attributes:
        base: Where the base is; None if there is none, or it is averaged as another expert.
        experts: Name to where it is; names are labels, of any form.
        entries: What is said of each expert.
        remarks: What becomes of the base, where that may surprise.
    """

    base: str | None
    experts: dict[str, str]
    entries: list[Entry]
    remarks: list[str]


def family_of(file: MergeFile, conventions: Conventions, faults: list[Fault]) -> Family:
    """Tell experts from the base, and give each a name.

    The base may be listed among the models. It is no expert then; but where models are averaged and
    it has a weight, it is the first of them, as all that is not averaged is then the base's.

    Args:
        file: What the recipe says.
        conventions: Whose algorithms it means; mergekit's averages take a base that is not listed.
        faults: Gets what is wrong.
    """
    remarks: list[str] = []
    models = [(n, entry) for n, entry in enumerate(file.models) if entry.model != file.base_model]
    alone = bool(models) or _averages_models(file, conventions)
    averaged = _averaged_base(file, conventions, remarks) if alone else []
    faults += _counted_base(file, conventions, remarks)
    entries = averaged + models
    given = {entry.name for _, entry in entries if entry.name}
    unnamed = [_place(file, entry) for _, entry in entries if not entry.name]
    called = iter(labels(unnamed, given))
    experts: dict[str, str] = {}
    said: list[Entry] = []
    for n, entry in entries:
        name = entry.name or next(called)
        if name in experts:
            text = f"Two models are named '{name}'. Give each its own 'name'."
            faults.append(Fault(("models", n, "name"), text))
            continue
        experts[name] = _place(file, entry)
        said.append((n, entry))
    return Family(None if averaged else file.base_model, experts, said, remarks)


def without_idle_base(file: MergeFile, conventions: Conventions) -> MergeFile:
    """The file without a base that no slice lists, where the method makes nothing of it."""
    idle = file.merge_method in NEEDS_NO_REFERENCE or _averages_models(file, conventions)
    return file.model_copy(update={"base_model": None}) if idle and not _listed_base(file) else file


def _place(file: MergeFile, entry: Model) -> str:
    """Where a model is; BASE+ADAPTER is mergekit's way to write an adapter of a model."""
    return entry.model.removeprefix(f"{file.base_model}+") if file.base_model else entry.model


def _listed_base(file: MergeFile) -> list[Entry]:
    return [(n, entry) for n, entry in enumerate(file.models) if entry.model == file.base_model]


def _averages_models(file: MergeFile, conventions: Conventions) -> bool:
    """Whether the method is a mean of models that knows no base, as `karcher` is."""
    method = methods_under(conventions).get(file.merge_method)
    return method is not None and method.needs == "experts"


def _averaged_base(file: MergeFile, conventions: Conventions, remarks: list[str]) -> list[Entry]:
    """The base as a model to average, first of all; empty if it is not.

    Means of models that know no base take it if it is listed, the average if it has a weight too.
    mergekit lists every base itself, as the last.
    """
    if file.base_model is None:
        return []
    listed = _listed_base(file)
    if not listed and conventions == "mergekit":
        listed = [(len(file.models), Model(model=file.base_model))]
    if _averages_models(file, conventions):
        if listed and len(file.models) > 1:
            remarks.append(
                "The base is averaged as the other models are, as it is under 'models'."
                if _listed_base(file)
                else "The base is averaged as the other models are, as mergekit does it."
            )
        return listed
    if file.merge_method not in NEEDS_NO_REFERENCE:
        return []
    weighted = "weight" in file.parameters
    averaged = [(n, entry) for n, entry in listed if weighted or entry.parameters]
    if averaged:
        remarks.append("The base has a weight: it is averaged as the other models are.")
    return averaged


def _counted_base(file: MergeFile, conventions: Conventions, remarks: list[str]) -> Iterator[Fault]:
    """What is wrong with parameters of the base where it is no expert."""
    if file.merge_method in NEEDS_NO_REFERENCE or _averages_models(file, conventions):
        return
    known = methods_under(conventions)
    method = known.get(ALIASES.get(file.merge_method, file.merge_method))
    for n, entry in _listed_base(file):
        if not entry.parameters or method is None:
            continue
        if not method.counts_experts or conventions == "mergekit":
            remarks.append("The base is left out of the models: its task vector is zero.")
        else:
            text = f"The base is no expert, and {file.merge_method} counts experts: leave it out."
            yield Fault(("models", n), text)


def tokenizer_of(file: MergeFile, family: Family, faults: list[Fault]) -> str | None:
    """Whose vocabulary comes out: 'base', 'union', or a name where the file says a model."""
    names = _called(file, family)
    given = (file.tokenizer_source, file.tokenizer.source if file.tokenizer else None)
    plain = [source.removeprefix("model:") for source in given if source]
    found = [names.get(source, source) for source in plain]
    if len({*found}) > 1:
        text = f"tokenizer_source is '{plain[0]}' and tokenizer.source '{plain[1]}'. Keep one."
        faults.append(Fault(("tokenizer", "source"), text))
    return found[-1] if found else None


def tokens_of(file: MergeFile, family: Family) -> dict[str, TokenRow]:
    """The tokens whose rows come from somewhere else, by what models are called."""
    names = _called(file, family)
    found: dict[str, TokenRow] = {}
    for token, said in (file.tokenizer.tokens if file.tokenizer else {}).items():
        source = said.source
        model = (source.model or "").removeprefix("model:")
        model = None if source.kind == "zero" else names.get(model, model)
        found[token] = TokenRow(model, source.token, source.token_id, said.force)
    return found


def _called(file: MergeFile, family: Family) -> dict[str, str]:
    """What the models of a file are called, by how it writes them."""
    names = {model: name for name, model in family.experts.items()}
    pairs = zip(family.entries, family.experts, strict=True)
    names |= {entry.model: name for (_, entry), name in pairs}
    if family.base is not None:
        names[family.base] = "base"
    elif file.base_model in names:
        names.setdefault("base", names[file.base_model])
    return names
