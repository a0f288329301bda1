"""The modules of a model as transformers builds it, where it is installed.

Adapters name modules, files name tensors, and the two differ where a newer transformers reads old
files under new names. What kind of layer a module is, and which of them share a weight, no file
says either. Nothing is allocated: the model is built on the meta device.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from personae._quiet import quiet_transformers
from personae.checkpoints.naming import module_of


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
        None without transformers, or where it does not know the class or the configuration: then
        modules go by the names in files.
    """
    model = build_module(config, model_class)
    return None if model is None else _told(model)


def build_module(config: Mapping[str, Any], model_class: str | None) -> Any | None:
    """The model itself, without weights; see `build`."""
    if model_class is None or "model_type" not in config:
        return None
    try:
        transformers = importlib.import_module("transformers")
        with quiet_transformers(), torch.device("meta"):
            loaded = transformers.AutoConfig.for_model(**config)
            return getattr(transformers, model_class)(loaded)
    except Exception:  # many kinds; all mean that transformers cannot tell
        return None


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
