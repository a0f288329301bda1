"""What a pack shall be: codec, reference, budget. Read from YAML or given as options."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from personae.checkpoints.naming import name_of
from personae.errors import Faults, MethodError, RecipeError
from personae.methods import CODECS, MERGE_METHODS, Codec, MergeMethod, Parameters, build, lookup
from personae.recipe._faults import faults_in
from personae.recipe._yaml import yaml_fault

Vector = Literal["task", "difference"]
Counting = Literal["counted", "counted_lean", "on_disk_fp32", "on_disk_native"]
COUNTING: tuple[Counting, ...] = get_args(Counting)

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9} | {
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}


class Strict(BaseModel):
    """Frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def _budget_reads(value: object) -> str | None:
    if value is not None:
        parse_size(str(value), percent=True)
    return None if value is None else str(value)


Budget = Annotated[str | None, BeforeValidator(_budget_reads)]


class PackSettings(Strict):
    """How to pack, without which checkpoints."""

    method: str = Field(default="dts", description="Codec")
    parameters: dict[str, Any] = Field(default={}, description="The codec's parameters")
    budget: Budget = Field(default=None, description="Size a task may cost: '1%' or '900KB'")
    counting: Counting = Field(default="on_disk_native", description="Rule a budget is counted by")
    vector: Vector = "task"
    reference: str | None = Field(
        default=None, description="Merge method of a difference pack; by default average"
    )
    reference_parameters: dict[str, Any] = {}
    skip: tuple[str, ...] = Field(default=(), description="Patterns of tensors to leave out")
    private: tuple[str, ...] = Field(default=(), description="Patterns of tensors to keep whole")

    @model_validator(mode="after")
    def _one_rank(self) -> "PackSettings":
        if self.budget is not None and "rank_fraction" in self.parameters:
            raise ValueError("a budget sets the rank: give budget or rank_fraction, not both")
        return self

    @model_validator(mode="after")
    def _reference_is_used(self) -> "PackSettings":
        if self.vector == "task" and (self.reference or self.reference_parameters):
            raise ValueError("a merged reference needs vector: difference (--vector difference)")
        return self

    @property
    def from_average(self) -> bool:
        """Whether deltas are differences from the plain average of the experts."""
        return (
            self.vector == "difference"
            and self.reference in (None, "average", "linear")
            and (not self.reference_parameters)
        )

    def common(self) -> "PackSettings":
        """What packs must have in common to share the decomposition of each delta.

        Raises:
            MethodError: for an unknown codec or parameter, or a value out of range.
        """
        codec = self.codec()
        parameters = codec.model_dump(mode="json", exclude=set(codec.free))
        return self.model_copy(update={"budget": None, "parameters": parameters})

    def without_rank(self) -> "PackSettings":
        """The same without rank fraction and budget."""
        parameters = {k: v for k, v in self.parameters.items() if k != "rank_fraction"}
        return self.model_copy(update={"budget": None, "parameters": parameters})

    def without_budget(self) -> "PackSettings":
        """The same at the codec's own rank."""
        return self.model_copy(update={"budget": None})

    def codec(self) -> Codec:
        """The codec with its parameters, validated.

        Raises:
            MethodError: for an unknown codec or parameter, or a value out of range.
        """
        if self.method in MERGE_METHODS:
            raise MethodError(
                f"'{self.method}' merges models, it does not code them. To pack against a model "
                f"merged by it: vector: difference, reference: {self.method}."
            )
        return build(lookup(CODECS, self.method), self.parameters)

    def merge(self) -> tuple[MergeMethod, Parameters]:
        """The merge method of the reference with its parameters, validated.

        Raises:
            MethodError: for an unknown method or parameter, or a value out of range.
        """
        method = lookup(MERGE_METHODS, self.reference or "average")
        if method.needs == "adapters":
            raise MethodError(
                f"{method.name} merges LoRA adapters, which a difference pack is not made of. "
                "Name another reference, such as average or ties."
            )
        return method, build(method, self.reference_parameters)


