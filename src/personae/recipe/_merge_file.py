"""The keys of a merge recipe, as mergekit's users know them, and what differs here."""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StrictFloat, StrictInt, model_validator

from personae.recipe._base import (
    EMPTY,
    Convention,
    Dtype,
    Output,
    Patterns,
    Size,
    Strict,
    Vector,
)
from personae.recipe._faults import Fault, validated
from personae.recipe._values import Values


class Model(Strict):
    """An entry of `models`."""

    model: str = Field(min_length=1)
    name: str | None = None
    parameters: Values = Field(default={})


class TokenSource(Strict):
    """A row under `tokens`: a model's for this token or for another, or one of zeros."""

    kind: Literal["model", "model_token", "zero"]
    model: str | None = None
    token: str | None = None
    token_id: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _is_one(self) -> "TokenSource":
        one = (self.token is None) != (self.token_id is None)
        if self.kind == "model_token" and (self.model is None or not one):
            raise ValueError("a model_token needs a model, and a token or a token_id")
        return self


def _model_alone(value: Any) -> Any:
    """Read a model's name as the row that it has for the token."""
    return {"kind": "model", "model": value} if isinstance(value, str) else value


class Token(Strict):
    """An entry of `tokens`."""

    source: Annotated[TokenSource, BeforeValidator(_model_alone)]
    force: bool = False


class Tokenizer(Strict):
    """What `tokenizer` says."""

    source: str = "union"
    tokens: Annotated[dict[str, Token], EMPTY] = Field(default={})
    pad_to_multiple_of: Annotated[int, Field(gt=0)] | None = None


class MergeFile(Strict):
    """All that a merge recipe can say."""

    merge_method: str
    base_model: Annotated[str, Field(min_length=1)] | None = None
    models: list[Model]
    parameters: Values = Field(default={})
    dtype: Dtype | None = None
    out_dtype: Dtype | None = None
    tokenizer_source: str | None = None
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    conventions: Convention | None = None
    vector: Vector | None = None
    output: Output = "model"
    rank: StrictInt | None = None
    energy: StrictFloat | None = None
    budget: Size | None = None
    max_rank: StrictInt | None = None
    rank_pattern: bool = False
    skip: Patterns = Field(default=[])
    only: Patterns = Field(default=[])


_REFUSED_INSIDE: dict[tuple[str, str], str] = {
    ("models", "layer_range"): "'layer_range' takes some layers of a model, and models are merged "
    "whole. Leave it out, or write 'slices' with 'sources' in place of 'models'.",
}
_NESTED: dict[str, type[Strict]] = {"models": Model, "tokenizer": Tokenizer}

KEYS: Mapping[str, Sequence[str]] = {
    "": (*MergeFile.model_fields, "pack_method", "slices", "modules"),
    **{key: [*nested.model_fields] for key, nested in _NESTED.items()},
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
    for (outer, inner), text in _REFUSED_INSIDE.items():
        within = content.get(outer)
        for n, part in enumerate(within) if isinstance(within, list) else [(None, within)]:
            if isinstance(part, dict) and part.pop(inner, None) is not None:
                yield Fault((outer, inner) if n is None else (outer, n, inner), text)
