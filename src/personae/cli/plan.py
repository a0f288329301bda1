"""personae plan: what a merge or pack will take and cost, from headers or shapes alone."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from personae._small_files import read_json
from personae.cli import console, options
from personae.commands.merge_adapter import AdapterPlan
from personae.commands.merge_documents import plan_recipes
from personae.commands.merge_parts import LayersPlan
from personae.commands.merge_plan import MergePlan
from personae.commands.pack_plan import PackPlan, ShapesPlan, plan_pack, plan_shapes
from personae.errors import RecipeError
from personae.family.architecture import specs_of_architecture, specs_of_shapes
from personae.recipe import (
    MergeRecipe,
    PackRecipe,
    PackSettings,
    read_merge_recipes,
    recipe_kind,
)
from personae.run.work import Work

_NOT_OF_MERGES = (
    "This is a merge recipe. Leave out {}: only packs have such options.",
    ("base", "experts", "architecture", "model_class", "shapes", "tasks", *options.CODING),
)
_OF_ARCHITECTURES = ("{} goes with --architecture.", ("model_class",))
_OF_SHAPES = (
    "{} goes with --architecture or --shapes. Otherwise the experts are counted.",
    ("tasks",),
)
_NOT_OF_SHAPES = (
    "--architecture and --shapes plan without checkpoints: leave out {}.",
    ("recipe", "base", "experts", "vector", "reference", "reference_set", "workers", "memory"),
)


def plan(
    context: typer.Context,
    recipe: Annotated[Path | None, typer.Argument(help="A merge or pack recipe.")] = None,
    base: options.Base = None,
    experts: options.Experts = None,
    architecture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A config.json; no weights needed.")
    ] = None,
    model_class: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="With --architecture: the class to build; AutoModel has no head.",
            show_default="AutoModel",
        ),
    ] = None,
    shapes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A JSON file: tensor name to shape.")
    ] = None,
    tasks: Annotated[
        int | None,
        typer.Option(min=1, help="With --architecture or --shapes: number of tasks."),
    ] = None,
    method: options.Method = None,
    rank_fraction: Annotated[
        float | None,
        typer.Option(
            "--rank-fraction",
            "-r",
            metavar="FRACTION",
            help="Fraction of singular directions kept.",
        ),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="SIZE", help="What a task may cost: 1% or 900KB.")
    ] = None,
    counting: options.Counting = None,
    vector: options.Vector = None,
    reference: options.Reference = None,
    set_: options.Set = None,
    reference_set: options.ReferenceSet = None,
    skip: options.Skip = None,
    private: options.Private = None,
    workers: options.Workers = None,
    memory: options.Memory = None,
    json: options.Json = False,
) -> None:
    """Plan a merge or a pack without reading a weight: faults, bytes, memory, ranks, AMR."""
    if recipe is not None and recipe_kind(recipe) == "merge":
        options.refuse_unused(context, _NOT_OF_MERGES)
        _plan_merge(recipe, workers, memory, json)
        return
    read, parameters = options.recipe_from(recipe), options.values(set_, "--set")
    shaped = bool(architecture or shapes)
    options.refuse_unused(
        context,
        *([] if architecture else [_OF_ARCHITECTURES]),
        _NOT_OF_SHAPES if shaped else _OF_SHAPES,
        *options.unused_coding(parameters, bool(budget or read.settings.budget)),
    )
    if rank_fraction is not None and budget is not None:
        raise RecipeError("A budget sets the rank: give --budget or --rank-fraction, not both.")
    if rank_fraction is not None:
        parameters["rank_fraction"] = rank_fraction
    asked: dict[str, Any] = {
        "method": method,
        "parameters": parameters,
        "budget": budget,
        "counting": counting,
        "vector": vector,
        "reference": reference,
        "reference_parameters": options.values(reference_set, "--reference-set"),
        "skip": skip,
        "private": private,
    }
    gathered = options.overridden(read, base, experts, asked)
    if shaped:
        _plan_shapes(architecture, shapes, model_class, tasks, gathered.settings, json)
    else:
        _plan_pack(gathered, workers, memory, json)


def _plan_shapes(
    architecture: Path | None,
    shapes: Path | None,
    model_class: str | None,
    tasks: int | None,
    settings: PackSettings,
    json: bool,
) -> None:
    if architecture and shapes:
        raise RecipeError("Give --architecture or --shapes, not both.")
    skip = (*settings.skip, *settings.private)  # neither is coded
    if architecture:
        specs = specs_of_architecture(architecture, model_class or "AutoModel", skip)
    else:
        assert shapes is not None
        specs = specs_of_shapes(_read_shapes(shapes), skip)
    planned = plan_shapes(specs, settings, tasks)
    if json:
        console.facts(asdict(planned))
        return
    console.out.print(_shapes_line(planned), markup=False)
    console.table(
        "",
        ["AMR % by rule", ""],
        [[rule, console.percent(value)] for rule, value in planned.amr_percent.items()],
    )


def _plan_pack(recipe: PackRecipe, workers: int | None, memory: str | None, json: bool) -> None:
    if recipe.base is None and (not recipe.experts or recipe.settings.vector == "task"):
        raise RecipeError(
            "Say what to plan: --base and --expert NAME=PATH (without --base: --vector "
            "difference), a recipe, --architecture CONFIG.json "
            "or --shapes FILE.json."
        )
    work = Work(workers=workers, memory=options.memory_from(memory))
    planned = plan_pack(recipe.base, recipe.experts, recipe.settings, work)
    if json:
        console.facts(planned.to_json())
        return
    _print_plan(planned)


def _plan_merge(recipe: Path, workers: int | None, memory: str | None, json: bool) -> None:
    recipes = read_merge_recipes(recipe)
    work = Work(workers=workers, memory=options.memory_from(memory))
    plans = plan_recipes(recipes, work)
    if json:
        facts = {name: planned.to_json() for name, planned in plans.items()}
        console.facts(facts if len(recipes) > 1 else next(iter(facts.values())))
        return
    for read, (name, planned) in zip(recipes, plans.items(), strict=True):
        if len(recipes) > 1:
            console.out.print(f"{name}:", markup=False)
        _print_merge(read, planned)


def _print_merge(read: MergeRecipe, planned: MergePlan) -> None:
    size = console.size
    passes = f", usually including {planned.passes} earlier pass(es)" if planned.passes else ""
    waiting: list[str] = []
    if planned.undecided_bytes:
        most = size(planned.undecided_bytes)
        waiting.append(
            f"temporary files on the same disk: {most} if no sign won for any entry (usually for "
            "less than one in a hundred)"
        )
    rest = f"{len(planned.copied)} as in the base"
    if planned.adapter is not None:
        rest = f"into an adapter of {_adapter(planned.adapter, read.settings.energy is not None)}"
    written = f"writes {size(planned.bytes_out)}"
    if planned.computed:
        written = "is merged as it is read, and not written"
    elif read.name is not None:
        written += " beside the output, removed when nothing more is merged from it"
    console.out.print(
        f"{planned.method} on {planned.vector} vectors: {planned.merged} tensors merged, "
        f"{rest}; {planned.parameters:,} parameters",
        f"reads {size(planned.bytes_in)} ({size(planned.bytes_read)} in all{passes}), {written}",
        *waiting,
        f"working memory at most {size(planned.peak_memory)} with {planned.workers} worker(s) on "
        f"{planned.items} items, the largest {size(planned.largest)}",
        markup=False,
    )
    if planned.layers:
        columns = ["layers", "of the models' layers", "method"]
        console.table("", columns, [_layers_row(layers) for layers in planned.layers])
    for text in (*read.notes, *planned.notes):
        console.note(text)


def _adapter(plan: AdapterPlan, by_energy: bool) -> str:
    """Rank and modules of an adapter, and what its factors lose."""
    at_most = "at most " if by_energy else ""
    loss = "exact" if plan.exact else "the rest is cut off"
    whole = f" and {plan.whole} whole tensors" if plan.whole else ""
    return f"rank {at_most}{plan.rank} ({loss}) for {plan.modules} modules{whole}, {plan.dtype}"


def _layers_row(plan: LayersPlan) -> list[str]:
    """Layers of the output, what they are merged of, and how; spans without their last number."""
    of = f"{plan.module} " if plan.module else ""
    sources = [f"{name} {_span(span)}" for name, span in plan.sources.items()]
    return [of + _span(plan.span), ", ".join(sources), plan.method]


def _span(span: tuple[int, int]) -> str:
    return f"{span[0]}–{span[1] - 1}"


def _print_plan(planned: PackPlan) -> None:
    rows = [
        [
            name,
            console.size(task.coded.bytes),
            console.size(task.private_bytes),
            console.percent(task.coded.amr_percent["on_disk_native"]),
            console.percent(task.coded.amr_percent["amr_paper"]),
            "-" if task.coded.rank_fraction is None else f"{task.coded.rank_fraction:.4f}",
        ]
        for name, task in planned.tasks.items()
    ]
    columns = ["task", "coded", "private", "AMR % disk", "AMR % paper", "rank fraction"]
    console.table("", columns, rows)
    console.out.print(
        f"reads {console.size(planned.bytes_in)}, writes at most {console.size(planned.bytes_out)},"
        f" working memory at most {console.size(planned.peak_memory)} "
        f"with {planned.workers} worker(s)",
        markup=False,
    )
    for text in planned.notes:
        console.note(text)


def _shapes_line(planned: ShapesPlan) -> str:
    fraction = planned.rank_fraction
    at = "" if fraction is None else f", rank fraction {fraction:.4f}"
    once = planned.shared_bytes
    shared = f" and {console.size(once)} for all {planned.tasks} tasks together" if once else ""
    return (
        f"{planned.parameters:,} parameters in {planned.tensors} tensors{at}: "
        f"{console.size(planned.bytes)} a task{shared}"
    )


def _read_shapes(path: Path) -> dict[str, list[int]]:
    """Read a JSON file of shapes.

    Raises:
        RecipeError: if it is not a mapping from names to lists of whole numbers.
    """
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise RecipeError(f"--shapes {path} cannot be read: {error}") from error
    if not isinstance(content, dict) or not all(
        isinstance(shape, list) and all(isinstance(n, int) and n >= 0 for n in shape)
        for shape in content.values()
    ):
        raise RecipeError(f'--shapes {path} must hold names and shapes: {{"weight": [768, 768]}}.')
    return content
