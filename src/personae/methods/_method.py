"""What merge methods and codecs have in common: typed parameters, and passes.

A method's `passes` is a generator: it yields a `Pass`, is sent what that came to, may yield the
next, and returns the statistics. Whoever holds the tensors takes them (`run.passes`, or in memory
`MergeMethod.statistics` and `Codec.statistics`).
"""

from collections.abc import Callable, Generator, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError
from torch import Tensor

from personae._types import in_range
from personae.errors import Faults
from personae.methods._site import Site


class Parameters(BaseModel):
    """Typed, frozen parameters of a method; unknown names are refused.

    A parameter that takes a tuple takes one value an expert, in recipe order.
    """

    model_config = ConfigDict(
        defer_build=True,  # of dozens of methods one runs
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        populate_by_name=True,
        protected_namespaces=(),  # pydantic 2.9 takes names such as `model_wide` for its own
    )

    name: ClassVar[str] = ""
    """The method's name in recipes: that of its file."""
    summary: ClassVar[str] = ""
    """One line."""
    paper: ClassVar[str] = ""
    """Where it is from."""

    @field_validator("*")
    @classmethod
    def _in_range(cls, value: Any) -> Any:
        """Refuse numbers that are infinite where they are used.

        Raises:
            PydanticCustomError: if there is one.
        """
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, float) and not in_range(one):
                raise PydanticCustomError("out_of_range", "It exceeds the range of float32")
        return value

    def check(self, experts: int, has_base: bool) -> str:
        """What is wrong with values that are sound one by one; empty if nothing.

        Args:
            experts: How many there are.
            has_base: Whether there is a base.
        """
        return ""

    @classmethod
    def fields(cls) -> dict[str, FieldInfo]:
        """Its parameters, by their names in recipes."""
        return {field.alias or name: field for name, field in cls.model_fields.items()}

    def check_experts(self, experts: int, faults: Faults, *, has_base: bool | None) -> None:
        """Add a fault for each parameter whose values are not one an expert, or the check's.

        That is not asked while nobody knows whether there is a base (None).
        """
        sound = True
        for name, value in self.model_dump(by_alias=True).items():
            if isinstance(value, tuple) and len(value) != experts:
                sound = False
                faults.add(
                    f"{name} has {len(value)} values for {experts} experts. "
                    "Give one an expert, or a single one for all."
                )
        fault = self.check(experts, has_base) if sound and experts and has_base is not None else ""
        if fault:
            faults.add(fault)


def flag_fault(value: object, annotation: Any) -> str:
    """Say that true or false stands where none is meant; it would pass as the number 1 or 0."""
    if not isinstance(value, bool) or annotation is bool or bool in get_args(annotation):
        return ""
    return f"expected a number or word, not {str(value).lower()}"


def percent_hint(value: object, fault: Mapping[str, Any]) -> str:
    """What a number above 1 was probably meant to be where pydantic found a fraction missing."""
    if fault["type"] != "less_than_equal" or fault["ctx"]["le"] != 1:
        return ""
    if not isinstance(value, int | float) or value > 100:
        return ""
    return f" It is a fraction: {value:g} % is {value / 100:g}."


def one_each(value: float | tuple[float, ...], experts: int) -> tuple[float, ...]:
    """One value for each expert."""
    values: Any = value if isinstance(value, tuple) else (value,) * experts
    assert len(values) == experts, f"{len(values)} values for {experts} experts"
    return values


def per_expert(
    value: float | tuple[float, ...], task_vectors: Float[Tensor, "expert ..."]
) -> Float[Tensor, "expert ..."]:
    """One value for each expert, shaped to be multiplied with the stacked task vectors."""
    experts = len(task_vectors)
    values = one_each(value, experts)
    shape = (experts, *[1] * (task_vectors.ndim - 1))
    return torch.tensor(values, dtype=torch.float32, device=task_vectors.device).reshape(shape)


Statistics = Mapping[str, Tensor]
"""What a method has to know beyond the entries it is given, by name."""


def _everywhere(_: Any, __: Site) -> bool:
    return True


class Pass(NamedTuple):
    """A fold over tensors: the sum of what each of them, or each cut of one, adds.

    Attributes:
        name: What it finds, for progress.
        term: What the values given add: int64, or floating (then summed in the order of tensors
            and rows). Of a merge method `term(task_vectors, method, site)`, with the method as it
            is for that tensor; entry-wise ones take the task vectors by `delta_blocks`, for they
            may be `DeltaBlocks`. Of a codec `term(delta, context)`, for each block that is coded
            and not zero. A tensor of its own, to which others are added in place.
        applies: `applies(method, site)`: whether a merge method's pass reads a tensor.
        sample: Reads about one row in so many, spread over all tensors: enough for a guess.
        late: Whether it may be answered by None: the method merges all the same, telling in an
            `Undecided` what of its result depends on it.
        apart: Whether terms are not summed, but sent one by one: name to term, in order.
        term_bytes: Memory of the largest term, of this pass and of those that follow from it; 0
            where that is a few numbers.
    """

    name: str
    term: Callable[..., Tensor]
    applies: Callable[[Any, Site], bool] = _everywhere
    sample: int = 1
    late: bool = False
    apart: bool = False
    term_bytes: int = 0


Scope = Literal["model", "tensor"]
"""What passes are over: all of the model, or each tensor alone."""

Passes = Generator[Pass, Any, Statistics]
"""Yields passes, is sent what each came to, returns the statistics."""


def statistics_of(passes: Passes, take: Callable[[Pass], Any]) -> Statistics:
    """The statistics, once `take` has told what each pass came to."""
    found: Any = None
    while True:
        try:
            one = passes.send(found)
        except StopIteration as done:  # of the passes alone: one of `take` would be a fault
            return done.value
        found = None  # not held while the next one is taken
        found = take(one)


def scalars(numbers: Mapping[str, float]) -> Statistics:
    """Numbers as statistics, to the bit."""
    return {name: torch.tensor(number, dtype=torch.float64) for name, number in numbers.items()}


def numbers(statistics: Statistics | None) -> dict[str, float]:
    """Statistics that are scalars, as numbers."""
    return {name: float(scalar) for name, scalar in (statistics or {}).items()}
