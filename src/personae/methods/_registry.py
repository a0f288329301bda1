"""The catalogue of methods: two decorators that read each signature once.

A static method is one function, a codec one frozen class; the file they stand in gives the name.
Everything that lists, validates or documents methods reads this registry.
"""

import inspect
import keyword
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

from pydantic import BaseModel, Field, ValidationError, create_model
from torch import Tensor

from personae.errors import Faults, MethodError, nearest
from personae.methods._codec import Codec
from personae.methods._merge import Gathering, MergeMethod, Scope, Side
from personae.methods._parameters import Parameters, flag_fault, percent_hint
from personae.methods._site import Site

Conventions = Literal["personae", "mergekit"]
"""Whose algorithm a name means, where two codes use one name for two."""


@dataclass(frozen=True)
class CodecEntry:
    """A registered codec: its class, with what a listing shows."""

    name: str
    summary: str
    paper: str
    parameters: type[Codec]


MERGE_METHODS: dict[str, MergeMethod] = {}
MERGEKIT_METHODS: dict[str, MergeMethod] = {}
METHODS_BY_CONVENTIONS: dict[Conventions, dict[str, MergeMethod]] = {
    "personae": MERGE_METHODS,
    "mergekit": MERGEKIT_METHODS,
}
ALIASES: dict[str, str] = {}
CODECS: dict[str, CodecEntry] = {}

_GIVEN = {"statistics", "site", "undecided"}

C = TypeVar("C", bound=type[Codec])
F = TypeVar("F", bound=Callable[..., Tensor])


def everywhere(_: Any, __: Site) -> bool:
    """Entry-wise on every tensor."""
    return True


def not_linear(_: Any, site: Site) -> bool:
    """Entry-wise on all but the weights of linear layers."""
    return site.kind != "linear"


def _never(_: Any, __: Site) -> Side:
    return "none"


def _not_late(_: Any) -> bool:
    return False


def _not_linear_in_experts(_: Any, __: int) -> None:
    return None


def merge_method(
    *,
    paper: str,
    order_free: bool,
    entrywise: Callable[[Any, Site], bool],
    gather: Callable[[Any, int], Gathering] | None = None,
    late: Callable[[Any], bool] = _not_late,
    scope: Scope = "model",
    equivariant: Callable[[Any, Site], Side] = _never,
    coefficients: Callable[[Any, int], Sequence[float] | None] = _not_linear_in_experts,
    needs: Literal["deltas", "base", "adapters"] = "deltas",
    degenerates: str = "",
    looks: int = 0,
    model_wide: tuple[str, ...] = (),
    bytes_per_entry: int = 16,
    check: Callable[[Any, int, bool], str] | None = None,
    aliases: Sequence[str] = (),
    conventions: Conventions = "personae",
) -> Callable[[F], F]:
    """Register a static method; its keyword-only arguments become its typed parameters.

    `statistics`, `site` and `undecided` among them are no parameters: the method is given them as
    it runs.
    An argument named as a Python keyword and `_` is the parameter of that name: `lambda_`, lambda.
    The other arguments are as in `MergeMethod`; `aliases` are further names in recipes, and
    `check(parameters, experts, has_base)` says what is wrong with values that are sound one by one.
    """

    def register(function: F) -> F:
        name = _file_name(function)
        registry = METHODS_BY_CONVENTIONS[conventions]
        method = MergeMethod(
            name=name,
            summary=summary_of(function),
            paper=paper,
            parameters=argument_parameters(function, name, check),
            function=function,
            order_free=order_free,
            gather=gather,
            late=late,
            scope=scope,
            entrywise=entrywise,
            equivariant=equivariant,
            coefficients=coefficients,
            needs=needs,
            degenerates=degenerates,
            looks=looks,
            model_wide=model_wide,
            bytes_per_entry=bytes_per_entry,
        )
        _add(registry, method)
        for alias in aliases:
            ALIASES[alias] = name
        return function

    return register


def argument_parameters(
    function: Callable[..., Any], name: str, check: Callable[[Any, int, bool], str] | None = None
) -> type[Parameters]:
    """The keyword-only arguments of a function as a model of typed parameters."""
    fields: dict[str, Any] = {}
    meanings = _argument_texts(function)
    for argument in inspect.signature(function).parameters.values():
        if argument.kind is not inspect.Parameter.KEYWORD_ONLY or argument.name in _GIVEN:
            continue
        assert argument.annotation is not inspect.Parameter.empty, f"{name}: {argument.name}"
        default = ... if argument.default is inspect.Parameter.empty else argument.default
        meaning = Field(default, description=meanings.get(argument.name))
        bare = argument.name.removesuffix("_")
        field = bare if keyword.iskeyword(bare) else argument.name
        fields[field] = (argument.annotation, meaning)
    model = create_model(f"{name}_parameters", __base__=Parameters, **fields)
    if check is not None:
        model.check = staticmethod(check)
    return model


def codec(*, paper: str) -> Callable[[C], C]:
    """Register a codec class; its pydantic fields are its parameters."""

    def register(cls: C) -> C:
        _add(CODECS, CodecEntry(_file_name(cls), summary_of(cls), paper, cls))
        return cls

    return register


Entry = TypeVar("Entry", bound=MergeMethod | CodecEntry)


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


@runtime_checkable
class Buildable(Protocol):
    """What has typed parameters under a name."""

    @property
    def name(self) -> str:
        """Its name in recipes."""
        ...

    @property
    def parameters(self) -> type[BaseModel]:
        """Their model."""
        ...


def build(entry: Buildable, settings: Mapping[str, Any]) -> Any:
    """Validate settings against an entry's parameters, all faults at once.

    Raises:
        MethodError: naming every unknown parameter and every value out of range.
    """
    faults = Faults()
    fields = entry.parameters.model_fields
    for name, value in settings.items():
        wrong = flag_fault(value, fields[name].annotation) if name in fields else ""
        if wrong:
            faults.add(f"{entry.name}: {name} = {value!r}: {wrong}.")
    try:
        built = entry.parameters(**settings)
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


def _argument_texts(function: Callable[..., Any]) -> dict[str, str]:
    """What the "Args:" of a Google docstring say of each argument."""
    texts: dict[str, str] = {}
    name = ""
    section = (inspect.getdoc(function) or "").partition("\nArgs:\n")[2].split("\n\n")[0]
    for line in section.splitlines():
        started = re.match(r"    (\w+): (.*)", line)
        if started:
            name = started[1]
            texts[name] = started[2]
        elif name:
            texts[name] += " " + line.strip()
    return texts


def summary_of(thing: Any) -> str:
    """The first line of a docstring."""
    return (inspect.getdoc(thing) or "").split("\n", 1)[0]


def _add(registry: dict[str, Entry], entry: Entry) -> None:
    assert entry.name not in registry, f"two methods named {entry.name}"
    registry[entry.name] = entry
