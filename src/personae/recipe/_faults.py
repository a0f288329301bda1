"""What is wrong with a recipe, and where; what pydantic says of it in sentences."""

from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

from personae.checkpoints.naming import is_safe_name
from personae.errors import nearest

Model = TypeVar("Model", bound=BaseModel)

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

_MOST = 1000  # more are no person's, and a sentence on each takes its time


class Fault(NamedTuple):
    """What is wrong, and where."""

    place: Place
    text: str


def faults_in(
    error: ValidationError, model: type[BaseModel], nested: Mapping[Any, type[BaseModel]]
) -> list[Fault]:
    """Every fault of a validation, a sentence each, with the nearest name for unknown keys.

    Args:
        error: What pydantic raised.
        model: Of the whole.
        nested: Of what lies under these keys of it, or of one inside; two keys for one that means
            different things in different places.
    """
    faults: list[Fault] = []
    for fault in error.errors()[:_MOST]:
        place: Place = fault["loc"]
        shown = ".".join(str(p) for p in place)
        if fault["type"] == "extra_forbidden":
            outer = [*range(len(place) - 1, 0, -1)]
            ways = (way for n in outer for way in (place[:n][-2:], place[n - 1]))
            inside = (nested[way] for way in ways if way in nested)
            known = next(inside, model)
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


def validated(
    content: Mapping[str, Any],
    model: type[Model],
    nested: Mapping[Any, type[BaseModel]],
    faults: list[Fault],
) -> Model | None:
    """The content without what is wrong in it; None if nothing is left to look at.

    Args:
        content: What a file says.
        model: What it should be.
        nested: Of what lies under these keys of it.
        faults: What is wrong already; every fault of keys, types and choices is added.
    """
    content, taken = deepcopy(dict(content)), set[Place]()
    for _ in range(3):  # again without what was wrong, so that what is left can be looked at
        try:
            return model.model_validate(content)
        except ValidationError as error:
            found = faults_in(error, model, nested)
            taken |= {fault.place for fault in faults}  # missing only as it was taken out
            faults += [fault for fault in found if fault.place not in taken]
            for place in (fault.place for fault in found):
                again = place in taken  # then what it is a part of cannot be without it
                _mend(content, place[:-1] if again else place)
                taken |= {place[:-1]} if again else set()
    return None


def file_name_faults(names: Iterable[tuple[Place, str]]) -> Iterator[Fault]:
    """A fault for each model whose name is taken twice, or no file name somewhere."""
    taken: dict[str, str] = {}
    for place, name in names:
        other = taken.get(name.lower())
        if other is not None:
            both = f"'{name}'" if other == name else f"'{other}' and '{name}' (case is ignored)"
            yield Fault(place, f"Two models are named {both}. Give each its own 'name'.")
        elif not is_safe_name(name):
            yield Fault(
                place,
                f"'{name}' is not a safe file name. Give the model another by 'name': letters, "
                "digits, '.', '_' and '-', beginning with a letter or digit, at most 100.",
            )
        taken.setdefault(name.lower(), name)


def _mend(content: Any, place: Place) -> None:
    """Take out what is wrong; a model that is not said gets a name that stands for it."""
    if not place:
        return
    *outer, last = place
    for key in outer:
        content = content[key] if _has(content, key) else None
    if isinstance(content, dict) and content.pop(last, None) is None and last == "model":
        content["model"] = ".".join(map(str, place))


def _has(content: Any, key: str | int) -> bool:
    if isinstance(content, dict):
        return key in content
    return isinstance(content, list) and isinstance(key, int) and key < len(content)
