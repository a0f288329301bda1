"""What a suite says of a search: settings that stay, and parameters with the values to try."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from math import prod
from typing import Any, Literal, NamedTuple, get_args

from pydantic import Field, model_validator

from personae.errors import Faults, MethodError, PersonaeError, RecipeError, nearest
from personae.methods import build
from personae.recipe import MergeSettings, PackSettings
from personae.recipe._base import Strict
from personae.recipe._faults import Fault, Place
from personae.recipe._values import Values

MOST = 10_000
"""Values of a parameter, and combinations of a grid; more are a slip of the keyboard."""
Sampler = Literal["tpe", "random", "grid"]
SAMPLERS = get_args(Sampler)
_FORM = "a list of values, or {from, to, step}"
_KEYS = ("from", "to", "step")


class Span(NamedTuple):
    """Every number between two, which are among them."""

    low: float
    high: float


Choice = tuple[Any, ...] | Span
"""What a parameter may be: one of some values, or any number of a span."""


class SearchSettings(Strict):
    """The `search` of a suite."""

    merge: MergeSettings | None = None
    pack: PackSettings | None = None
    preset: str | None = None
    parameters: Values = Field(default={})

    @model_validator(mode="after")
    def _is_one(self) -> "SearchSettings":
        if (self.merge is None) == (self.pack is None):
            raise ValueError("a search is of one method: give merge or pack, with its method")
        return self

    @property
    def settings(self) -> MergeSettings | PackSettings:
        """What stays."""
        settings = self.merge or self.pack
        assert settings is not None
        return settings


class TuneSettings(SearchSettings):
    """A row of a suite whose parameters are searched before it is scored."""

    sampler: Sampler = "tpe"
    trials: int | None = Field(default=None, gt=0)
    seed: int = Field(default=0, ge=0, lt=2**32)


@dataclass(frozen=True)
class Search:
    """A method, and the values to try of its parameters.

    Attributes:
        settings: What stays.
        choices: Parameter to what it may be.
    """

    settings: MergeSettings | PackSettings
    choices: Mapping[str, Choice]

    def row(self, parameters: Mapping[str, Any]) -> MergeSettings | PackSettings:
        """The settings with these parameters."""
        return _with(self.settings, parameters)

    def fault(self, parameters: Mapping[str, Any], experts: Sequence[str]) -> str:
        """What is wrong with values that are sound one by one; empty if nothing."""
        return " ".join(_wrong(_with(self.settings, parameters), experts))


@dataclass(frozen=True)
class Tune:
    """A row that is searched first: the best of its trials is what is scored."""

    search: Search
    sampler: Sampler
    trials: int | None
    seed: int


def check_sampler(search: Search, sampler: str, trials: int | None) -> None:
    """Refuse a grid without an end, or with none that anybody would wait for.

    Raises:
        RecipeError: naming what to do.
    """
    if sampler != "grid":
        return
    if trials is not None:
        raise RecipeError("A grid tries every combination once: leave the number of trials out.")
    endless = [name for name, choice in search.choices.items() if isinstance(choice, Span)]
    if endless:
        raise RecipeError(
            f"{', '.join(endless)}: a grid needs a step, or a list of values. Give one, or take "
            "the sampler tpe or random."
        )
    count = prod(map(len, search.choices.values()))
    if count > MOST:
        raise RecipeError(
            f"The grid has {count:,} combinations; at most {MOST:,} are tried. Give fewer values, "
            "or take the sampler tpe or random."
        )


def no_validation(tasks: Sequence[str]) -> str:
    """That these tasks have nothing to choose on."""
    return (
        f"There is no validation split of {', '.join(tasks)}, and nothing else is chosen on. "
        "Declare one under the data of each: "
        "splits: {test: test, validation: {from: train, share: 0.1}}."
    )


def read_tune(
    said: TuneSettings, experts: Sequence[str], faults: list[Fault], place: Place
) -> Tune:
    """A row to be tuned; what is wrong with it is noted. See `read_search`."""
    search = read_search(said, experts, faults, place)
    try:
        check_sampler(search, said.sampler, said.trials)
    except RecipeError as error:
        faults.append(Fault((*place, "sampler"), str(error)))
    return Tune(search, said.sampler, said.trials, said.seed)


def read_search(
    said: SearchSettings,
    experts: Sequence[str],
    faults: list[Fault],
    place: Place = ("search",),
) -> Search:
    """The search with its presets; what is wrong with it is noted, in the place of the suite.

    Args:
        said: What the suite says.
        experts: Names of the models, in order.
        faults: Gets what is wrong.
        place: Where the suite says it.
    """
    settings = said.settings
    try:
        is_merge = isinstance(settings, MergeSettings)
        entry = settings.merge_method() if is_merge else type(settings.codec())
    except MethodError:
        entry = None
    wrong = _wrong(said.settings, experts)
    if wrong or entry is None:
        kind = "merge" if said.merge else "pack"
        faults += [Fault((*place, kind), text) for text in wrong]
        return Search(said.settings, {})
    choices: dict[str, Choice] = {}
    if said.preset is not None and said.preset not in PRESETS:
        text = f"Unknown preset '{said.preset}'. {nearest(said.preset, PRESETS)}"
        faults.append(Fault((*place, "preset"), text))
    elif said.preset is not None:
        choices |= _preset(said.preset, entry.name, entry.fields())
    for name, value in said.parameters.items():
        at = (*place, "parameters", name)
        if name in said.settings.parameters:
            text = f"{name} is both searched and given a value. Keep one."
            faults.append(Fault(at, text))
        try:
            choices[name] = _choice(name, value)
        except RecipeError as error:
            faults.append(Fault(at, str(error)))
    for name, choice in choices.items():
        found = Faults()
        for value in _tried(choice):
            try:
                build(entry, {name: value})
            except MethodError as error:
                found.take(error)
        faults += [Fault((*place, "parameters", name), text) for text in found.messages]
    if not choices and not said.parameters:
        text = f"Nothing is searched. Give parameters, each with {_FORM}."
        if said.preset in PRESETS:
            text = f"The preset {said.preset} has nothing to search for {entry.name}. " + text
        faults.append(Fault(place, text))
    return Search(said.settings, choices)


def _choice(name: str, given: Any) -> Choice:
    """What a parameter may be, by the suite.

    Raises:
        RecipeError: if it is neither values nor a span.
    """
    if isinstance(given, list) and given:
        odd = [value for value in given if isinstance(value, list | dict)]
        if odd:
            raise RecipeError(f"{name} = {odd[0]!r}: expected single values in the list.")
        kept = dict.fromkeys((type(value) is bool, value) for value in given)
        return _in_order([value for _, value in kept])
    if not isinstance(given, dict) or not given:
        raise RecipeError(f"{name} = {given!r}: expected {_FORM}.")
    for key in given:
        if key not in _KEYS:
            raise RecipeError(f"Unknown key '{key}' of {name}. {nearest(key, _KEYS)}")
    low, high, step = (given.get(key) for key in _KEYS)
    numbers = [value for value in given.values() if _is_number(value)]
    if low is None or high is None or len(numbers) < len(given):
        raise RecipeError(f"{name} = {given!r}: expected numbers from and to, with a step or none.")
    if high < low:
        raise RecipeError(f"{name} goes from {low} to {high}: expected from the smaller one.")
    if step is None:
        return Span(float(low), float(high)) if low < high else (low,)
    if step <= 0:
        raise RecipeError(f"{name} = {given!r}: expected a step above 0.")
    return _steps(name, low, high, step)


def _steps(name: str, low: int | float, high: int | float, step: int | float) -> tuple[Any, ...]:
    """The numbers of a range, as a person would write them: 1.1, not 1.1000000000000001.

    Raises:
        RecipeError: if there are too many.
    """
    start, end, by = (Decimal(str(number)) for number in (low, high, step))
    count = int((end - start) / by) + 1
    if count > MOST:
        raise RecipeError(
            f"{name} has {count:,} values; at most {MOST:,} are read. Make the step larger, or "
            "leave it out: then any number between the two is tried."
        )
    kind = int if all(isinstance(number, int) for number in (low, high, step)) else float
    return tuple(kind(start + by * n) for n in range(count))


def _in_order(values: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(sorted(values) if all(map(_is_number, values)) else values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e38


def _tried(choice: Choice) -> Iterator[Any]:
    """Values that tell whether all of a choice can be."""
    if isinstance(choice, Span):
        yield from choice
        yield choice.low + (choice.high - choice.low) * 0.381966  # no whole number
        return
    yield from choice


def _with(
    settings: MergeSettings | PackSettings, parameters: Mapping[str, Any]
) -> MergeSettings | PackSettings:
    return settings.model_copy(update={"parameters": settings.parameters | dict(parameters)})


def _wrong(settings: MergeSettings | PackSettings, experts: Sequence[str]) -> list[str]:
    """What is wrong with settings."""
    if isinstance(settings, MergeSettings):
        return [fault.text for fault in settings.faults(experts)]
    try:
        # Made anew, as a budget and the parameter that it sets exclude each other.
        PackSettings(**settings.model_dump()).codec()
        settings.merge(len(experts))
    except PersonaeError as error:
        return list(error.faults or (str(error),))
    return []


PRESETS: Mapping[str, Mapping[str, Mapping[str, Choice]]] = {
    "drm-paper": {
        "task_arithmetic": {"scale": _steps("scale", 0.1, 1.0, 0.1)},
        "": {
            "density": _steps("density", 0.1, 1.0, 0.1),
            "scale": _steps("scale", 0.8, 1.5, 0.1),
        },
    }
}
"""Name to the values that a paper searched, by method; of all others those under no name."""


def _preset(name: str, method: str, known: Mapping[str, Any]) -> dict[str, Choice]:
    """What a preset searches, of the parameters that the method has."""
    found = PRESETS[name].get(method, PRESETS[name][""])
    return {parameter: choice for parameter, choice in found.items() if parameter in known}