class PackRecipe(Strict):
    """A family and how to pack it, as read from YAML.

    Attributes:
        base: Path or hub id; None if there is none.
        experts: Task name to path or hub id.
        settings: How to pack.
        characteristics: Task name to class names or a description, of experts that have any.
    """

    base: str | None
    experts: dict[str, str]
    settings: PackSettings
    characteristics: dict[str, tuple[str, ...]] = {}


class _Expert(Strict):
    model: str = Field(min_length=1)
    name: str | None = None
    describe: str | list[str] = []


class _Reference(Strict):
    merge_method: str | None = None
    parameters: dict[str, Any] = {}


class _File(Strict):
    pack_method: str = "dts"
    base_model: str | None = None
    models: list[_Expert]
    parameters: dict[str, Any] = {}
    budget: Budget = None
    counting: Counting = "on_disk_native"
    vector: Vector = "task"
    reference: _Reference = _Reference()
    skip: list[str] = []
    private: list[str] = []


_NESTED: dict[str, type[BaseModel]] = {"models": _Expert, "reference": _Reference}


def read_recipe(path: Path) -> PackRecipe:
    """Read and validate a pack recipe; opens no checkpoint.

    Raises:
        RecipeError: listing every fault of the file.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"The recipe {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"The recipe {path} is no valid YAML: {yaml_fault(error)}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"The recipe {path} holds no settings; see recipes/ for examples.")
    if "merge_method" in content and "pack_method" not in content:
        raise RecipeError(
            f"The recipe {path} merges (merge_method), it does not pack. Run personae merge with "
            "it, or write pack_method."
        )
    try:
        file = _File.model_validate(content)
        settings = PackSettings(
            method=file.pack_method,
            parameters=file.parameters,
            budget=file.budget,
            counting=file.counting,
            vector=file.vector,
            reference=file.reference.merge_method,
            reference_parameters=file.reference.parameters,
            skip=tuple(file.skip),
            private=tuple(file.private),
        )
    except ValidationError as error:
        raise RecipeError(f"The recipe {path} is wrong. {faults_of(error, _File)}") from error
    experts = _named(file.models, path)
    said = {
        name: (entry.describe,) if isinstance(entry.describe, str) else tuple(entry.describe)
        for name, entry in zip(experts, file.models, strict=True)
        if entry.describe
    }
    return PackRecipe(
        base=file.base_model, experts=experts, settings=settings, characteristics=said
    )


def settings_from(options: Mapping[str, Any]) -> PackSettings:
    """Settings from loose options, with every fault in one error.

    Raises:
        RecipeError: naming unknown options and values that cannot be.
    """
    try:
        return PackSettings(**options)
    except ValidationError as error:
        raise RecipeError(faults_of(error, PackSettings)) from error


def faults_of(error: ValidationError, model: type[BaseModel]) -> str:
    """Every fault of a validation, a sentence each, with the nearest name for unknown keys."""
    faults = Faults()
    for fault in faults_in(error, model, _NESTED):
        faults.add(fault.text)
    return " ".join(faults.messages)


def parse_size(text: str, *, percent: bool = False) -> float | int:
    """Read '1%' as the fraction 0.01 (float) and '900KB', '1.5GiB' as bytes (int).

    Raises:
        ValueError: if the text is neither, or not above zero.
    """
    plain = text.strip().replace(" ", "").replace("_", "")
    number = plain.rstrip("%ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
    unit = plain[len(number) :]
    try:
        value = float(number)
    except ValueError:
        value = 0.0
    if value > 0 and unit == "%" and percent:
        return value / 100
    if unit.upper() in _UNITS and value * _UNITS[unit.upper()] >= 1:
        return int(value * _UNITS[unit.upper()])
    kinds = "'1%', '900KB' or '1.5MiB'" if percent else "'900MB' or '2GiB'"
    raise ValueError(f"'{text}' is no size of a byte or more. Write {kinds}.")


def _named(models: list[_Expert], path: Path) -> dict[str, str]:
    experts: dict[str, str] = {}
    for entry in models:
        name = entry.name or name_of(entry.model)
        if name in experts:
            raise RecipeError(
                f"The recipe {path} has two models named '{name}'. Give each its own 'name'."
            )
        experts[name] = entry.model
    return experts
