"""The catalogue of methods: two decorators that read each signature once.

A static method is one function, a codec one frozen class; the file they stand in gives the name.
Everything that lists, validates or documents methods reads this registry.
"""

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from torch import Tensor

from personae._types import SVD, Parts, TensorSpec
from personae.errors import Faults, MethodError, nearest


class Parameters(BaseModel):
    """Typed, frozen parameters of a method; unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Block(NamedTuple):
    """A slice of one tensor that is coded on its own: `start:stop` along `axis`."""

    axis: int
    start: int
    stop: int


class Bits(NamedTuple):
    """What one tensor costs in a task file, before looking at its values.

    counted: bits by the papers' rule (methods.md 3.1: DTS masks at 3 bits an element).
    counted_lean: the same rule with the fewest bits that carry the code (2 for DTS).
    stored: bits this tool writes: codes with their padding, scales and singular values.
    """

    counted: int
    counted_lean: int
    stored: int


class Codec(Parameters, ABC):
    """A lossy code for deltas; its fields are its parameters. Subclasses are pure and frozen.

    A codec sees one tensor (or block of one) at a time. A decomposition asked for at a larger rank
    serves every smaller one, so that a sweep over ranks pays for one.
    """

    def blocks(self, spec: TensorSpec) -> tuple[Block, ...]:
        """Slices of this tensor to be coded apart; by default the whole tensor is one block."""
        return (Block(0, 0, spec.shape[0]),) if spec.shape else ()

    @abstractmethod
    def rank(self, shape: tuple[int, ...]) -> int:
        """Rank wanted of a decomposition of a delta of this shape; 0 if it needs none."""
        ...

    @abstractmethod
    def decompose(self, delta: Float[Tensor, "..."], rank: int) -> SVD:
        """Truncated SVD of the delta, seen as a matrix, at this rank or its numerical rank."""
        ...

    @abstractmethod
    def encode(self, delta: Float[Tensor, "..."], svd: SVD | None = None) -> Parts:
        """Code a delta (fp32). `svd`, if given, has at least `rank(delta.shape)` triplets."""
        ...

    @abstractmethod
    def decode(self, parts: Parts, shape: tuple[int, ...]) -> Float[Tensor, "..."]:
        """Rebuild the delta (fp32, of this shape) from its parts alone."""
        ...

    @abstractmethod
    def bits(self, shape: tuple[int, ...], rank: int | None = None) -> Bits:
        """Size of the code of a delta of this shape without exact zeros.

        Args:
            shape: Shape of the tensor or block.
            rank: Rank stored; by default `rank(shape)`, that of a delta of full rank.
        """
        ...


class Pass(NamedTuple):
    """One streaming pass that gathers a whole-model statistic before a method runs.

    `update(state, task_vectors, parameters, statistics)` is called once for each tensor, in any
    order, and must be exact under reordering (integer counts). Statistics of earlier passes are
    in `statistics` by name; `finish(state, parameters, statistics)` gives this one's value.
    """

    name: str
    start: Callable[[int], Tensor]
    update: Callable[[Tensor, Tensor, Parameters, Mapping[str, Tensor]], Tensor]
    finish: Callable[[Tensor, Parameters, Mapping[str, Tensor]], Tensor]


def _no_passes(_: Parameters) -> tuple[Pass, ...]:
    """Most methods look at one tensor at a time."""
    return ()


@dataclass(frozen=True)
class MergeMethod:
    """A registered static method: `merge(task_vectors, parameters)` on one tensor at a time."""

    name: str
    summary: str
    paper: str
    parameters: type[Parameters]
    order_free: bool
    function: Callable[..., Tensor]
    passes: Callable[[Parameters], tuple[Pass, ...]] = field(default=_no_passes)

    def merge(
        self,
        task_vectors: Float[Tensor, "expert *shape"],
        parameters: Parameters,
        statistics: Mapping[str, Tensor] | None = None,
    ) -> Float[Tensor, "*shape"]:
        """Apply the method to the stacked task vectors of one tensor.

        Returns:
            The merged task vector, fp32, on the device of the input.
        """
        settings = dict(parameters)
        if self.passes(parameters):
            settings["statistics"] = statistics
        return self.function(task_vectors, **settings)


@dataclass(frozen=True)
class CodecEntry:
    """A registered codec: its class, with what a listing shows."""

    name: str
    summary: str
    paper: str
    parameters: type[Codec]


MERGE_METHODS: dict[str, MergeMethod] = {}
CODECS: dict[str, CodecEntry] = {}

C = TypeVar("C", bound=type[Codec])
F = TypeVar("F", bound=Callable[..., Tensor])


def merge_method(
    *,
    paper: str,
    order_free: bool,
    passes: Callable[[Any], tuple[Pass, ...]] = _no_passes,
) -> Callable[[F], F]:
    """Register a static method; its keyword-only arguments become its typed parameters.

    A function whose `passes(parameters)` may be non-empty also takes a keyword-only `statistics`.
    """

    def register(function: F) -> F:
        name = _file_name(function)
        fields: dict[str, Any] = {}
        meanings = _argument_texts(function)
        for argument in inspect.signature(function).parameters.values():
            if argument.kind is not inspect.Parameter.KEYWORD_ONLY or argument.name == "statistics":
                continue
            assert argument.annotation is not inspect.Parameter.empty, f"{name}: {argument.name}"
            default = ... if argument.default is inspect.Parameter.empty else argument.default
            meaning = Field(default, description=meanings.get(argument.name))
            fields[argument.name] = (argument.annotation, meaning)
        parameters = create_model(f"{name}_parameters", __base__=Parameters, **fields)
        _add(
            MERGE_METHODS,
            MergeMethod(name, _summary(function), paper, parameters, order_free, function, passes),
        )
        return function

    return register


def codec(*, paper: str) -> Callable[[C], C]:
    """Register a codec class; its pydantic fields are its parameters."""

    def register(cls: C) -> C:
        _add(CODECS, CodecEntry(_file_name(cls), _summary(cls), paper, cls))
        return cls

    return register


Entry = TypeVar("Entry", bound=MergeMethod | CodecEntry)


def lookup(registry: Mapping[str, Entry], name: str) -> Entry:
    """Find an entry by name.

    Raises:
        MethodError: if no such name is registered; the text suggests the nearest.
    """
    if name not in registry:
        raise MethodError(f"Unknown method '{name}'. {nearest(name, registry)}")
    return registry[name]


def build(entry: MergeMethod | CodecEntry, settings: Mapping[str, Any]) -> Any:
    """Validate settings against an entry's parameters, all faults at once.

    Raises:
        MethodError: naming every unknown parameter and every value out of range.
    """
    try:
        return entry.parameters(**settings)
    except ValidationError as error:
        faults = Faults()
        for fault in error.errors():
            name = str(fault["loc"][0]) if fault["loc"] else entry.name
            if fault["type"] == "extra_forbidden":
                hint = nearest(name, entry.parameters.model_fields)
                faults.add(f"{entry.name} has no parameter '{name}'. {hint}")
            else:
                faults.add(f"{entry.name}: {name} = {fault['input']!r}: {fault['msg']}.")
        faults.raise_if_any(MethodError)
        raise MethodError(str(error)) from error


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


def _summary(thing: Any) -> str:
    return (inspect.getdoc(thing) or "").split("\n", 1)[0]


def _add(registry: dict[str, Entry], entry: Entry) -> None:
    assert entry.name not in registry, f"two methods named {entry.name}"
    registry[entry.name] = entry
