"""A device that is not there: its name is `meta`, its values lie on the CPU.

Code that runs on it would run on a GPU as far as devices go: an operation that mixes a tensor of
this device with one of the CPU (other than a scalar) fails as it would there, and so does reading
values in another way than `float(…)`, `.tolist()` or `.cpu()`, as numpy would.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map

DEVICE = torch.device("meta")
_MOVES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class _There(Tensor):
    """A tensor of the device; `values` are its values, on the CPU."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> "_There":
        made: Any = Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=DEVICE,
        )
        made.values = values
        return made

    def tolist(self) -> Any:  # refused to subclasses
        return self.values.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class PretendDevice(TorchDispatchMode):
    """While active, tensors can be made on the device and moved to it."""

    def __enter__(self) -> Any:
        self._tensor = torch.tensor
        torch.tensor = self._made_from_values
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.tensor = self._tensor
        super().__exit__(*error)

    def _made_from_values(self, data: Any, *, device: Any = None, **options: Any) -> Tensor:
        """`torch.tensor`, which makes true meta tensors without asking a mode."""
        made = self._tensor(data, **options)
        return made if device is None else made.to(device)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors: list[Tensor] = []
    tree_map(lambda x: tensors.append(x) if isinstance(x, Tensor) else None, (args, kwargs))
    there = any(isinstance(tensor, _There) for tensor in tensors)
    asked = kwargs.get("device")
    if asked is not None:
        there = torch.device(asked) == DEVICE
        kwargs = kwargs | {"device": "cpu"}
    if there and func not in _MOVES:
        foreign = [t for t in tensors if not isinstance(t, _There) and t.ndim]
        assert not foreign, f"{func} mixes devices: a tensor of shape {foreign[0].shape} on the CPU"

    def values(x: Any) -> Any:
        return x.values if isinstance(x, _There) else x

    found = func(*tree_map(values, args), **tree_map(values, kwargs))
    if not there:
        return found
    out = tree_map(lambda x: _There(x) if isinstance(x, Tensor) else x, found)
    return out if asked is not None else return_and_correct_aliasing(func, args, kwargs, out)
