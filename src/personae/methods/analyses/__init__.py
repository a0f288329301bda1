"""Analyses of the DRM paper: what a family's task vectors look like, one linear layer at a time.

Each is a pure function of the stacked task vectors of one tensor; its keyword-only arguments are
its parameters.
"""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import Field, create_model

from personae.methods._method import Parameters
from personae.methods._registry import summary_of
from personae.methods.analyses._findings import Findings
from personae.methods.analyses.dropped_percentage import dropped_percentage
from personae.methods.analyses.rank_drop import rank_drop
from personae.methods.analyses.sign_agreement import sign_agreement
from personae.methods.analyses.singular_value_bound import singular_value_bound


@dataclass(frozen=True)
class Analysis:
    """An analysis under its name.

    Attributes:
        name: As it is asked for.
        summary: One line.
        parameters: Their model.
        function: `function(stack, **parameters)`.
        headlines: The few numbers that a table shows, as `headline` finds them.
    """

    name: str
    summary: str
    parameters: type[Parameters]
    function: Callable[..., Findings]
    headlines: tuple[str, ...]


def _analysis(function: Callable[..., Findings], *headlines: str) -> Analysis:
    name = function.__name__
    parameters = _parameters(function, name)
    return Analysis(name, summary_of(function), parameters, function, headlines)


def _parameters(function: Callable[..., Findings], name: str) -> type[Parameters]:
    """The keyword-only arguments of a function as a model of typed parameters."""
    meanings = _argument_texts(function)
    fields: dict[str, Any] = {
        argument.name: (
            argument.annotation,
            Field(argument.default, description=meanings.get(argument.name)),
        )
        for argument in inspect.signature(function).parameters.values()
        if argument.kind is inspect.Parameter.KEYWORD_ONLY
    }
    model = create_model(f"{name}_parameters", __base__=Parameters, **fields)
    model.name = name
    return model


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


def headline(findings: Findings, place: str) -> float:
    """A number in findings: keys joined by dots, the last one maybe `name[index]` of a list."""
    found: Any = findings
    for key in place.split("."):
        name, _, index = key.removesuffix("]").partition("[")
        found = found[name][int(index)] if index else found[name]
    return float(found)


_SPACES = ("original", "joint", "projected")

ANALYSES = {
    analysis.name: analysis
    for analysis in (
        _analysis(
            sign_agreement,
            *(f"{space}.{which}" for space in _SPACES for which in ("agreement", "random")),
        ),
        _analysis(dropped_percentage, "renormalised.spread", "as_is.spread"),
        _analysis(singular_value_bound, "largest_deviation", "largest_share"),
        _analysis(rank_drop, "rank_tolerance_energy", "energy[5]", "change[5]", "change[8]"),
    )
}
"""Every analysis, by name."""

__all__ = ["ANALYSES", "Analysis", "Findings", "headline"]
