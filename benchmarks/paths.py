"""Which files and functions of the project one tensor goes through: `personae merge` of one tensor.

`python benchmarks/paths.py [--method ties] [--list]` merges a base and two experts of one tensor
with one worker, in this process, and counts what is called: by the worker, which reads, counts,
merges and writes the tensor, and by the command as a whole, which also reads recipes, headers and
configurations, plans, and writes the model card. Modules are imported before, so that what runs at
import does not count.
"""

import sys
import tempfile
import threading
from collections import defaultdict
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file

import personae
from personae import Work, merge
from personae.methods import MERGE_METHODS
from setting import machine

SOURCE = str(Path(personae.__file__).parent)


def family(folder: Path) -> tuple[Path, dict[str, Path]]:
    """A base and two experts of one matrix in bf16."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(64, 64, generator=generator)
    for name in ("base", "a", "b"):
        (folder / name).mkdir()
        tensor = base + 0.1 * torch.randn(64, 64, generator=generator)
        save_file({"layer.weight": tensor.bfloat16()}, folder / name / "model.safetensors")
    return folder / "base", {name: folder / name for name in ("a", "b")}


Called = dict[str, set[str]]
"""The project's files, each with the functions that are called."""


def called(method: str) -> tuple[Called, Called]:
    """What a merge calls: its worker, and all of it."""
    by_worker: Called = defaultdict(set)
    by_all: Called = defaultdict(set)

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(SOURCE) and code.co_name[0] != "<":
            file = code.co_filename.removeprefix(f"{SOURCE}/")
            by_all[file].add(code.co_qualname)
            if threading.current_thread().name.startswith("personae_"):
                by_worker[file].add(code.co_qualname)

    with tempfile.TemporaryDirectory() as folder:
        base, experts = family(Path(folder))
        chosen = MERGE_METHODS[method]()
        merge(base, experts, Path(folder) / "before", chosen)
        threading.setprofile(note)
        sys.setprofile(note)
        try:
            merge(base, experts, Path(folder) / "out", chosen, work=Work(workers=1))
        finally:
            sys.setprofile(None)
            threading.setprofile(None)  # pyright: ignore[reportArgumentType]
    return by_worker, by_all


def main(
    method: str = "ties",
    every: Annotated[bool, typer.Option("--list", help="Name every function.")] = False,
) -> None:
    """Print how many files and functions a merge of one tensor enters."""
    for who, found in zip(("the worker", "all"), called(method), strict=True):
        for file, functions in sorted(found.items()):
            print(f"{file}: {', '.join(sorted(functions)) if every else len(functions)}")
        total = sum(map(len, found.values()))
        print(f"{method}, {who}: {len(found)} files, {total} functions\n")
    print(", ".join(f"{name} {value}" for name, value in machine().items()))


if __name__ == "__main__":
    typer.run(main)
