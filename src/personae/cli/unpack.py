"""personae unpack: rebuild one expert as an ordinary checkpoint."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from personae.cli import console, options
from personae.commands import unpack as rebuilding


def unpack(
    pack: Annotated[Path, typer.Argument(help="The pack's directory.")],
    task: Annotated[str, typer.Option("--task", "-t", help="Which expert to rebuild.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to write.")],
    base: options.Base = None,
    shard_size: options.ShardSize = "5GB",
    overwrite: options.Overwrite = False,
    workers: options.Workers = None,
    memory: options.Memory = None,
    device: options.Device = "cpu",
    json: options.Json = False,
) -> None:
    """Rebuild one expert as a checkpoint directory that transformers loads."""
    shard_bytes = options.bytes_of("--shard-size", shard_size)
    found: dict[str, Any] = {}
    with options.working(workers, memory, device) as work:
        written = rebuilding.unpack(
            pack,
            task,
            out,
            base=base,
            overwrite=overwrite,
            shard_bytes=shard_bytes,
            work=replace(work, fact=found.__setitem__),
        )
    if json:
        console.facts({"task": task, "path": str(written)} | found)
    else:
        console.out.print(f"{task} rebuilt in {written}", markup=False)
