"""personae pack: code a family of experts against one reference."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from personae.cli import console, options
from personae.cli.inspect import print_pack
from personae.cli.texts import described
from personae.commands.describe import describe as describe_tasks
from personae.commands.inspect import inspect_pack
from personae.commands.pack import add_tasks, pack_many, remove_task
from personae.commands.packed import Pack
from personae.errors import RecipeError
from personae.recipe import PackRecipe, PackSettings, settings_from
from personae.run.work import Work

_WORK = ("workers", "memory", "device")
_PACKING = ("recipe", "base", "experts", *options.CODING, "overwrite", *_WORK)
_BESIDE_REMOVE = (
    "--remove works with --out only: leave out {}.",
    ("add", "describe", *_PACKING),
)
_BESIDE_DESCRIBE = (
    "--describe without an expert describes tasks that are in the pack: leave out {}. To pack, "
    "give --expert NAME=PATH.",
    _PACKING,
)
_BESIDE_ADD = (
    "--add takes codec, ranks and reference from the pack, and replaces nothing: leave out {}. "
    "It needs --expert, --out and, if the reference has moved, --base.",
    ("recipe", *options.CODING, "overwrite"),
)


def pack(
    context: typer.Context,
    recipe: Annotated[Path | None, typer.Argument(help="A recipe; options override it.")] = None,
    base: options.Base = None,
    experts: options.Experts = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The pack's directory.")] = None,
    method: options.Method = None,
    rank_fraction: Annotated[
        list[float] | None,
        typer.Option(
            "--rank-fraction",
            "-r",
            metavar="FRACTION",
            help="Fraction of singular directions kept; repeat for a sweep.",
        ),
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(metavar="SIZE", help="What a task may cost: 1% or 900KB; repeat for a sweep."),
    ] = None,
    counting: options.Counting = None,
    vector: options.Vector = None,
    reference: options.Reference = None,
    set_: options.Set = None,
    reference_set: options.ReferenceSet = None,
    skip: options.Skip = None,
    private: options.Private = None,
    describe: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=TEXT",
            help="What a task is about: class names separated by commas, a sentence, or @FILE "
            "with one text per line; by default the class names in its config. Repeatable. "
            "With --out alone: for tasks that are in the pack.",
        ),
    ] = None,
    add: Annotated[
        bool, typer.Option("--add", help="Add the experts to the pack in --out.")
    ] = False,
    remove: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Remove a task from the pack in --out; repeatable."),
    ] = None,
    overwrite: options.Overwrite = False,
    workers: options.Workers = None,
    memory: options.Memory = None,
    device: options.Device = "cpu",
    json: options.Json = False,
) -> None:
    """Pack experts fine-tuned from one base: a small file each, from which each is rebuilt.

    Several --rank-fraction or --budget share one decomposition; each gets a pack below --out.
    """
    if out is None:
        raise RecipeError("Say where the pack goes: --out DIR.")
    found: dict[str, Any] = {}
    if remove:
        options.refuse_unused(context, _BESIDE_REMOVE)
        packs = [_remove(out, remove)]
    elif describe and not (experts or recipe or add):
        options.refuse_unused(context, _BESIDE_DESCRIBE)
        packs = [describe_tasks(out, described(describe))]
    elif add:
        options.refuse_unused(context, _BESIDE_ADD)
        about, added = described(describe or []), options.named(experts, "--expert")
        with options.working(workers, memory, device) as work:
            work = replace(work, fact=found.__setitem__)
            packs = [add_tasks(out, added, base=base, characteristics=about, work=work)]
    else:
        about, read = described(describe or []), options.recipe_from(recipe)
        asked: dict[str, Any] = {
            "method": method,
            "counting": counting,
            "vector": vector,
            "reference": reference,
            "parameters": options.values(set_, "--set"),
            "reference_parameters": options.values(reference_set, "--reference-set"),
            "skip": skip,
            "private": private,
        }
        if budget and "rank_fraction" in asked["parameters"]:
            raise RecipeError("A budget sets the rank: give budget or rank_fraction, not both.")
        budgeted = bool(budget or (read.settings.budget and not rank_fraction))
        options.refuse_unused(context, *options.unused_coding(asked["parameters"], budgeted))
        gathered = options.overridden(read, base, experts, asked)
        outs = _variants(out, gathered, rank_fraction or [], budget or [])
        with options.working(workers, memory, device) as work:
            work = replace(work, fact=found.__setitem__)
            packs = _make(gathered, outs, about, overwrite, work)
    _show(packs, found, json)


def _make(
    recipe: PackRecipe,
    outs: dict[str | Path, PackSettings],
    about: dict[str, tuple[str, ...]],
    overwrite: bool,
    work: Work,
) -> list[Pack]:
    if recipe.base is None and recipe.settings.vector == "task":
        raise RecipeError(
            "Give the model that the experts were fine-tuned from: --base PATH. To pack without "
            "a base, use differences from the experts' average: --vector difference."
        )
    return pack_many(
        recipe.base,
        recipe.experts,
        outs,
        characteristics=recipe.characteristics | about,
        overwrite=overwrite,
        work=work,
    )


def _variants(
    out: Path, recipe: PackRecipe, fractions: list[float], budgets: list[str]
) -> dict[str | Path, PackSettings]:
    """One pack in `out`, or one below it for each rank fraction and budget."""
    settings = recipe.settings

    def at(fraction: float) -> PackSettings:
        parameters = settings.parameters | {"rank_fraction": fraction}
        return settings.model_copy(update={"parameters": parameters, "budget": None})

    chosen = {f"rank-fraction-{fraction:g}": at(fraction) for fraction in fractions}
    for size in budgets:
        name = f"budget-{size.replace('%', '-percent')}"
        chosen[name] = settings_from(settings.without_rank().model_dump() | {"budget": size})
    if len(chosen) > 1:
        return {out / name: setting for name, setting in chosen.items()}
    return {out: next(iter(chosen.values()), settings)}


def _remove(out: Path, names: list[str]) -> Pack:
    opened = Pack(out)
    for name in names:
        opened.task(name)
    for name in names:
        opened = remove_task(out, name)
    return opened


def _show(packs: list[Pack], found: dict[str, Any], json: bool) -> None:
    described = [inspect_pack(pack) for pack in packs]
    for facts, unchanged in zip(described, found.get("unchanged", []), strict=False):
        facts["unchanged"] = unchanged
    if json:
        console.facts(described[0] if len(described) == 1 else described)
        return
    for facts in described:
        print_pack(facts, uncoded=False)  # a note has told it
