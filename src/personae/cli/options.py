"""Options that several commands share, and how their texts become settings."""

from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from personae.cli import console
from personae.errors import Faults, RecipeError
from personae.execute.work import Progress, Work
from personae.recipe import PackRecipe, PackSettings, parse_size, read_recipe, settings_from

Base = Annotated[
    str | None, typer.Option("--base", "-b", help="The base: a path or a hub id (org/name@rev).")
]
Experts = Annotated[
    list[str] | None,
    typer.Option(
        "--expert", "-e", metavar="NAME=PATH", help="An expert (path or hub id); repeat for each."
    ),
]
Workers = Annotated[
    int | None,
    typer.Option("--workers", min=1, help="Tensors worked on at once; by default one a core."),
]
Memory = Annotated[
    str | None, typer.Option("--memory", metavar="SIZE", help="Bound on working memory, as 2GiB.")
]
Device = Annotated[
    str,
    typer.Option(
        "--device", help="auto, cpu or cuda[:i]; a GPU's results may differ in the last bits."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print facts as JSON on standard output.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]


def work_from(workers: int | None, memory: str | None, progress: Progress, device: str) -> Work:
    """How to work, from options.

    Raises:
        RecipeError: if the memory bound is no size, or the device is not here.
    """
    bound = bytes_of("--memory", memory)
    work = Work(workers=workers, memory=bound, device=device, progress=progress, note=console.note)
    assert work.torch_device
    return work


def bytes_of(option: str, size: str | None) -> int | None:
    """A size such as 2GiB in bytes.

    Raises:
        RecipeError: if the text is no size.
    """
    if size is None:
        return None
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
        return {key: yaml.safe_load(value) for key, value in texts.items()}
    except yaml.YAMLError as error:
        raise RecipeError(f"{option}: write a number, true, false or a word: {error}") from error


def gather_recipe(
    recipe: Path | None, base: str | None, experts: list[str] | None, options: dict[str, Any]
) -> PackRecipe:
    """What to pack: the recipe, with whatever the options say on top of it.

    Args:
        recipe: A YAML file, or None.
        base: Replaces the recipe's base.
        experts: `NAME=PATH` texts; replace the recipe's experts.
        options: Settings; those that are None leave the recipe's.

    Raises:
        RecipeError: for a bad recipe or option.
    """
    read = (
        read_recipe(recipe)
        if recipe
        else PackRecipe(base=None, experts={}, settings=PackSettings())
    )
    given = {key: value for key, value in options.items() if value not in (None, {}, [])}
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
