"""personae verify: checksums, and the error against the originals."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from personae.cli import console, options
from personae.commands import verify as verification

_OF_REBUILDING = ("device",)


def verify(
    context: typer.Context,
    pack: Annotated[Path, typer.Argument(help="The pack's directory.")],
    against: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="An original to compare with; repeatable."),
    ] = None,
    base: options.Base = None,
    workers: options.Workers = None,
    memory: options.Memory = None,
    device: options.Device = "cpu",
    json: options.Json = False,
) -> None:
    """Check a pack's checksums and, given originals, what is rebuilt against them."""
    unused = () if against else _OF_REBUILDING
    options.refuse_unused(context, ("Nothing is rebuilt without --against: leave out {}.", unused))
    with options.working(workers, memory, device) as work:
        verified = verification.verify(
            pack,
            against=options.named(against, "--against"),
            base=base,
            work=work,
        )
    if json:
        console.facts({name: asdict(found) for name, found in verified.items()})
        return
    console.table(
        "every checksum holds",
        ["task", "recorded error", "measured error", "same original"],
        [
            [
                name,
                f"{found.recorded_error:.6f}",
                "-" if found.measured_error is None else f"{found.measured_error:.6f}",
                {None: "-", True: "yes", False: "no"}[found.same_original],
            ]
            for name, found in verified.items()
        ],
    )
