"""Tiny families as plain state dicts: quick to make, and every kind of tensor once."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from personae.methods import MergeMethod

State = dict[str, Tensor]


def small_base(seed: int = 0, dtype: torch.dtype = torch.float32) -> State:
    """An embedding, a matrix, a bias, a convolution, a scalar, and an integer buffer."""
    shapes = {
        "embed.weight": (20, 16),
        "layer.weight": (16, 12),
        "layer.bias": (16,),
        "conv.weight": (8, 3, 2, 2),
        "scale": (),
    }
    generator = torch.Generator().manual_seed(seed)
    state = {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}
    return state | {"position_ids": torch.arange(6).reshape(1, 6)}


def tuned(base: State, seed: int, scale: float = 0.01, names: Collection[str] = ()) -> State:
    """A fine-tuned look-alike: noise on every floating tensor, or on `names` alone."""
    generator = torch.Generator().manual_seed(seed)
    state = {name: tensor.clone() for name, tensor in base.items()}
    for name in sorted(base):
        if base[name].is_floating_point() and (not names or name in names):
            noise = scale * torch.randn(base[name].shape, generator=generator)
            state[name] = (base[name].float() + noise).to(base[name].dtype)
    return state


def saved(state: State, directory: Path, config: str | None = "{}") -> Path:
    """Write a state dict as a checkpoint directory."""
    directory.mkdir(parents=True)
    whole = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(whole, directory / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        (directory / "config.json").write_text(config)
    return directory


def listing(directory: Path) -> dict[str, bytes | None]:
    """Everything below a directory: relative name to the file's bytes, None for a folder."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
    }


def as_many(method: type[MergeMethod], experts: Mapping[str, Any]) -> dict[str, Any]:
    """As many of the experts as a method takes beside a base."""
    takes = len(experts) if method.takes is None else method.takes - (method.needs == "models")
    return dict(list(experts.items())[:takes])
