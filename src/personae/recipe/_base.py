"""What both kinds of recipes are made of."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict

from personae.methods import Conventions

Vector = Literal["task", "difference"]
Output = Literal["model", "adapter"]
Dtype = Literal["float32", "float16", "bfloat16"]


Convention = Annotated[
    Conventions, BeforeValidator(lambda value: "papers" if value == "personae" else value)
]
"""`personae` is an earlier word for the papers'."""


def _or(empty: Any) -> BeforeValidator:
    """Read a key with nothing after it as one that is not there."""
    return BeforeValidator(lambda value: empty if value is None else value)


Size = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) is int else value)]
"""A number of bytes, with or without a unit."""

EMPTY = _or({})
Given = Annotated[dict[str, Any], EMPTY]
Patterns = Annotated[list[str], _or([])]


class Strict(BaseModel):
    """Frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)
