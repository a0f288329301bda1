"""Tasks added in the forward pass: what a task changes of each module, and how it computes then.

A change that is a product of two thin factors is added to what the module computes (Y = XWᵀ +
(XRᵀ)Lᵀ for a linear layer; the rows of L that are looked up, times R, for an embedding). Every
other change is a tensor that the module has instead of its own. Modules are never changed for it:
a module's twin shares everything with it but those tensors, so that any number of threads compute
with one model.

Of modules that use a matrix in another way, as `nn.MultiheadAttention` its three projections in
one, the matrix is added up when they are called and forgotten afterwards.
"""

import copy
import functools
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from personae.runtime.shells import Shell
from personae.runtime.variants import Variant
from personae.runtime.watch import watching


class LowRank(NamedTuple):
    """A change `left @ right` of a matrix as it is stored."""

    left: Float[Tensor, "rows rank"]
    right: Float[Tensor, "rank columns"]


@dataclass
class Path:
    """What one task changes of one module.

    Attributes:
        module: The module.
        whole: What it calls a tensor to the tensor instead.
        low_rank: The same to the change of a matrix.
    """

    module: nn.Module
    whole: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    low_rank: dict[str, LowRank] = field(default_factory=dict[str, LowRank])

    @functools.cached_property
    def twin(self) -> nn.Module:
        """The module with the whole tensors."""
        return twin(self.module, self.whole)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module computes for the task."""
        added = adding(self.module) if self.low_rank.keys() == {"weight"} else None
        if not self.low_rank or added is not None:
            result = self.twin.forward(*args, **kwargs)
            if added is None:
                return result
            given = args[0] if args else next(iter(kwargs.values()))
            return result + added(self.module, given, self.low_rank["weight"])
        summed = {
            name: get(self.module, name) + change.left @ change.right
            for name, change in self.low_rank.items()
        }
        return twin(self.twin, summed).forward(*args, **kwargs)


class Paths(dict[int, Path]):
    """What one task changes of all modules of a shell, by their ids.

    Attributes:
        nbytes: Bytes of its tensors.
    """

    nbytes: int = 0


def paths_of(variant: Variant, shell: Shell, view: nn.Module) -> Paths:
    """Decode what a task changes of a shell.

    Args:
        variant: The task.
        shell: The shell.
        view: Its module with the task's configuration.

    Raises:
        PackError: if the task's file is damaged.
    """
    paths = Paths()
    for name, places in changed(variant, shell).items():
        dtype, device = places[0].dtype, places[0].device
        found = variant.factors(name) if factor_rank(variant, name) is not None else None
        if found is None:
            change = variant.value(name).to(device, dtype)
            paths.nbytes += change.nbytes
        else:
            change = LowRank(*(factor.to(device, dtype).contiguous() for factor in found))
            paths.nbytes += change.left.nbytes + change.right.nbytes
        for unit in (unit for place in places for unit in shell.units[id(place)]):
            module = view if unit.module is shell.module else unit.module
            path = paths.setdefault(id(unit.module), Path(module))
            if isinstance(change, LowRank):
                path.low_rank[unit.name] = change
            else:
                path.whole[unit.name] = change
    return paths


def paths_bytes(variant: Variant, shell: Shell) -> int:
    """Bytes of `paths_of`, without decoding anything."""
    total = 0
    for name, places in changed(variant, shell).items():
        spec, rank = variant.outline.specs[name], factor_rank(variant, name)
        numel = spec.numel if rank is None else rank * sum(spec.shape)
        total += numel * places[0].dtype.itemsize
    return total


def changed(variant: Variant, shell: Shell) -> dict[str, tuple[Tensor, ...]]:
    """The tensors in memory that a task has otherwise than the reference, by names in files."""
    of = variant.outline
    names = {*variant.coded, *of.kept}
    return {name: places for name, places in shell.places.items() if name in names}


def factor_rank(variant: Variant, name: str) -> int | None:
    """The rank of the factors that are taken; None for a tensor that is taken whole."""
    whole = name in variant.outline.kept or name not in variant.coded
    return None if whole else variant.factor_rank(name)


def patch(
    module: nn.Module,
    current: Callable[[], Mapping[int, Callable[..., Any]] | None],
    key: int,
) -> Callable[[], None]:
    """Let a module compute with the path that is in force when it is called.

    Args:
        module: The module.
        current: All paths in force in this thread.
        key: What the module's path goes by there.

    Returns:
        What undoes it.
    """
    original = type(module).forward

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        path = (current() or {}).get(key)
        watch = watching()
        with nullcontext() if watch is None else watch.inside(module, (args, kwargs)):
            return original(module, *args, **kwargs) if path is None else path(*args, **kwargs)

    # A layer around attention computes without calling it, unless that has a hook.
    hook = module.register_forward_pre_hook(lambda *_: None)
    if not isinstance(module, nn.MultiheadAttention):
        hook.remove()
    module.forward = forward

    def undo() -> None:
        module.__dict__.pop("forward", None)
        hook.remove()

    return undo


def twin(module: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """A module that shares all with another but these of its tensors."""
    other = copy.copy(module)
    other.__dict__.pop("forward", None)
    attributes = other.__dict__
    for kind in ("_parameters", "_buffers", "_modules"):
        attributes[kind] = dict(attributes[kind])
    inner: dict[str, dict[str, Tensor]] = {}
    for name, value in values.items():
        outer, dot, rest = name.partition(".")
        if dot:
            inner.setdefault(outer, {})[rest] = value
        elif outer in other._buffers:
            other._buffers[outer] = value
        else:
            other._parameters[outer] = nn.Parameter(value, requires_grad=False)
    for name, theirs in inner.items():
        other._modules[name] = twin(module.get_submodule(name), theirs)
    if isinstance(other, nn.RNNBase):  # which keeps a list of its own
        attributes["_flat_weights"] = [getattr(other, name) for name in other._flat_weights_names]
    return other


def get(module: nn.Module, name: str) -> Tensor:
    """A tensor of a module or of one inside it."""
    outer, _, last = name.rpartition(".")
    return getattr(module.get_submodule(outer), last)


Adding = Callable[[nn.Module, Tensor, LowRank], Tensor]


def adding(module: nn.Module) -> Adding | None:
    """How a change of the module's matrix is added to what it computes; None where it cannot be."""
    if type(module).forward is nn.Linear.forward:
        return _linear
    if is_transposed(module):
        return _transposed
    if isinstance(module, nn.Embedding) and module.max_norm is None:
        return _embedding
    return None


def is_transposed(module: nn.Module) -> bool:
    """Whether it is GPT-2's Conv1D: a linear layer whose matrix is (in, out)."""
    return type(module).__name__ == "Conv1D"


def _linear(_: nn.Module, given: Tensor, change: LowRank) -> Tensor:
    return functional.linear(functional.linear(given, change.right), change.left)


def _transposed(_: nn.Module, given: Tensor, change: LowRank) -> Tensor:
    return given @ change.left @ change.right


def _embedding(module: nn.Module, given: Tensor, change: LowRank) -> Tensor:
    """Look rows up as the module does, which may scale or shift, in the left factor."""
    return twin(module, {"weight": change.left}).forward(given) @ change.right
