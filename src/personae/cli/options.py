"""Options that several commands share, how their texts become settings, which go together."""

from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from personae._small_files import Unfit, parse_yaml_value
from personae.cli import console
from personae.errors import Faults, RecipeError
from personae.recipe import (
    COUNTING,
    PackRecipe,
    PackSettings,
    parse_size,
    read_recipe,
    settings_from,
)
from personae.run.work import Work

Base = Annotated[
    str | None,
    typer.Option(
        "--base", "-b", metavar="PATH", help="The base: a path or a hub id (org/name@rev)."
    ),
]
AnswerCache = Annotated[
    Path | None,
    typer.Option(
        "--cache",
        help="Directory of answers that are known already.",
        show_default="~/.cache/personae/eval",
    ),
]
Experts = Annotated[
    list[str] | None,
    typer.Option(
        "--expert", "-e", metavar="NAME=PATH", help="An expert (path or hub id); repeat for each."
    ),
]
Method = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Codec; see 'personae methods'.", show_default="dts"),
]
Counting = Annotated[
    str | None,
    typer.Option(
        metavar="RULE",
        help=f"How a budget is counted: {', '.join(COUNTING)}.",
        show_default="on_disk_native",
    ),
]
Vector = Annotated[
    str | None,
    typer.Option(
        metavar="KIND",
        help="task (from the base) or difference (from a merged model).",
        show_default="task",
    ),
]
Reference = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Merge method of a difference pack.", show_default="average"),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A parameter of the codec; repeatable."),
]
ReferenceSet = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="A parameter of the merge method; repeatable."),
]
Skip = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Tensors to leave out; repeatable."),
]
Private = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Tensors to keep whole; repeatable."),
]
ShardSize = Annotated[str, typer.Option(metavar="SIZE", help="Largest size of one weight file.")]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers", min=1, help="Tensors processed at the same time; by default one per core."
    ),
]
Memory = Annotated[
    str | None,
    typer.Option("--memory", metavar="SIZE", help="Upper bound on working memory, such as 2GiB."),
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="NAME",
        help="auto, cpu or cuda[:i]; a GPU's results may differ in the last bits.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print results as JSON on standard output.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]

CODING = (
    "method",
    "rank_fraction",
    "budget",
    "counting",
    "vector",
    "reference",
    "set_",
    "reference_set",
    "skip",
    "private",
)
"""Parameters of `pack` and `plan` that say how a family is coded."""

Case = tuple[str, Collection[str]]
"""Why options would do nothing, with {} where they are named; and their parameters."""


def refuse_unused(context: typer.Context, *cases: Case) -> None:
    """Refuse options that were given and would do nothing, all of them at once.

    Args:
        context: Of the command that runs.
        cases: What would do nothing in this run, and why.

    Raises:
        RecipeError: naming every such option.
    """
    spelt = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    faults = Faults()
    for why, unused in cases:
        assert spelt.keys() >= set(unused)
        given = [spelt[name] for name in unused if _is_given(context, name)]
        if given:
            words = [word if word.startswith("-") else f"the {word}" for word in given]
            faults.add(why.format(", ".join(words)))
    faults.raise_if_any(RecipeError)


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether a parameter is on the command line, be it with its default value."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def unused_coding(parameters: Mapping[str, Any], budgeted: bool) -> tuple[Case, Case]:
    """Cases of `refuse_unused` that `pack` and `plan` share.

    Args:
        parameters: Those that --set gives.
        budgeted: Whether there is a budget.
    """
    twice = "rank_fraction" in parameters
    return (
        (
            "{} is the rule of a budget: give --budget, or leave it out.",
            () if budgeted else ("counting",),
        ),
        (
            "{} and --set rank_fraction=… say the same: give one of them.",
            ("rank_fraction",) if twice else (),
        ),
    )


@contextmanager
def working(workers: int | None, memory: str | None, device: str = "cpu") -> Generator[Work]:
    """Yield how to work, with progress shown meanwhile.

    Raises:
        RecipeError: if the memory bound is no size, or the device is not here.
    """
    with console.progress() as progress:
        work = Work(
            workers=workers,
            memory=memory_from(memory),
            device=device,
            progress=progress,
            note=console.note,
        )
        assert work.torch_device
        yield work


def memory_from(memory: str | None) -> int | None:
    """The memory bound in bytes, if there is one.

    Raises:
        RecipeError: if it is no size.
    """
    return None if memory is None else bytes_of("--memory", memory)


def bytes_of(option: str, size: str) -> int:
    """A size such as 2GiB in bytes.

    Raises:
        RecipeError: if the text is no size.
    """
    try:
        return int(parse_size(size))
    except ValueError as error:
        raise RecipeError(f"{option}: {error}") from error


def named(pairs: list[str] | None, option: str, form: str = "NAME=PATH") -> dict[str, str]:
    """`NAME=PATH` texts (or of another `form`) as a mapping, in order.

    Raises:
        RecipeError: listing each text without '=' and each name given twice.
    """
    faults = Faults()
    found: dict[str, str] = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals or not name or not value:
            faults.add(f"{option} {pair}: write {form}.")
        elif name in found:
            faults.add(f"{option}: two are named '{name}'. Give each its own name.")
        found[name] = value
    faults.raise_if_any(RecipeError)
    return found


def values(pairs: list[str] | None, option: str) -> dict[str, Any]:
    """`KEY=VALUE` texts as typed values (numbers, true/false, words).

    Raises:
        RecipeError: if a text has another form.
    """
    texts = named(pairs, option, "KEY=VALUE")
    try:
        return {key: parse_yaml_value(value) for key, value in texts.items()}
    except Unfit as error:
        raise RecipeError(f"{option}: write a number, true, false or a word: {error}") from error


def recipe_from(recipe: Path | None) -> PackRecipe:
    """The pack recipe of a file; without one, a recipe that says nothing yet.

    Raises:
        RecipeError: for a bad recipe.
    """
    if recipe is None:
        return PackRecipe(base=None, experts={}, settings=PackSettings())
    return read_recipe(recipe)


def overridden(
    read: PackRecipe, base: str | None, experts: list[str] | None, asked: dict[str, Any]
) -> PackRecipe:
    """What to pack: the recipe, with whatever the options say on top of it.

    Args:
        read: The recipe.
        base: Replaces the recipe's base.
        experts: `NAME=PATH` texts; replace the recipe's experts.
        asked: Settings; those that are None or empty leave the recipe's.

    Raises:
        RecipeError: for a bad option.
    """
    given = {key: value for key, value in asked.items() if value not in (None, {}, [])}
    if "parameters" in given:
        given["parameters"] = {**read.settings.parameters, **given["parameters"]}
    merged = read.settings.model_dump() | given
    replaced = named(experts, "--expert")
    return PackRecipe(
        base=base or read.base,
        experts=replaced or read.experts,
        settings=settings_from(merged),
        characteristics={} if replaced else read.characteristics,
    )
