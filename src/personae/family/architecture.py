"""Tensor specs of a model that nobody has trained yet: from its config.json, or from shapes."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from personae._quiet import quiet_transformers
from personae._small_files import read_json
from personae._types import TensorSpec
from personae.checkpoints.built import bounded
from personae.checkpoints.configuration import CONFIG
from personae.checkpoints.naming import matches
from personae.errors import RecipeError


def specs_of_architecture(
    config: Path, model_class: str = "AutoModel", skip: Sequence[str] = ()
) -> list[TensorSpec]:
    """Build a model on the meta device and list its parameters; tied ones once.

    Args:
        config: A transformers `config.json`, or the directory that holds one.
        model_class: A class of transformers; `AutoModel` builds the backbone without a head.
        skip: Patterns of names to leave out, such as `pooler.*`.

    Raises:
        RecipeError: if transformers is missing, or does not know the config or class, or the config
            is damaged, or of more parts than any model has.
    """
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise RecipeError(
            "--architecture needs transformers: pip install 'personae[transformers]'."
        ) from error
    builder = getattr(transformers, model_class, None)
    if builder is None or not (hasattr(builder, "from_config") or _is_module(builder)):
        raise RecipeError(f"transformers has no class '{model_class}'. Give one such as AutoModel.")
    if not config.exists():
        raise RecipeError(f"--architecture {config}: there is no such file.")
    try:
        content = read_json(config / CONFIG if config.is_dir() else config)
    except (OSError, ValueError) as error:
        raise RecipeError(f"--architecture {config} cannot be read: it {error}.") from error
    if not isinstance(content, dict):
        raise RecipeError(f"--architecture {config} holds no configuration, which is a mapping.")
    try:
        with quiet_transformers(), torch.device("meta"), bounded(content):
            loaded = transformers.AutoConfig.for_model(**content)
            build = getattr(builder, "from_config", builder)
            model = build(loaded)
    except Exception as error:  # transformers raises many kinds; all mean the same here
        raise RecipeError(
            f"transformers cannot build {config} as {model_class}: {error or repr(error)}"
        ) from error
    return [
        TensorSpec(name, tuple(parameter.shape), parameter.dtype)
        for name, parameter in model.named_parameters()
        if not matches(name, skip)
    ]


def _is_module(builder: object) -> bool:
    return isinstance(builder, type) and issubclass(builder, nn.Module)


def specs_of_shapes(
    shapes: Mapping[str, Sequence[int]], skip: Sequence[str] = ()
) -> list[TensorSpec]:
    """Tensor specs (fp32) from a mapping of names to shapes, without those `skip` matches."""
    return [
        TensorSpec(name, tuple(shape), torch.float32)
        for name, shape in shapes.items()
        if not matches(name, skip)
    ]
