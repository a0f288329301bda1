"""personae pack: code a family of experts against one reference."""

from pathlib import Path
from typing import Annotated, Any

import typer

from personae.cli import console, options
from personae.cli.inspect import print_pack
from personae.cli.texts import described
from personae.errors import RecipeError
from personae.execute.describe import describe as describe_tasks
from personae.execute.inspect import inspect_pack
from personae.execute.pack import add_tasks, pack_many, remove_task
from personae.packs.reader import Pack
from personae.recipe import PackRecipe, PackSettings, settings_from


def pack(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe; options override it.")] = None,
    base: options.Base = None,
    experts: options.Experts = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The pack's directory.")] = None,
    method: Annotated[
        str | None, typer.Option(help="Codec; see 'personae methods'.", show_default="dts")
    ] = None,
    rank_fraction: Annotated[
        list[float] | None,
        typer.Option("--rank-fraction", "-r", help="Singular directions kept; repeat for a sweep."),
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option("--budget", help="Size a task may cost: 1% or 900KB; repeat for a sweep."),
    ] = None,
    counting: Annotated[
        str | None,
        typer.Option(help="Rule of a budget: counted, counted_lean, on_disk_fp32, on_disk_native."),
    ] = None,
    vector: Annotated[
        str | None, typer.Option(help="task (from the base) or difference (from a merged model).")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="Merge method of a difference pack.", show_default="average")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A parameter of the codec; repeatable."),
    ] = None,
    reference_set: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="A parameter of the merge method; repeatable."),
    ] = None,
    skip: Annotated[
        list[str] | None, typer.Option(help="Pattern of tensors to leave out; repeatable.")
    ] = None,
    private: Annotated[
        list[str] | None, typer.Option(help="Pattern of tensors to keep whole; repeatable.")
    ] = None,
    describe: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=TEXT",
            help="What an expert is about: class names with commas between, a sentence, or @FILE "
            "with one text a line; by default its config's class names. Repeatable. Alone with "
            "--out: of tasks that are in the pack.",
        ),
    ] = None,
    add: Annotated[
        bool, typer.Option("--add", help="Add the experts to the pack in --out.")
    ] = False,
    remove: Annotated[
        list[str] | None, typer.Option(help="Remove a task from the pack in --out; repeatable.")
    ] = None,
    overwrite: options.Overwrite = False,
    workers: options.Workers = None,
    memory: options.Memory = None,
    device: options.Device = "cpu",
    json: options.Json = False,
) -> None:
    """Pack experts fine-tuned from one base: a small file each, from which each is rebuilt.

    Several --rank-fraction or --budget share one decomposition; each gets a pack of its own
    below --out.
    """
    if out is None:
        raise RecipeError("Say where the pack goes: --out DIR.")
    about = described(describe or [])
    if remove:
        if experts or base or recipe or add or about:
            raise RecipeError("--remove takes --out alone. Add and remove in two commands.")
        _remove(out, remove, json)
        return
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
    if about and not (experts or recipe or add):
        if base or overwrite or rank_fraction or budget or any(asked.values()):
            raise RecipeError(
                "--describe without an expert describes tasks that are in the pack: give --out "
                "alone beside it. To pack, give --expert NAME=PATH."
            )
        _show([describe_tasks(out, about)], json)
        return
    gathered = options.gather_recipe(recipe, base, experts, asked)
    with console.progress() as progress:
        work = options.work_from(workers, memory, progress, device)
        if add:
            _refuse_settings(asked, rank_fraction, budget, recipe)
            packs = [
                add_tasks(
                    out, gathered.experts, base=gathered.base, characteristics=about, work=work
                )
            ]
        else:
            if gathered.base is None and gathered.settings.vector == "task":
                raise RecipeError(
                    "Say what the experts were fine-tuned from: --base PATH. Without it there are "
                    "difference vectors, from the experts' average: --vector difference."
                )
            outs = _variants(out, gathered, rank_fraction or [], budget or [])
            packs = pack_many(
                gathered.base,
                gathered.experts,
                outs,
                characteristics=gathered.characteristics | about,
                overwrite=overwrite,
                work=work,
            )
    _show(packs, json)


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


def _refuse_settings(asked: dict[str, Any], *more: object) -> None:
    """An existing pack keeps its codec, ranks and reference.

    Raises:
        RecipeError: if options would change them.
    """
    given = [key for key, value in asked.items() if value not in (None, {}, [])]
    if given or any(more):
        raise RecipeError(
            "--add takes codec, ranks and reference from the pack: give --expert, --out and, if "
            f"the reference has moved, --base. Also given: {', '.join(given) or 'ranks or recipe'}."
        )


def _remove(out: Path, names: list[str], json: bool) -> None:
    opened = Pack(out)
    for name in names:
        opened.task(name)
    for name in names:
        opened = remove_task(out, name)
    _show([opened], json)


def _show(packs: list[Pack], json: bool) -> None:
    described = [inspect_pack(pack) for pack in packs]
    if json:
        console.facts(described[0] if len(described) == 1 else described)
        return
    for facts in described:
        print_pack(facts, uncoded=False)  # a note has told it
