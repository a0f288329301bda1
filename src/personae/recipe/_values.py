"""Values that differ from tensor to tensor: gradients over the layers, and filters by name.

A value is a scalar; a list of numbers, which is a gradient: piecewise linear over the layers, from
the first to the last; or a list of `{filter, value}`, of which the first entry whose filter matches
the tensor's name applies.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, cast

from pydantic import BeforeValidator

from personae.checkpoints.naming import matches
from personae.recipe._base import Given

_FORMS = "a value, a list of numbers (a gradient over the layers), or a list of {filter, value}"

MISSING: Any = object()
"""No filter fits the tensor."""


def _read_numbers(given: Any, depth: int = 4) -> Any:
    """The same with numbers in the place of texts that are some, such as 1e-1 in YAML."""
    if isinstance(given, str):
        try:
            return float(given)
        except ValueError:
            return given
    if isinstance(given, list) and depth:
        return [_read_numbers(item, depth - 1) for item in given]
    if isinstance(given, dict) and depth:
        return {k: v if k == "filter" else _read_numbers(v, depth - 1) for k, v in given.items()}
    return given  # deeper than values go there is nothing to read


Values = Annotated[Given, BeforeValidator(_read_numbers)]
"""Parameter to value."""


def layer_of(name: str) -> int | None:
    """The layer of a tensor, the first number between the dots of its name; None outside layers.

    Examples:
        >>> layer_of("model.layers.11.mlp.up_proj.weight")
        11
    """
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def count_layers(names: Iterable[str]) -> int:
    """How many layers these tensors are of, for gradients: the highest number and one."""
    return 1 + max((layer for layer in map(layer_of, names) if layer is not None), default=0)


def position(name: str, layers: int, first: int | None = None) -> float:
    """Where a tensor is on a gradient: 0 in the first layer and outside layers, 1 in the last.

    Args:
        name: The tensor's.
        layers: How many layers there are.
        first: The number of the first one of a slice; the one layer of a slice is its last.
    """
    layer = layer_of(name)
    if layer is None:
        return 0.0
    if layers == 1:
        return 0.0 if first is None else 1.0
    return min((layer - (first or 0)) / (layers - 1), 1.0)


def evaluate(value: Any, name: str, t: float) -> Any:
    """The scalar a value is for one tensor, or `MISSING`.

    Args:
        value: As `fault_in` accepts it.
        name: Of the tensor.
        t: Its position, from 0 in the first layer to 1 in the last.
    """
    if is_gradient(value):
        return _on_gradient(value, t)
    for entry in _entries(value):
        if fits(entry.get("filter"), name):
            return evaluate(entry["value"], name, t)
    return MISSING if isinstance(value, list | dict) else value


def _on_gradient(points: Sequence[float | int], t: float) -> float | int:
    below = min(int(t * (len(points) - 1)), len(points) - 1)
    above = min(below + 1, len(points) - 1)
    share = t * (len(points) - 1) - below
    return points[below] if share == 0 else (1 - share) * points[below] + share * points[above]


def fits(pattern: str | None, name: str) -> bool:
    """Whether a tensor name holds the text of a filter, or fits its pattern if it has a `*`."""
    if pattern is None:
        return True
    return matches(name, [pattern]) if "*" in pattern else pattern in name


def is_scalar(value: Any) -> bool:
    """Whether a value is the same for every tensor by its form alone."""
    return not isinstance(value, list | dict | tuple | set)


def is_gradient(value: Any) -> bool:
    """Whether a value is a list of numbers."""
    return isinstance(value, list) and bool(value) and all(map(_is_number, value))


def scalars_of(value: Any) -> Iterator[Any]:
    """The scalars a value is made of; between those of a gradient lie the others."""
    if isinstance(value, list | dict) and not is_gradient(value):
        for entry in _entries(value):
            yield from scalars_of(entry["value"])
    elif is_gradient(value):
        yield from value
    else:
        yield value


def varies(value: Any) -> bool:
    """Whether it may differ from tensor to tensor."""
    first, *others = scalars_of(value)
    return any(other != first for other in others) or not always(value)


def always(value: Any) -> bool:
    """Whether it says something of every tensor: it has no filters, or an entry without."""
    if is_gradient(value) or not isinstance(value, list | dict):
        return True
    return any(entry.get("filter") in (None, "*") for entry in _entries(value))


def filters_of(value: Any) -> list[str]:
    """The filters of a value."""
    found = (entry.get("filter") for entry in _entries(value))
    return [pattern for pattern in found if pattern is not None]


def fault_in(value: Any) -> str:
    """What is wrong with the form of a value; empty if nothing is."""
    if is_scalar(value) or is_gradient(value):
        return ""
    entries: Any = [value] if isinstance(value, dict) else value
    if not isinstance(value, list | dict) or not entries:
        return f"expected {_FORMS}"
    if _is_number(entries[0]):
        odd = next(entry for entry in entries if not _is_number(entry))
        return f"expected {_FORMS}, not {_shown(odd)} in it"
    for entry in entries:
        if (
            not isinstance(entry, dict)
            or "value" not in entry
            or entry.keys() - {"filter", "value"}
        ):
            return f"expected {_FORMS}, not {_shown(entry)} in it"
        pattern, inner = entry.get("filter"), entry["value"]
        if pattern is not None and not isinstance(pattern, str):
            return f"the filter {pattern!r} is no text"
        if isinstance(inner, list | dict) and not is_gradient(inner):
            return f"the value of the filter {pattern!r} must be a value or a list of numbers"
    return ""


def _entries(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, dict):
        return [cast("dict[str, Any]", value)]
    return value if isinstance(value, list) and not is_gradient(value) else []


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)
