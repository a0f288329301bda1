"""Models in several folders: the modules of sentence-transformers, and how weight files are called.

`modules.json` names folders beside the transformer's own files (`1_Pooling`, `2_Dense`), each with
a small configuration, some with weights. Here they are one checkpoint: a module's tensor is called
FOLDER/NAME, such as `2_Dense/linear.weight`, and is written into its folder again.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from personae import _small_files
from personae._types import TensorSpec
from personae.checkpoints._protocol import Checkpoint
from personae.checkpoints.configuration import CONFIG
from personae.checkpoints.folders import AuxiliaryFiles, Folder
from personae.checkpoints.specs import by_name, no_such_tensor
from personae.errors import CheckpointError, Faults

MODULES = "modules.json"
_ROUTER = "router_config.json"
_WITHOUT_FILES = ("Normalize",)
"""Modules that are only computation: git keeps no empty folder, so theirs may be absent."""


class WeightLayout(NamedTuple):
    """Where a model's weights are written.

    Attributes:
        stem: What the weight files are called, before '.safetensors'.
        folders: Folders with weights of their own, whose tensors are called FOLDER/NAME.
    """

    stem: str = "model"
    folders: tuple[str, ...] = ()


def weight_layout(auxiliary_files: Mapping[str, Path | bytes]) -> WeightLayout:
    """Where whoever reads these small files looks for the weights.

    Raises:
        CheckpointError: if one of them is damaged.
    """
    config = read_auxiliary_file(auxiliary_files, CONFIG)
    diffusers = isinstance(config, dict) and "_diffusers_version" in config
    stem = "diffusion_pytorch_model" if diffusers else "model"
    return WeightLayout(stem, tuple(named_folders(auxiliary_files)))


def named_folders(auxiliary_files: Mapping[str, Path | bytes]) -> dict[str, str]:
    """The folders that a model's small files name, each with its kind of module.

    Raises:
        CheckpointError: if they cannot be read, or name what is outside the model.
    """
    found: dict[str, str] = {}
    for name, entries, keys in (
        (MODULES, _modules, "modules with 'path' and 'type'"),
        (_ROUTER, _routes, "'types' of modules by their folders"),
    ):
        said = read_auxiliary_file(auxiliary_files, name)
        try:
            found |= entries(said) if said else {}
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{auxiliary_files[name]} names no {keys}. Copy or download it again."
            ) from error
    inner = {folder.rstrip("/"): kind for folder, kind in found.items() if folder.strip("./")}
    outside = sorted(f for f in inner if Path(f).is_absolute() or ".." in Path(f).parts)
    if outside:
        raise CheckpointError(
            f"The model's {MODULES} or {_ROUTER} names {', '.join(outside)}, outside of it."
        )
    return inner


def _modules(said: Any) -> dict[str, str]:
    return {str(module["path"]): str(module["type"]) for module in said}


def _routes(said: Any) -> dict[str, str]:
    return {str(folder): str(kind) for folder, kind in (said.get("types") or {}).items()}


def read_auxiliary_file(auxiliary_files: Mapping[str, Path | bytes], name: str) -> Any:
    """What a small JSON file says; None if there is none.

    Raises:
        CheckpointError: if it is damaged.
    """
    file = auxiliary_files.get(name)
    if file is None:
        return None
    try:
        if isinstance(file, bytes):
            return _small_files.parse_json(file)
        return _small_files.read_json(file)
    except _small_files.Unfit as error:
        raise CheckpointError(f"{file} {error}. Copy or download it again.") from error


def module_folders(folder: Folder) -> dict[str, Folder]:
    """The folders inside a model that it names and that hold anything.

    Raises:
        CheckpointError: naming those that are not there, and small files that cannot be read.
    """
    faults = Faults()
    inside: dict[str, Folder] = {}
    for name, kind in named_folders(folder.auxiliary_files).items():
        found = folder.inside(name)
        if found.names:
            found.check_auxiliary_files(faults)
            inside[name] = found
        elif not kind.endswith(_WITHOUT_FILES):
            faults.add(
                f"{folder.where(MODULES)} names '{name}', which is not there or empty. "
                "Fetch it too."
            )
    faults.raise_if_any(CheckpointError)
    return inside


class WithModules:
    """A `Checkpoint` of a model and the modules in its folders.

    Attributes:
        model: The model in the outer folder; None if there are only modules.
    """

    copies: Mapping[str, torch.dtype] = MappingProxyType({})

    def __init__(
        self,
        folder: Folder,
        model: Checkpoint | None,
        modules: Mapping[str, Checkpoint],
        inside: Mapping[str, Folder],
    ) -> None:
        """Join headers and small files.

        Args:
            folder: The outer folder.
            model: What it holds itself.
            modules: Of each folder with weights, what it holds.
            inside: Every named folder.
        """
        self.model = model
        self.source, self.revision = folder.source, folder.revision
        parts: dict[str, Checkpoint] = {f"{name}/": module for name, module in modules.items()}
        if model is not None:
            parts = {"": model} | parts
        self._parts = tuple(parts.values())
        self._places = {
            prefix + name: (part, name) for prefix, part in parts.items() for name in part.specs
        }
        self.specs: Mapping[str, TensorSpec] = by_name(
            TensorSpec(name, part.specs[own].shape, part.specs[own].dtype)
            for name, (part, own) in self._places.items()
        )
        self.tied: Mapping[str, str] = {
            prefix + dropped: prefix + kept
            for prefix, part in parts.items()
            for dropped, kept in part.tied.items()
        }
        files: dict[str, Mapping[str, Path]] = {
            "": model.auxiliary_files if model else folder.auxiliary_files
        }
        files |= {f"{name}/": sub.auxiliary_files for name, sub in inside.items()}
        held = {prefix + name: (own, name) for prefix, own in files.items() for name in own}

        def locate(name: str) -> Path:
            own, inner = held[name]
            return own[inner]

        self.auxiliary_files: Mapping[str, Path] = AuxiliaryFiles(held, locate)

    def read(self, name: str) -> Tensor:
        """Return one tensor; see `Checkpoint.read`."""
        part, own = self._place(name)
        return part.read(own)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows `start:stop`; see `Checkpoint.read_rows`."""
        part, own = self._place(name)
        return part.read_rows(own, start, stop)

    def factors(
        self, name: str
    ) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]] | None:
        """Return those of an adapter in the outer folder; see `Checkpoint.factors`."""
        part, own = self._place(name)
        return part.factors(own)

    def same_as_base(self, name: str) -> bool:
        """Whether it is an adapter that does not touch the tensor."""
        return name in self._places and self._places[name][0].same_as_base(name)

    def close(self) -> None:
        """Close model and modules."""
        for part in self._parts:
            part.close()

    def _place(self, name: str) -> tuple[Checkpoint, str]:
        return self._places.get(name) or no_such_tensor(self.source, name, self.specs)
