"""Tasks added in the forward pass: what a task changes of each module, and how it computes then.

A change that is a product of two thin factors is added to what the module computes (Y = XWᵀ +
(XRᵀ)Lᵀ for a linear layer; the rows of L that are looked up, times R, for an embedding). Every
other change is a tensor that the module has instead of its own. Modules are never changed for it:
a module's twin shares everything with it but those tensors, so that any number of threads compute
with one model.

Changes are decoded when a module is called, and forgotten after it unless whoever holds them keeps
them (see `cache`): until then they are what the pack stores.

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

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.left.nbytes + self.right.nbytes


Held = Callable[[str, Callable[[], Any]], Any]
"""Gives the change of a tensor by its name: one that is held, or else what the function makes."""


@dataclass
class Path:
    """What one task changes of one module.

    Attributes:
        module: The module.
        whole: What it calls a tensor to what gives the tensor instead.
        low_rank: The same to what gives the change of a matrix.
    """

    module: nn.Module
    whole: dict[str, Callable[[], Tensor]] = field(default_factory=dict[str, Any])
    low_rank: dict[str, Callable[[], LowRank]] = field(default_factory=dict[str, Any])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module computes for the task."""
        module = self.module
        if self.whole:
            module = twin(module, {name: given() for name, given in self.whole.items()})
        added = adding(self.module) if self.low_rank.keys() == {"weight"} else None
        if self.low_rank and added is None:
            changes = {name: given() for name, given in self.low_rank.items()}
            summed = {n: get(self.module, n) + c.left @ c.right for n, c in changes.items()}
            module = twin(module, summed)
        result = type(module).forward(module, *args, **kwargs)
        if added is None:
            return result
        given = args[0] if args else next(iter(kwargs.values()))
        return result + added(self.module, given, self.low_rank["weight"]())


Paths = dict[int, Path]
"""What one task changes of all modules of a shell, by their ids."""


def paths_of(variant: Variant, shell: Shell, view: nn.Module, held: Held) -> Paths:
    """What a task changes of a shell; nothing is decoded yet.

    Args:
        variant: The task.
        shell: The shell.
        view: Its module with the task's configuration.
        held: Gives decoded changes.
    """
    paths: Paths = {}
    for name, places in changed(variant, shell).items():
        of_rank = factor_rank(variant, name) is not None
        decode = functools.partial(factors if of_rank else whole, variant, name, places[0])
        given = functools.partial(held, name, decode)
        for unit in (unit for place in places for unit in shell.units[id(place)]):
            module = view if unit.module is shell.module else unit.module
            path = paths.setdefault(id(unit.module), Path(module))
            (path.low_rank if of_rank else path.whole)[unit.name] = given
    return paths


def factors(variant: Variant, name: str, place: Tensor) -> LowRank:
    """Decode the change of a matrix, for where it is in memory.

    Raises:
        PackError: if the task's file is damaged.
    """
    found = variant.factors(name, place.device)
    assert found is not None, f"'{name}' has a rank"
    return LowRank(*(factor.to(place.device, place.dtype) for factor in found))


def whole(variant: Variant, name: str, place: Tensor) -> Tensor:
    """Decode a tensor, for where it is in memory.

    Raises:
        PackError: if the task's file is damaged.
    """
    return variant.value(name).to(place.device, place.dtype)


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
