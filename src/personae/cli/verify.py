"""personae verify: checksums, and the error against the originals."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from personae.cli import console, options
from personae.execute import verify as verification


def verify(
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
    with console.progress() as progress:
        verified = verification.verify(
            pack,
            against=options.named(against, "--against"),
            base=base,
            work=options.work_from(workers, memory, progress, device),
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
