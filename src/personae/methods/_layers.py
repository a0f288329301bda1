"""Linear layers of any module: what they are given, and which rows of a weight each of them is."""

import re
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

Given = Callable[["LinearLayer", Tensor], None]
"""Told what a layer is given, each time that it runs: (…, in)."""

_BLOCK = re.compile(r"^(.*?\.)?\d+(?=\.|$)")


@dataclass(frozen=True)
class LinearLayer:
    """A weight that multiplies, or the rows of it that do.

    Attributes:
        module: Name of the module that runs.
        weight: Name of the parameter.
        transposed: Whether it is stored (in, out), as GPT-2's Conv1D is.
        first: Its first row in the parameter.
        rows: How many; None where it is the whole.
    """

    module: str
    weight: str
    transposed: bool = False
    first: int = 0
    rows: int | None = None

    @property
    def block(self) -> str:
        """The numbered block that it is in, or its module."""
        return block_of(self.weight)

    def matrix(self, parameter: Tensor) -> Tensor:
        """What its inputs are multiplied with, (in, out): a view of the parameter."""
        if self.rows is not None:
            parameter = parameter.narrow(0, self.first, self.rows)
        return parameter if self.transposed else parameter.T


def block_of(parameter: str) -> str:
    """The outermost numbered block that a parameter is in; of others the module's name."""
    numbered = _BLOCK.match(parameter)
    return numbered[0] if numbered else parameter.rpartition(".")[0]


def linear_layers(model: nn.Module) -> list[LinearLayer]:
    """Every linear layer: `nn.Linear`, Conv1D, the stacked projections of `nn.MultiheadAttention`.

    A weight that is a table of embeddings too is none.
    """
    names = {id(own): name for name, own in model.named_parameters()}
    tables = {id(one.weight) for one in model.modules() if isinstance(one, nn.Embedding)}
    found: list[LinearLayer] = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.MultiheadAttention):
            found += _of_attention(name, module, names)
        elif isinstance(weight, nn.Parameter) and id(weight) not in tables:
            if isinstance(module, nn.Linear):
                found.append(LinearLayer(name, names[id(weight)]))
            elif is_conv1d(module):
                found.append(LinearLayer(name, names[id(weight)], transposed=True))
    return found


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is a linear layer that stores its weight (in, out), as in GPT-2."""
    weight = getattr(module, "weight", None)
    return type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.ndim == 2


def _of_attention(
    name: str, module: nn.MultiheadAttention, names: Mapping[int, str]
) -> list[LinearLayer]:
    """Queries, keys and values; the output projection is found as the `nn.Linear` that it is."""
    stacked, width = cast("nn.Parameter | None", module.in_proj_weight), module.embed_dim
    if stacked is not None:
        whole = names[id(stacked)]
        return [LinearLayer(name, whole, first=n * width, rows=width) for n in range(3)]
    apart = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    return [LinearLayer(name, names[id(one)]) for one in apart]


@contextmanager
def watched(model: nn.Module, layers: list[LinearLayer], given: Given) -> Generator[None]:
    """While it lasts, `given` is told what these layers are given."""
    modules = dict(model.named_modules())
    by_module: dict[str, list[LinearLayer]] = {}
    for layer in layers:
        by_module.setdefault(layer.module, []).append(layer)
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        # The fast path runs no layer that could be watched.
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)
        for name, own in by_module.items():
            module = modules[name]
            if isinstance(module, nn.MultiheadAttention):
                output = by_module.get(f"{name}.out_proj" if name else "out_proj", [])
                hook: Any = _attention_hook(own, output, given)
            else:
                hook = _hook(own, given)
            handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _hook(layers: list[LinearLayer], given: Given) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for layer in layers:
            given(layer, args[0] if args else next(iter(kwargs.values())))

    return hook


def _attention_hook(layers: list[LinearLayer], output: list[LinearLayer], given: Given) -> Any:
    """Of attention, whose output projection is never called as a module.

    What that is given is the output of the same attention with the identity in its place.
    """
    inside = False

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal inside
        assert isinstance(module, nn.MultiheadAttention)
        if inside:
            return
        keys = ("query", "key", "value")
        batched = [*args[:3], *(kwargs[key] for key in keys[len(args) :] if key in kwargs)]
        inputs = [one if module.batch_first else one.transpose(0, -2) for one in batched]
        for layer, one in zip(layers, inputs, strict=True):
            given(layer, one)
        if not output:
            return
        width, weight = module.embed_dim, module.out_proj.weight
        plain = {"out_proj.weight": torch.eye(width, device=weight.device, dtype=weight.dtype)}
        if (bias := cast("Tensor | None", module.out_proj.bias)) is not None:
            plain["out_proj.bias"] = torch.zeros_like(bias)
        inside = True
        try:
            mixed = functional_call(module, plain, args, kwargs)[0]
        finally:
            inside = False
        for layer in output:
            given(layer, mixed if module.batch_first else mixed.transpose(0, -2))

    return hook
