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
        beside: Names of the tensors that the model itself holds, in no module of it.
    """

    modules: frozenset[str] = frozenset()
    linear: frozenset[str] = frozenset()
    shared: Mapping[str, frozenset[str]] = field(default_factory=dict[str, frozenset[str]])
    beside: frozenset[str] = frozenset()

    def has_place(self, name: str) -> bool:
        """Whether a tensor by this name, as it is called in memory, can be one of the model's."""
        return module_of(name) in self.modules if "." in name else name in self.beside


def build(config: Mapping[str, Any], model_class: str | None) -> BuiltModel | None:
    """Build a class of transformers from the content of a config.json.

    Returns:
        None without transformers, or where it does not know the class or the configuration: then
        modules go by the names in files.
    """
    if model_class is None or "model_type" not in config:
        return None
    try:
        transformers = importlib.import_module("transformers")
        with quiet_transformers(), torch.device("meta"):
            loaded = transformers.AutoConfig.for_model(**config)
            model = getattr(transformers, model_class)(loaded)
    except Exception:  # many kinds; all mean that transformers cannot tell
        return None
    return _told(model)


def _told(model: nn.Module) -> BuiltModel:
    modules = dict(model.named_modules(remove_duplicate=False))
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    groups = [frozenset(group) for group in names.values() if len(group) > 1]
    return BuiltModel(
        frozenset(modules),
        frozenset(name for name, module in modules.items() if _is_linear(module)),
        {name: group for group in groups for name in group},
        frozenset(name for name in model.state_dict() if "." not in name),
    )


def _is_linear(module: Any) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
