"""Models as checkpoint directories: refused before any work, or written complete."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from personae._types import TensorSpec
from personae.errors import OutputError
from personae.execute import pool
from personae.execute.work import Work
from personae.writers import (
    CheckpointWriter,
    output_directory,
    require_place,
    require_space,
    write_companions,
)

_OUTPUTS = ("pack.json", "*/pack.json", "*.safetensors", "pytorch_model*.bin")
"""What tells that a directory may be replaced on request: nothing else is."""


def check_output(out: Path, overwrite: bool, inputs: Sequence[Any] = ()) -> None:
    """Refuse an output that exists, or that would replace what is read, before any work.

    Args:
        out: The output directory, absolute.
        overwrite: Whether a directory that holds something may be replaced.
        inputs: Sources of the run; those that are no local path do not matter.

    Raises:
        OutputError: if `out` is a file, a directory that holds something, or is, contains or lies
            inside an input.
    """
    for source in inputs:
        if not isinstance(source, str | Path) or not Path(source).exists():
            continue
        read, written = Path(source).resolve(), out.resolve()
        if read == written or read in written.parents or written in read.parents:
            raise OutputError(
                f"'{out}' and the input '{source}' overlap: writing one would harm the other. "
                "Choose an output beside it."
            )
    require_place(out)
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise OutputError(
            f"'{out}' exists and is not empty. Choose another name, or give --overwrite."
        )
    if out.exists() and not out.is_dir():
        raise OutputError(f"'{out}' is a file. Choose another name.")
    if (
        out.is_dir()
        and any(out.iterdir())
        and not any(any(out.glob(pattern)) for pattern in _OUTPUTS)
    ):
        raise OutputError(
            f"'{out}' holds neither a pack nor a model, so it is not replaced. Choose another "
            "name, or empty it by hand."
        )


def write_model(
    out: Path,
    specs: Sequence[TensorSpec],
    read: Callable[[str], Tensor],
    *,
    tied: Mapping[str, str],
    companions: Mapping[str, Path | bytes],
    cost: Callable[[TensorSpec], int],
    overwrite: bool,
    shard_bytes: int,
    stage: str,
    work: Work,
) -> None:
    """Write a model tensor by tensor, as each is computed.

    Args:
        out: The directory to make.
        specs: What is written, in order.
        read: Computes a tensor by its name; cast to its spec's dtype as it is written.
        tied: Further names to those of the tensors they share.
        companions: Relative name to small file, or to its content.
        cost: Peak bytes of computing one tensor.
        overwrite: Whether a directory that holds something may be replaced.
        shard_bytes: Most bytes in one weight file.
        stage: What progress calls it.
        work: Workers, memory, progress.

    Raises:
        OutputError: if the disk refuses, or has too little space.
    """
    require_space(out, sum(spec.nbytes for spec in specs))
    with (
        output_directory(out, overwrite=overwrite) as partial,
        CheckpointWriter(partial, list(specs), shard_bytes=shard_bytes, tied=tied) as writer,
    ):
        write_companions(companions, partial)
        work.progress(stage, 0, len(specs))
        results = pool.run(
            specs,
            lambda spec: writer.write(spec.name, read(spec.name)),
            cost=cost,
            workers=work.threads,
            memory=work.memory,
        )
        for done, _ in enumerate(results, 1):
            work.progress(stage, done, len(specs))
