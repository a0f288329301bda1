"""personae merge: one checkpoint out of many, from a recipe."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from personae.cli import console, options
from personae.cli.export import show_adapter
from personae.commands.merge_documents import merge_recipes
from personae.recipe import read_merge_recipes


def merge(
    recipe: Annotated[Path, typer.Argument(help="A merge recipe (YAML, mergekit's shape).")],
    out: Annotated[Path, typer.Argument(help="Directory of what comes out.")],
    overwrite: options.Overwrite = False,
    shard_size: options.ShardSize = "5GB",
    workers: options.Workers = None,
    memory: options.Memory = None,
    device: options.Device = "cpu",
    json: options.Json = False,
) -> None:
    """Merge experts into one ordinary checkpoint, tensor by tensor in bounded memory.

    Of LoRA adapters, `output: adapter` in the recipe makes one adapter.
    """
    recipes = read_merge_recipes(recipe)
    for read in recipes:
        for text in read.notes:
            console.note(f"{read.name}: {text}" if read.name else text)
    found: dict[str, Any] = {}
    shard_bytes = options.bytes_of("--shard-size", shard_size)
    with options.working(workers, memory, device) as work:
        written = merge_recipes(
            recipes,
            out,
            overwrite=overwrite,
            shard_bytes=shard_bytes,
            work=replace(work, fact=found.__setitem__),
        )
    files = [path for path in sorted(written.rglob("*")) if path.is_file()]
    nbytes = sum(path.stat().st_size for path in files)
    if json:
        names = [path.relative_to(written).as_posix() for path in files]
        facts = {"path": str(written), "method": recipes[-1].settings.method, "bytes": nbytes}
        console.facts(facts | {"files": names} | found)
    else:
        if "adapter" in found:
            show_adapter(found["adapter"])
        console.out.print(f"{out}: {console.size(nbytes)} in {len(files)} files", markup=False)
