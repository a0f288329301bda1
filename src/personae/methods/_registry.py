"""The catalogue of merge methods, codecs and learned methods: classes that decorators register.

The file that a class stands in gives its name. Everything that lists, validates or documents
methods reads this registry.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from personae.errors import Faults, MethodError, nearest
from personae.methods._codec import Codec
from personae.methods._learned import LearnedMethod
from personae.methods._merge import Conventions, MergeMethod
from personae.methods._method import Parameters, flag_fault, percent_hint

MERGE_METHODS: dict[str, type[MergeMethod]] = {}
MERGEKIT_METHODS: dict[str, type[MergeMethod]] = {}
METHODS_BY_CONVENTIONS: dict[Conventions, dict[str, type[MergeMethod]]] = {
    "papers": MERGE_METHODS,
    "mergekit": MERGEKIT_METHODS,
}
ALIASES: dict[str, str] = {}
CODECS: dict[str, type[Codec]] = {}
LEARNED_METHODS: dict[str, type[LearnedMethod]] = {}

C = TypeVar("C", bound=type[Codec])
L = TypeVar("L", bound=type[LearnedMethod])
M = TypeVar("M", bound=type[MergeMethod])


def merge_method(
    *, paper: str, aliases: Sequence[str] = (), conventions: Conventions = "papers"
) -> Callable[[M], M]:
    """Register a class of merge methods; its pydantic fields are its parameters.

    Args:
        paper: Where it is from.
        aliases: Further names in recipes.
        conventions: Whose algorithm it is.
    """

    def register(cls: M) -> M:
        _add(METHODS_BY_CONVENTIONS[conventions], cls, paper)
        cls.conventions = conventions
        for alias in aliases:
            ALIASES[alias] = cls.name
        return cls

    return register


def codec(*, paper: str) -> Callable[[C], C]:
    """Register a codec class; its pydantic fields are its parameters."""

    def register(cls: C) -> C:
        _add(CODECS, cls, paper)
        return cls

    return register


def learned_method(*, paper: str) -> Callable[[L], L]:
    """Register a class of methods that look at data; its pydantic fields are its parameters."""

    def register(cls: L) -> L:
        _add(LEARNED_METHODS, cls, paper)
        return cls

    return register


Entry = TypeVar("Entry", bound=type[MergeMethod] | type[Codec] | type[LearnedMethod])


def lookup(registry: Mapping[str, Entry], name: str) -> Entry:
    """Find an entry by its name or an alias.

    Raises:
        MethodError: if no such name is registered; the text suggests the nearest.
    """
    if name not in registry:
        name = ALIASES.get(name, name)
    if name not in registry:
        raise MethodError(f"Unknown method '{name}'. {nearest(name, registry)}")
    return registry[name]


Built = TypeVar("Built", bound=Parameters)


def build(entry: type[Built], settings: Mapping[str, Any]) -> Built:
    """A method with these parameters, all faults at once.

    Raises:
        MethodError: naming every unknown parameter and every value out of range.
    """
    faults = Faults()
    fields = entry.fields()
    for name, value in settings.items():
        wrong = flag_fault(value, fields[name].annotation) if name in fields else ""
        if wrong:
            faults.add(f"{entry.name}: {name} = {value!r}: {wrong}.")
    try:
        built = entry(**settings)
    except ValidationError as error:
        for fault in error.errors():
            name = str(fault["loc"][0]) if fault["loc"] else entry.name
            if fault["type"] == "extra_forbidden":
                hint = nearest(name, fields)
                faults.add(f"{entry.name} has no parameter '{name}'. {hint}")
            else:
                hint = percent_hint(fault["input"], fault)
                faults.add(f"{entry.name}: {name} = {fault['input']!r}: {fault['msg']}.{hint}")
        faults.raise_if_any(MethodError)
        raise MethodError(str(error)) from error
    faults.raise_if_any(MethodError)
    return built


def _file_name(thing: Any) -> str:
    return thing.__module__.rsplit(".", 1)[-1]


def summary_of(thing: Any) -> str:
    """The first line of a docstring."""
    return (inspect.getdoc(thing) or "").split("\n", 1)[0]


def _add(registry: dict[str, Entry], cls: Entry, paper: str) -> None:
    cls.name, cls.summary, cls.paper = _file_name(cls), summary_of(cls), paper
    assert cls.name not in registry, f"two methods named {cls.name}"
    registry[cls.name] = cls
