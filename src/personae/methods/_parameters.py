"""Typed parameters of a method, and values that differ from expert to expert."""

from collections.abc import Mapping
from typing import Any, ClassVar, get_args

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo
from torch import Tensor

from personae.errors import Faults


class Parameters(BaseModel):
    """Typed, frozen parameters of a method; unknown names are refused.

    A parameter that takes a tuple takes one value an expert, in recipe order.
    """

    model_config = ConfigDict(
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
