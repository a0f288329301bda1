"""A watched forward pass: whether tasks can be added to modules as the modules are called.

Two things no list of layers tells. A model may read a tensor without calling the module that has it
(DeBERTa does so with its relative positions): what is added to that module's result is lost. And a
module may be given no rows of the batch (Swin's tables of positions pass through linear layers):
rows of several tasks cannot be told apart in what it computes.
"""

import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

_here = threading.local()


def watching() -> "Watch | None":
    """The watch of this thread; None if nothing is watched."""
    return getattr(_here, "watch", None)


class Watch(TorchFunctionMode):
    """Watches what is computed in this thread while it is entered.

    Attributes:
        strays: Ids of tensors that are read while no module that has them computes.
        without_rows: Modules that are given nothing which was computed from the inputs.
    """

    def __init__(self, units: Mapping[int, Sequence[nn.Module]], inputs: Any) -> None:
        """Begin to watch.

        Args:
            units: Ids of tensors to the modules that compute with them.
            inputs: What is computed from.
        """
        super().__init__()
        self.strays: set[int] = set()
        self.without_rows: list[nn.Module] = []
        self._units = {key: {id(module) for module in modules} for key, modules in units.items()}
        self._inside: list[int] = []
        self._from_inputs = WeakIdKeyDictionary()
        self._mark(inputs)

    def __enter__(self) -> "Watch":
        """Watch this thread."""
        _here.watch = self
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        """Watch no longer."""
        _here.watch = None
        super().__exit__(*raised)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Note what a function reads, and whether its result comes from the inputs."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        if any(isinstance(one, Tensor) for one in tree_leaves(result)):
            for one in given:
                owners = self._units.get(id(one), ())
                if owners and not any(inside in owners for inside in self._inside):
                    self.strays.add(id(one))
        if any(one in self._from_inputs for one in given):
            self._mark(result)
            if func is Tensor.__setitem__:
                self._mark(args[0])
        return result

    @contextmanager
    def inside(self, module: nn.Module, inputs: Any) -> Generator[None]:
        """While a module computes from these inputs."""
        given = [one for one in tree_leaves(inputs) if isinstance(one, Tensor)]
        if not any(one in self._from_inputs for one in given):
            self.without_rows.append(module)
        self._inside.append(id(module))
        try:
            yield
        finally:
            self._inside.pop()

    def _mark(self, computed: Any) -> None:
        for one in tree_leaves(computed):
            if isinstance(one, Tensor):
                self._from_inputs[one] = True
