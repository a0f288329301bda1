"""The keys of a merge recipe, as mergekit's users know them, and what differs here."""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

from pydantic import Field

from personae.recipe._base import Convention, Dtype, Patterns, Strict, Vector
from personae.recipe._faults import Fault, validated
from personae.recipe._values import Values


class Model(Strict):
    """An entry of `models`."""

    model: str = Field(min_length=1)
    name: str | None = None
    parameters: Values = Field(default={})


class _Tokenizer(Strict):
    source: str


class MergeFile(Strict):
    """All that a merge recipe can say."""

    merge_method: str
    base_model: str | None = None
    models: list[Model]
    parameters: Values = Field(default={})
    dtype: Dtype | None = None
    out_dtype: Dtype | None = None
    tokenizer_source: str | None = None
    tokenizer: _Tokenizer | None = None
    conventions: Convention | None = None
    vector: Vector | None = None
    skip: Patterns = Field(default=[])
    only: Patterns = Field(default=[])


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

KEYS: Mapping[str, Sequence[str]] = {
    "": (*MergeFile.model_fields, *_REFUSED, "pack_method"),
    **{
        key: (
            *nested.model_fields,
            *(i for outer, i in _REFUSED_INSIDE if outer == key != "models"),
        )
        for key, nested in _NESTED.items()
    },
}
"""The keys that are read or refused, at the top (under '') and in what lies under these."""


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
