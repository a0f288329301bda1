"""What a pack shall be: codec, reference, budget."""

from collections.abc import Mapping
from typing import Annotated, Any, get_args

from pydantic import BeforeValidator, Field, model_validator

from personae.errors import Faults, MethodError
from personae.methods import CODECS, MERGE_METHODS, Codec, MergeMethod, build, lookup
from personae.packs.manifest import Counting, Rule
from personae.recipe._base import Strict, Vector
from personae.recipe._settings import Settings
from personae.recipe._sizes import parse_size

COUNTING: tuple[Rule, ...] = get_args(Rule)


def _budget_reads(value: object) -> str | None:
    if value is not None:
        parse_size(str(value), percent=True)
    return None if value is None else str(value)


Budget = Annotated[str | None, BeforeValidator(_budget_reads)]


class PackSettings(Settings):
    """How to pack: codec, parameters and all else that a recipe says, but the models."""

    method: str = Field(default="dts", description="Codec")
    parameters: dict[str, Any] = Field(default={}, description="The codec's parameters")
    budget: Budget = Field(default=None, description="Size a task may cost: '1%' or '900KB'")
    counting: Counting = Field(default="on_disk_native", description="Rule a budget is counted by")
    vector: Vector = "task"
    reference: str | None = Field(
        default=None, description="Merge method of a difference pack; by default average"
    )
    reference_parameters: dict[str, Any] = Field(default={})
    skip: tuple[str, ...] = Field(default=(), description="Patterns of tensors to leave out")
    private: tuple[str, ...] = Field(default=(), description="Patterns of tensors to keep whole")

    @classmethod
    def of(
        cls, codec: Codec, *, reference: MergeMethod | None = None, **rest: Any
    ) -> "PackSettings":
        """The settings of a codec with its parameters.

        Args:
            codec: The codec; with a budget its rank fraction is what the budget allows.
            reference: The merge method of a difference pack; by default the average.
            **rest: All else, by the names of these settings.
        """
        parameters = codec.model_dump(mode="json", by_alias=True)
        if rest.get("budget") is not None:
            parameters.pop(codec.by_budget, None)
        if reference is not None:
            rest["reference"] = reference.name
            rest["reference_parameters"] = reference.model_dump(mode="json", by_alias=True)
        return cls(method=codec.name, parameters=parameters, **rest)

    @model_validator(mode="after")
    def _one_rank(self) -> "PackSettings":
        if self.budget is not None and self._by_budget in self.parameters:
            what = "the rank" if self._by_budget == "rank_fraction" else f"the {self._by_budget}"
            raise ValueError(f"a budget sets {what}: give budget or {self._by_budget}, not both")
        return self

    @model_validator(mode="after")
    def _reference_is_used(self) -> "PackSettings":
        if self.vector == "task" and (self.reference or self.reference_parameters):
            raise ValueError("a merged reference needs vector: difference (--vector difference)")
        return self

    @property
    def _by_budget(self) -> str:
        """The parameter that a budget sets."""
        codec = CODECS.get(self.method)
        return codec.by_budget if codec else "rank_fraction"

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
        budget = None if codec.by_budget in {"", *codec.free} else self.budget
        return self.model_copy(update={"budget": budget, "parameters": parameters})

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
                f"'{self.method}' is a merge method, not a codec. To pack against a model that it "
                f"merged: vector: difference, reference: {self.method}."
            )
        codec = build(lookup(CODECS, self.method), self.parameters)
        if self.budget is not None and not codec.by_budget:
            able = [name for name, entry in CODECS.items() if entry.by_budget]
            raise MethodError(
                f"{self.method} has no parameter that a budget could set. Leave the budget out, or "
                f"pack by {', '.join(able[:-1])} or {able[-1]}."
            )
        return codec

    def merge(self, experts: int, *, has_base: bool = True) -> MergeMethod:
        """The merge method of the reference with its parameters, validated for so many experts.

        Raises:
            MethodError: for an unknown method or parameter, or a value out of range.
        """
        method = lookup(MERGE_METHODS, self.reference or "average")
        if method.needs == "adapters":
            raise MethodError(
                f"{method.name} merges LoRA adapters, which difference packs do not support. Name "
                "another reference, such as average or ties."
            )
        built = build(method, self.reference_parameters)
        faults = Faults()
        built.check_experts(experts, faults, has_base=has_base)
        faults.raise_if_any(MethodError)
        return built


class PackRecipe(Strict):
    """A family and how to pack it, as read from YAML.

    Attributes:
        base: Path from the working directory, or hub id; None if there is none.
        experts: Task name to path or hub id.
        settings: How to pack.
        characteristics: Task name to class names or a description, of experts that have any.
    """

    base: str | None
    experts: dict[str, str]
    settings: PackSettings
    characteristics: dict[str, tuple[str, ...]] = Field(default={})


def settings_from(options: Mapping[str, Any]) -> PackSettings:
    """Settings from loose options, with every fault in one error.

    Raises:
        RecipeError: naming unknown options and values that cannot be.
    """
    return PackSettings(**options)
