"""personae export: a task of a pack, or a fine-tuned model, as an adapter that engines load."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from personae.cli import console, options
from personae.commands import export as exporting
from personae.commands.export_ranks import DEFAULT
from personae.family.carried import SAVEABLE

if TYPE_CHECKING:
    from personae.evaluate.outputs import OutputChange


def export(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(help="A pack, or a fine-tuned model or adapter: a path or a hub id."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to write.")],
    task: Annotated[
        str | None, typer.Option("--task", "-t", metavar="NAME", help="Which expert of a pack.")
    ] = None,
    base: options.Base = None,
    to: Annotated[
        Literal["peft", "hf"],
        typer.Option(
            metavar="FORMAT", help="peft (a LoRA adapter) or hf (a checkpoint, as unpack writes)."
        ),
    ] = "peft",
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank",
            "-r",
            help="Rank of every module; by default that of the factors that a pack or adapter "
            f"holds, else {DEFAULT}.",
        ),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="In place of a rank: the share of each module's squared norm to keep, such as "
            "0.95.",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="In place of a rank: size of the weights file at most."),
    ] = None,
    max_rank: Annotated[
        int | None, typer.Option(help="Bound on the ranks that are chosen.")
    ] = None,
    rank_pattern: Annotated[
        bool,
        typer.Option("--rank-pattern", help="A rank for each module; not every engine reads that."),
    ] = False,
    save_modules: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND",
            help="Save modules whole where they changed: "
            f"{', '.join(SAVEABLE)} or {exporting.ALL}; repeatable. Engines refuse most.",
        ),
    ] = None,
    skip: options.Skip = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="NAME", help=f"{', '.join(exporting.DTYPES)}.", show_default="base's"),
    ] = None,
    base_name: Annotated[
        str | None,
        typer.Option(metavar="ID", help="What the adapter says it is for, such as a hub id."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The fine-tuned model itself: measures what is lost of its outputs.",
        ),
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Texts to compare outputs on, one in each line; by default random tokens or "
            "pixels.",
        ),
    ] = None,
    overwrite: options.Overwrite = False,
    workers: options.Workers = None,
    memory: options.Memory = None,
    device: options.Device = "cpu",
    json: options.Json = False,
) -> None:
    """Export a task of a pack, or a fine-tuned model, as a LoRA adapter that engines load.

    It prints what the adapter keeps of the model, and what it leaves out.
    """
    found: dict[str, Any] = {}
    unused = () if against else ("texts",)
    options.refuse_unused(
        context, ("No outputs are compared without --against: leave out {}.", unused)
    )
    reference = exporting.base_of(source, base)
    if against is not None:
        from personae.evaluate import outputs  # takes a while to load

        outputs.comparable(against, base=reference, texts=texts)
    with options.working(workers, memory, device) as work:
        written = exporting.export(
            source,
            out,
            task=task,
            base=base,
            to=to,
            rank=rank,
            energy=energy,
            budget=budget,
            max_rank=max_rank,
            rank_pattern=rank_pattern,
            save_modules=save_modules or [],
            skip=skip or [],
            dtype=dtype,
            base_name=base_name,
            overwrite=overwrite,
            work=replace(work, fact=found.__setitem__),
        )
    change = None
    if against is not None:
        from personae.evaluate import outputs

        change = outputs.output_change(written, against, reference, texts=texts)
        found["outputs"] = asdict(change)
    if json:
        console.facts({"path": str(written)} | found)
        return
    if to == "peft":
        show_adapter(found)
    if change is not None:
        _show_outputs(change)
    told = f"{task} rebuilt" if to == "hf" else "adapter"
    console.out.print(f"{told} in {written}", markup=False)


def _show_outputs(change: "OutputChange") -> None:
    """Print what is lost of a model's outputs."""
    lost = "which fine-tuning did not change"
    if change.lost is not None:
        lost = f"{100 * change.lost:.3g} % of what fine-tuning changed is lost, squared"
    agree = "" if change.agree is None else f"; {100 * change.agree:.4g} % of answers are the same"
    console.out.print(f"outputs on {change.inputs}: {lost}{agree}", markup=False)


def show_adapter(found: Mapping[str, Any]) -> None:
    """Print what an adapter keeps and what it does not."""
    up_to = "up to " if found["ranks"] else ""
    console.out.print(
        f"rank {up_to}{found['rank']} for {found['modules']} modules, {found['dtype']}, "
        f"{console.size(found['bytes'])}",
        markup=False,
    )
    rows = [
        [
            row["kind"],
            row["carried"],
            str(row["tensors"]),
            console.percent(100 * row["parameter_share"]),
            console.percent(100 * row["norm_share"]),
        ]
        for row in found["changed"]
    ]
    columns = ["changed", "carried", "tensors", "parameters %", "squared norm %"]
    console.table("", columns, rows, left=2)
    console.out.print(
        f"squared relative error of the factors {found['relative_error']:.3g}; lost in all "
        f"{100 * found['lost']:.3g} % of the squared norm of the task vector",
        markup=False,
    )
