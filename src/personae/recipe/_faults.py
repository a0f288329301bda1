"""What is wrong with a recipe, and where; what pydantic says of it in sentences."""

from collections.abc import Mapping
from typing import NamedTuple

from pydantic import BaseModel, ValidationError

from personae.errors import nearest

Place = tuple[str | int, ...]
"""Where in a file or in settings: keys, and positions in lists."""

_FORMS = {
    "model_type": "keys with values",
    "dict_type": "keys with values",
    "list_type": "a list",
    "string_type": "text",
    "string_too_short": "a name or path",
}
"""What was expected, for pydantic's kinds of faults."""


class Fault(NamedTuple):
    """What is wrong, and where."""

    place: Place
    text: str


def faults_in(
    error: ValidationError, model: type[BaseModel], nested: Mapping[str, type[BaseModel]]
) -> list[Fault]:
    """Every fault of a validation, a sentence each, with the nearest name for unknown keys.

    Args:
        error: What pydantic raised.
        model: Of the whole.
        nested: Of what lies under these keys of it.
    """
    faults: list[Fault] = []
    for fault in error.errors():
        place: Place = fault["loc"]
        shown = ".".join(str(p) for p in place)
        if fault["type"] == "extra_forbidden":
            known = nested.get(str(place[0]), model) if len(place) > 1 else model
            hint = nearest(str([*place][-1]), known.model_fields)
            text = f"Unknown key '{shown}'. {hint}"
        elif fault["type"] in _FORMS:
            text = f"{shown} = {fault['input']!r}: expected {_FORMS[fault['type']]}."
            if place[0] == "models" and isinstance(fault["input"], str) and fault["input"]:
                text += f" Write '- model: {fault['input']}'."
        elif fault["type"] == "missing":
            text = f"'{shown}' is missing."
        else:
            message = fault["msg"].removeprefix("Value error, ").removesuffix(".")
            text = f"{shown} = {fault['input']!r}: {message}." if shown else f"{message}."
        faults.append(Fault(place, text))
    return faults
