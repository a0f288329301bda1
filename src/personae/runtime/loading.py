"""Loads the reference of a pack, once its options and headers are seen to be right."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from personae.errors import Faults, RecipeError, nearest
from personae.packs.reader import Pack
from personae.recipe import parse_size
from personae.run.reference import open_reference
from personae.run.work import Work
from personae.runtime.cache import CACHE
from personae.runtime.loaded import Runtime
from personae.runtime.shells import Shells
from personae.runtime.variants import check_factored

MODES = ("merged", "factored")


def load(
    pack: str | Path | Pack,
    *,
    mode: str = "merged",
    base: Any = None,
    model: nn.Module | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    cache: str | int = CACHE,
    work: Work | None = None,
) -> Runtime:
    """Load the reference of a pack, and activate any task of it.

    Args:
        pack: The pack, or its directory.
        mode: `merged` puts a task's rebuilt weights in the place of the reference's, which stay in
            memory beside them; it takes every codec, and one thread at a time has a task.
            `factored` adds low-rank factors in the forward pass; it takes the codecs that store
            factors (`svd`, `dts`, `delta_come`, `tsv_c`, `residual`), and each thread has its own
            task.
        base: Where the reference is, if not where the pack says.
        model: The module to use, named as the experts are; its tensors become the reference's. By
            default the models are built by the classes of `transformers` that their configurations
            name. Without `base` it has to be the reference itself.
        device: Where the model goes; by default the CPU.
        dtype: Of the model's floating tensors; by default as the reference has most of them.
        cache: Most bytes of decoded tensors held by `factored`, such as "256MB", or "5%" of the
            reference's; what does not fit is decoded in every forward pass. 0 holds none.
        work: Workers and progress of checking the reference.

    Raises:
        PackError: if the pack is damaged, or its reference is another or missing.
        MethodError: if `factored` was asked for of a codec without factors.
        RecipeError: if the mode, device, dtype or size is none of those.
        CheckpointError: if the class of the reference is not known, or `model` lacks tensors.
    """
    faults = Faults()
    if mode not in MODES:
        faults.add(f"Unknown mode '{mode}'. {nearest(mode, MODES)}")
    size = _size(cache, faults)
    place = _device(device, faults)
    if dtype is not None and not getattr(dtype, "is_floating_point", False):
        faults.add(f"dtype is {dtype!r}. Give a floating one, such as torch.bfloat16.")
    faults.raise_if_any(RecipeError)
    opened = Pack(pack.directory if isinstance(pack, Pack) else Path(pack))
    if mode == "factored":
        for task in opened.manifest.tasks:
            check_factored(opened, task)
    reference = open_reference(opened, model if base is None else base, work or Work())
    shells = Shells(reference, model, place, dtype)
    limit = int(size * shells.nbytes) if isinstance(size, float) else size
    return Runtime(opened, reference, shells, mode, limit)


def _size(cache: str | int, faults: Faults) -> float | int:
    """Bytes, or as a float a share of the reference's."""
    if isinstance(cache, int):
        if cache < 0:
            faults.add(f"cache: {cache} is below 0. Give bytes, or a size such as 256MB.")
        return cache
    try:
        return parse_size(cache, percent=True)
    except ValueError as error:
        faults.add(f"cache: {error}")
        return 0


def _device(device: str | torch.device | None, faults: Faults) -> torch.device:
    try:
        return Work(device=str(device or "cpu")).torch_device
    except RecipeError as error:
        faults.take(error)
        return torch.device("cpu")
