"""How models shall be merged: method, parameters, what comes out. YAML in mergekit's shape."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any

from pydantic import Field, StrictFloat, StrictInt

from personae.checkpoints.naming import matches
from personae.errors import Faults, MethodError, RecipeError, nearest
from personae.family.chat_templates import template_fault
from personae.family.layers import Layers
from personae.family.vocabularies import TokenRow, VocabularyChoice
from personae.methods import (
    CODECS,
    METHODS_BY_CONVENTIONS,
    Conventions,
    MergeMethod,
    build,
    lookup,
)
from personae.recipe._base import Convention, Dtype, Output, Size, Strict, Vector
from personae.recipe._faults import Fault
from personae.recipe._parameters import GivenParameters
from personae.recipe._settings import Settings
from personae.recipe._values import Values, filters_of, fits, is_gradient, is_scalar
from personae.recipe.mergekit import refuse_mergekit_alone
from personae.recipe.ranks import Ranks, ranks_asked


class MergeSettings(Settings):
    """How to merge: method, parameters and all else that a recipe says, but the models.

    A parameter is a scalar; or a list of numbers, a gradient over the layers; or a list of
    `{filter, value}`, of which the first entry whose filter matches the tensor's name applies.
    """

    method: str = Field(default="average", description="Merge method")
    conventions: Convention = Field(
        default="papers", description="Whose algorithm a name means, where mergekit's differs"
    )
    parameters: Values = Field(default={}, description="The method's parameters")
    expert_parameters: tuple[Values, ...] = Field(
        default=(),
        description="The same for each expert, in their order; used instead of `parameters`",
    )
    dtype: Dtype | None = Field(
        default=None, description="Dtype of the output; by default the base's"
    )
    tokenizer_source: str | None = Field(
        default=None, description="Vocabulary of the output: 'base', 'union' or an expert's name"
    )
    tokens: dict[str, TokenRow] = Field(
        default={}, description="Tokens whose rows come from somewhere else than their own models"
    )
    pad_to_multiple_of: Annotated[int, Field(gt=0)] | None = Field(
        default=None, description="What the rows of the vocabulary are made a multiple of"
    )
    chat_template: str | None = Field(
        default=None, description="'auto', the name of a chat template, or its text"
    )
    skip: tuple[str, ...] = Field(default=(), description="Patterns of tensors left as in the base")
    only: tuple[str, ...] = Field(default=(), description="Patterns of tensors merged, if not all")
    vector: Vector = "task"
    output: Output = Field(
        default="model", description="What is written: a model, or of adapters an adapter"
    )
    rank: StrictInt | None = Field(default=None, description="Rank of an adapter")
    energy: StrictFloat | None = Field(
        default=None, description="In place of a rank: share of each squared norm to keep"
    )
    budget: Size | None = Field(
        default=None, description="In place of a rank: bytes of the adapter's weights file at most"
    )
    max_rank: StrictInt | None = Field(
        default=None, description="Bound on the ranks that are chosen"
    )
    rank_pattern: bool = Field(default=False, description="Gives each module a rank of its own")
    layers: Layers | None = Field(
        default=None, description="Which layers are merged, as a slice says; by default all"
    )

    @classmethod
    def of(cls, method: MergeMethod, experts: int, **rest: Any) -> "MergeSettings":
        """The settings of a method with its parameters.

        Args:
            method: The method; parameters that are one an expert become the experts' own.
            experts: How many there are.
            **rest: All else, by the names of these settings.

        Raises:
            RecipeError: if parameters are not one an expert.
        """
        faults, given = Faults(), method.model_dump(by_alias=True)
        method.check_experts(experts, faults, has_base=None)
        faults.raise_if_any(RecipeError)
        owns = {name: value for name, value in given.items() if isinstance(value, tuple)}
        return cls(
            method=method.name,
            conventions=method.conventions,
            parameters={name: value for name, value in given.items() if name not in owns},
            expert_parameters=tuple(
                {name: value[n] for name, value in owns.items()} for n in range(experts)
            )
            if owns
            else (),
            **rest,
        )

    def merge_method(self) -> type[MergeMethod]:
        """The method of this name under these conventions.

        Raises:
            MethodError: if there is none; the text suggests the nearest.
        """
        return find_method(self.method, self.conventions)

    def vocabulary(self) -> VocabularyChoice:
        """The vocabulary that shall come out; mergekit leaves out rows after the last token."""
        return VocabularyChoice(
            self.tokenizer_source,
            self.tokens,
            self.pad_to_multiple_of,
            cut=self.conventions == "mergekit",
        )

    def for_tensor(self, name: str, layers: int, experts: int) -> MergeMethod:
        """The method with its parameters at one tensor; the same object wherever they are the same.

        Args:
            name: The tensor's.
            layers: How many layers are merged, as `count_layers` tells.
            experts: How many experts are merged.

        Raises:
            MethodError: naming every fault at once.
        """
        values = self.parameters
        if self.expert_parameters or not all(map(is_scalar, values.values())):
            first = self.layers.first if self.layers else None
            values = self._parameters().at(name, layers, experts, first)
        has_base = self.vector == "task"
        return _build(self.method, self.conventions, experts, has_base, tuple(values.items()))

    def check(self, experts: Sequence[str]) -> None:
        """Find every fault that can be known without a tensor.

        Args:
            experts: Their names, in order.

        Raises:
            RecipeError: naming them all.
        """
        faults = Faults()
        for fault in self.faults(experts):
            faults.add(fault.text)
        faults.raise_if_any(RecipeError)

    def faults(self, experts: Sequence[str]) -> list[Fault]:
        """Every fault that `check` would raise, each with its place in these settings."""
        faults: list[Fault] = []
        if not experts:
            faults.append(Fault(("experts",), "There is no expert to merge. Give at least one."))
        known = ("base", "union", *experts)
        if self.tokenizer_source is not None and self.tokenizer_source not in known:
            text = f"There is no vocabulary '{self.tokenizer_source}'. "
            hint = nearest(self.tokenizer_source, known)
            faults.append(Fault(("tokenizer_source",), text + hint))
        for token, row in self.tokens.items():
            models = ("base", *experts)
            if row.model is not None and row.model not in models:
                text = f"There is no model '{row.model}'. {nearest(row.model, models)}"
                faults.append(Fault(("tokens", token), text))
        wrong = template_fault(self.chat_template) if self.chat_template else ""
        if wrong:
            faults.append(Fault(("chat_template",), wrong))
        try:
            method = self.merge_method()
        except MethodError as error:
            return [*faults, Fault(("method",), str(error))]
        if self.vector == "difference":
            faults += _base_faults(method, self.tokenizer_source, experts)
        faults += self._adapter_faults(method)
        return [*faults, *self._parameters().faults(experts)]

    def ranks(self) -> Ranks:
        """How the ranks of an adapter are chosen."""
        return self._ranks()[0]

    def _ranks(self) -> tuple[Ranks, list[Fault]]:
        return ranks_asked(self.rank, self.energy, self.budget, self.max_rank, self.rank_pattern)

    def _adapter_faults(self, method: type[MergeMethod]) -> Iterator[Fault]:
        """What is wrong with what is said of an adapter, and of a model where one comes out."""
        yield from self._ranks()[1]
        if self.output == "model":
            for name in ("rank", "energy", "budget", "max_rank", "rank_pattern"):
                if getattr(self, name):
                    text = f"{name} is about adapters: write 'output: adapter', or leave it out."
                    yield Fault((name,), text)
            return
        for name in ("tokenizer_source", "tokens", "chat_template"):
            if getattr(self, name):
                text = "An adapter has the vocabulary of its base: leave this out, or output."
                yield Fault((name,), text)
        if self.vector == "difference":
            text = "An adapter holds task vectors: leave vector out, or output."
            yield Fault(("vector",), text)
        if method.needs in ("models", "experts"):
            text = (
                f"{method.name} merges models, and what it changes of the base is no adapter. Take "
                "a method of task vectors (such as task_arithmetic or ties), or leave output out."
            )
            yield Fault(("method",), text)

    @property
    def notes(self) -> list[str]:
        """What a person should be told about these settings, a line each."""
        method = self.merge_method()
        notes: list[str] = []
        if self.vector == "difference" and method.degenerates:
            notes.append(f"Without a base, {method.name} amounts to {method.degenerates}.")
        for name, value in self.parameters.items():
            if name in self._parameters().per_expert and is_gradient(value):
                notes.append(
                    f"{name} = {value} is read as a gradient from the first layer to the last. "
                    "Values for each expert go under its model."
                )
        return notes

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """Patterns and filters that fit none of these tensor names, each with where it stands."""
        names = list(names)
        patterns = [("skip", p) for p in self.skip] + [("only", p) for p in self.only]
        found = [
            f"{place}: {pattern}"
            for place, pattern in patterns
            if not any(matches(name, (pattern,)) for name in names)
        ]
        for source in (self.parameters, *self.expert_parameters):
            for parameter, value in source.items():
                found += [
                    f"{parameter}: {pattern}"
                    for pattern in filters_of(value)
                    if not any(fits(pattern, name) for name in names)
                ]
        return list(dict.fromkeys(found))

    def _parameters(self) -> GivenParameters:
        return GivenParameters(
            self.merge_method(),
            self.parameters,
            self.expert_parameters,
            has_base=self.vector == "task",
        )


class MergePart(Strict):
    """A family and how to merge it: all of a merge, or one slice of its layers.

    Attributes:
        base: Path, hub id, module or state dict of the base; None for difference vectors.
        experts: Name to the same of the expert, in order.
        settings: How to merge them.
    """

    base: Any
    experts: Mapping[str, Any]
    settings: MergeSettings


class MergeRecipe(Strict):
    """Families and how to merge them, as read from YAML.

    Attributes:
        parts: What is merged: the slices of a model in their order, or one family. Models are as
            they are opened from the working directory.
        text: The file as it was read.
        remarks: What was read otherwise than it stands there, a line each.
        small_files: The model whose configuration and tokenizer the output has; by default the
            first part's base, or its first expert.
        name: What other documents of the file call what it gives; None for the output.
    """

    parts: tuple[MergePart, ...]
    text: str
    remarks: tuple[str, ...] = ()
    small_files: str | None = None
    name: str | None = None

    @property
    def models(self) -> list[str]:
        """Every model it is merged from, and that of the small files."""
        found = [model for part in self.parts for model in (part.base, *part.experts.values())]
        return [model for model in (*found, self.small_files) if isinstance(model, str)]

    @property
    def base(self) -> str | None:
        """The base of the one part, or the first."""
        return self.parts[0].base

    @property
    def experts(self) -> Mapping[str, str]:
        """The experts of the one part, or the first."""
        return self.parts[0].experts

    @property
    def settings(self) -> MergeSettings:
        """How the one part is merged, or the first."""
        return self.parts[0].settings

    @property
    def notes(self) -> list[str]:
        """What a person should be told, a line each."""
        notes = [note for part in self.parts for note in part.settings.notes]
        return list(dict.fromkeys([*self.remarks, *notes]))


def methods_under(conventions: Conventions) -> Mapping[str, type[MergeMethod]]:
    """Every method under these conventions: theirs, and of ours what they do not have."""
    return {**METHODS_BY_CONVENTIONS["papers"], **METHODS_BY_CONVENTIONS[conventions]}


def find_method(name: str, conventions: Conventions) -> type[MergeMethod]:
    """The merge method of this name.

    Raises:
        MethodError: if there is none; the text suggests the nearest.
    """
    own = METHODS_BY_CONVENTIONS[conventions].get(name)
    if own is not None:
        return own
    if name in CODECS:
        raise MethodError(
            f"'{name}' is a codec, not a merge method. To pack with it, write pack_method."
        )
    refuse_mergekit_alone(name)
    return lookup(methods_under(conventions), name)


@lru_cache(maxsize=4096)
def _build(
    method: str,
    conventions: Conventions,
    experts: int,
    has_base: bool,
    values: tuple[tuple[str, Any], ...],
) -> MergeMethod:
    """A method with validated parameters, made once for all tensors at which they are the same.

    Raises:
        MethodError: naming every fault, tuples that are not one an expert among them.
    """
    built = build(find_method(method, conventions), dict(values))
    faults = Faults()
    built.check_experts(experts, faults, has_base=has_base)
    faults.raise_if_any(MethodError)
    return built


def _base_faults(
    method: type[MergeMethod], tokenizer_source: str | None, experts: Sequence[str]
) -> list[Fault]:
    faults: list[Fault] = []
    if method.needs == "base":
        text = f"{method.name} needs a base. Give base_model, without vector: difference."
        faults.append(Fault(("vector",), text))
    if method.needs == "adapters":
        text = f"{method.name} merges LoRA adapters, which need their base. Give base_model."
        faults.append(Fault(("vector",), text))
    if tokenizer_source == "base" and [*experts][:1] != ["base"]:  # it is averaged as the first
        text = (
            "There is no base whose vocabulary the output could have. Name an expert, or 'union'."
        )
        faults.append(Fault(("tokenizer_source",), text))
    return faults
