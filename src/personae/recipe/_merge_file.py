"""The keys of a merge recipe, as mergekit's users know them, and what differs here."""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any, NamedTuple

from pydantic import Field

from personae.checkpoints.naming import name_of
from personae.methods import Conventions, MergeMethod
from personae.recipe._base import Dtype, Strict, Vector
from personae.recipe._faults import Fault, validated


class Model(Strict):
    """An entry of `models`."""

    model: str = Field(min_length=1)
    name: str | None = None
    parameters: dict[str, Any] = Field(default={})


class _Tokenizer(Strict):
    source: str


class MergeFile(Strict):
    """All that a merge recipe can say."""

    merge_method: str
    base_model: str | None = None
    models: list[Model]
    parameters: dict[str, Any] = Field(default={})
    dtype: Dtype | None = None
    out_dtype: Dtype | None = None
    tokenizer_source: str | None = None
    tokenizer: _Tokenizer | None = None
    conventions: Conventions | None = None
    vector: Vector | None = None
    skip: list[str] = Field(default=[])
    only: list[str] = Field(default=[])


_REFUSED: dict[str, str] = {
    "slices": "'slices' builds a model of parts of others. Here whole models are merged: "
    "list them under 'models', and set values by layer with a list of numbers.",
    "modules": "'modules' merges parts of models by recipes of their own. Merge each model by "
    "one recipe: list them under 'models'.",
    "chat_template": "A chat template is not set by a merge: the output has that of its "
    "tokenizer's source. Leave the key out, and put yours into chat_template.jinja of the output.",
}
_REFUSED_INSIDE: dict[tuple[str, str], str] = {
    ("models", "layer_range"): "'layer_range' takes some layers of a model. Here whole models are "
    "merged: leave it out.",
    ("tokenizer", "tokens"): "Rows of single tokens cannot be chosen. Leave 'tokens' out.",
    ("tokenizer", "pad_to_multiple_of"): "The vocabulary is not padded. Leave "
    "'pad_to_multiple_of' out.",
}
_NESTED: dict[str, type[Strict]] = {"models": Model, "tokenizer": _Tokenizer}


def read_file(content: Mapping[str, Any]) -> tuple[MergeFile | None, list[Fault]]:
    """The file, without what is wrong in it; None if nothing is left to look at.

    Returns:
        The file, and every fault of keys, types and choices.
    """
    content = deepcopy(dict(content))
    faults = list(_refuse(content))
    return validated(content, MergeFile, _NESTED, faults), faults


def _refuse(content: dict[str, Any]) -> Iterator[Fault]:
    """Take out the keys of mergekit that are not honoured, each with what to do instead."""
    if "pack_method" in content:
        del content["pack_method"]
        yield Fault(("pack_method",), "A recipe merges or packs: keep merge_method or pack_method.")
    for key, text in _REFUSED.items():
        if content.pop(key, None) is not None:
            yield Fault((key,), text)
            if key != "chat_template":
                content.setdefault("models", [])
    for (outer, inner), text in _REFUSED_INSIDE.items():
        within = content.get(outer)
        for n, part in enumerate(within) if isinstance(within, list) else [(None, within)]:
            if isinstance(part, dict) and part.pop(inner, None) is not None:
                yield Fault((outer, inner) if n is None else (outer, n, inner), text)


class Family(NamedTuple):
    """Base and experts of a file.

    Attributes:
        base: Where the base is.
        experts: Name to where it is.
        entries: For each expert its position under `models`.
    """

    base: str | None
    experts: dict[str, str]
    entries: list[int]


def family_of(file: MergeFile, faults: list[Fault]) -> Family:
    """Tell experts from the base, and give each a name.

    The base may be listed among the models: without parameters, it is no expert.
    """
    experts: dict[str, str] = {}
    entries: list[int] = []
    for n, entry in enumerate(file.models):
        if entry.model == file.base_model and not entry.parameters:
            continue
        model = entry.model
        if file.base_model is not None:  # mergekit's way to write an adapter of a model
            model = model.removeprefix(f"{file.base_model}+")
        name = entry.name or name_of(model)
        if name in experts:
            text = f"Two models are named '{name}'. Give each its own 'name'."
            faults.append(Fault(("models", n), text))
        else:
            experts[name] = model
            entries.append(n)
    return Family(file.base_model, experts, entries)


def tokenizer_of(file: MergeFile, family: Family) -> str | None:
    """Whose vocabulary comes out: 'base', 'union', or a name where the file says a model."""
    source = file.tokenizer.source if file.tokenizer else file.tokenizer_source
    names = {model: name for name, model in family.experts.items()}
    if family.base is not None:
        names[family.base] = "base"
    source = source.removeprefix("model:") if source else None
    return names.get(source, source) if source else None


def native(name: str, value: Any, method: MergeMethod) -> tuple[str, Any, str]:
    """A parameter by this package's name, where mergekit has another.

    Returns:
        The name (empty: it is left out), the value, and a remark (empty if there is none).
    """
    known = method.parameters.model_fields
    if name in known:
        return name, value, ""
    if name == "lambda" and "scale" in known:
        return "scale", value, "lambda is called scale here."
    if name == "int8_mask":
        return "", value, "int8_mask is left out: masks take no memory here, results are the same."
    if name == "normalize" and "reduce" in known and isinstance(value, bool):
        reduce = "mean" if value else "sum"
        return "reduce", reduce, f"normalize: {str(value).lower()} is called reduce: {reduce} here."
    return name, value, ""
