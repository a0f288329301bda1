"""The modules of a model as transformers builds it, where it is installed.

Adapters name modules, files name tensors, and the two differ where a newer transformers reads old
files under new names. What kind of layer a module is, and which of them share a weight, no file
says either. Nothing is allocated: the model is built on the meta device. A config.json comes from
anybody, so one of more parts than any model has is not built to the end.
"""

import importlib
import re
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from personae._quiet import quiet_transformers
from personae.checkpoints.naming import module_of

_MOST_MODULES = 100_000
"""Modules that are built at most; DeepSeek-V3 with each expert a module has about 60 000."""

# Some classes make lists of so many entries before they build any module.
_MOST_COUNTED = 100_000
_COUNTED = re.compile(r"layer|depth|blocks|label")


@dataclass(frozen=True)
class BuiltModel:
    """What is known of a model's modules.

    Attributes:
        modules: Their names.
        linear: Names of the linear layers, GPT-2's Conv1D among them.
        shared: Name of a parameter to all names it has; only of those that have several.
        tensors: Names of its tensors; of those in its backbone, also without the prefix.
        backbone: What the class calls the backbone that it may be loaded from, such as `vit.`.
        parameters: Names of its parameters, in the order in which modules have them.
        stacked_in_out: Modules that hold experts as stacks of (in, out) matrices, not (out, in).
    """

    modules: frozenset[str] = frozenset()
    linear: frozenset[str] = frozenset()
    shared: Mapping[str, frozenset[str]] = field(default_factory=dict[str, frozenset[str]])
    tensors: frozenset[str] = frozenset()
    backbone: str = ""
    parameters: tuple[str, ...] = ()
    stacked_in_out: frozenset[str] = frozenset()

    def has_place(self, name: str) -> bool:
        """Whether a tensor by this name, as it is called in memory, can be one of the model's.

        Or as the backbone alone calls it.
        """
        if "." not in name:
            return self.holds(name)
        return not self.modules.isdisjoint((module_of(name), module_of(self.backbone + name)))

    def holds(self, name: str) -> bool:
        """Whether a tensor is called so in memory, or by the backbone alone."""
        return name in self.tensors


def build(config: Mapping[str, Any], model_class: str | None) -> BuiltModel | None:
    """Build a class of transformers from the content of a config.json.

    Returns:
        None without transformers, or where it does not know the class or the configuration, or
        that speaks of more modules than models have: then modules go by the names in files.
    """
    model = build_module(config, model_class)
    return None if model is None else _told(model)


def build_module(config: Mapping[str, Any], model_class: str | None) -> Any | None:
    """The model itself, without weights; see `build`."""
    if model_class is None or "model_type" not in config:
        return None
    try:
        transformers = importlib.import_module("transformers")
        with quiet_transformers(), torch.device("meta"), bounded(config):
            loaded = transformers.AutoConfig.for_model(**config)
            model = getattr(transformers, model_class)(loaded)
            return model if isinstance(model, nn.Module) else None
    except Exception:  # many kinds; all mean that transformers cannot tell
        return None


def _counts_too_many(config: Mapping[str, Any]) -> bool:
    """Whether a configuration, or one in it, counts more layers or labels than models have."""
    return any(
        _counts_too_many(value)
        if isinstance(value, dict)
        else isinstance(value, int) and value > _MOST_COUNTED and _COUNTED.search(key) is not None
        for key, value in config.items()
    )


@contextmanager
def bounded(config: Mapping[str, Any]) -> Generator[None]:
    """Let this thread build the model of a configuration, if that is of no more parts than any has.

    Args:
        config: The content of a config.json.

    Raises:
        OverflowError: It counts more layers or labels, or of it come more modules.
    """
    if _counts_too_many(config):
        raise OverflowError("it speaks of more layers or labels than any model has")
    thread, built = threading.get_ident(), 0

    def count(*_: Any) -> None:
        nonlocal built
        built += threading.get_ident() == thread
        if built > _MOST_MODULES:
            raise OverflowError(f"it is of more than {_MOST_MODULES} modules")

    hook = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _told(model: nn.Module) -> BuiltModel:
    modules = dict(model.named_modules(remove_duplicate=False))
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    backbone = f"{getattr(model, 'base_model_prefix', '')}.".lstrip(".")
    tensors = model.state_dict().keys()
    groups = [frozenset(group) for group in names.values() if len(group) > 1]
    return BuiltModel(
        frozenset(modules),
        frozenset(name for name, module in modules.items() if _is_linear(module)),
        {name: group for group in groups for name in group},
        frozenset(tensors) | {name.removeprefix(backbone) for name in tensors},
        backbone,
        tuple(name for name, _ in model.named_parameters(remove_duplicate=False)),
        frozenset(n for n, module in modules.items() if getattr(module, "is_transposed", False)),
    )


def _is_linear(module: Any) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
