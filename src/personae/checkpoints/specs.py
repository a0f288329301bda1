"""What every reader asks of a header: known dtypes, known names, rows in range, shared storage."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from personae._types import TensorSpec
from personae.checkpoints.naming import shown
from personae.errors import CheckpointError, nearest

READABLE = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The safetensors names of the dtypes read here."""

_NARROW = re.compile(r"(?i)(F|float|q?u?int|I|U|bits)[1-8]([^0-9]|$)")  # not complex128, C64
_QUANTISED_ENDINGS = (".weight", ".qweight", ".weight_packed", "_blocks")


def dtype_faults(where: str, dtypes: Mapping[str, torch.dtype | str]) -> list[str]:
    """Say why tensors of these dtypes cannot be read: a text for each dtype, not each tensor.

    Integer buffers are fine; integer *weights* are codes of a quantised model, on which
    arithmetic would be meaningless.

    Args:
        where: The file or model the tensors are in, for the texts.
        dtypes: By name, torch dtypes or the names a safetensors header gives.
    """
    unknown, codes = dict[str, list[str]](), dict[str, list[str]]()
    for name, dtype in dtypes.items():
        known = READABLE.get(dtype) if isinstance(dtype, str) else dtype
        if known is None or known not in READABLE.values():
            unknown.setdefault(str(dtype).removeprefix("torch."), []).append(name)
        elif name.endswith(_QUANTISED_ENDINGS) and not known.is_floating_point:
            codes.setdefault(str(known).removeprefix("torch."), []).append(name)
    faults = [
        f"{where}: {_first_of(names, 'has', 'have')} dtype {dtype}, which is not supported. "
        f"{'Dequantise it first' if _NARROW.match(dtype) else 'Convert it'}: "
        "float64, float32, float16, bfloat16, integers and bool are."
        for dtype, names in unknown.items()
    ]
    faults += [
        f"{where}: {_first_of(names, 'holds', 'hold')} {dtype} codes of a quantised weight. "
        "Pass the checkpoint it was quantised from, or dequantise it first."
        for dtype, names in codes.items()
    ]
    return faults


def _first_of(names: Sequence[str], one: str, several: str) -> str:
    """One name and how many others, with the verb that they take."""
    rest = len(names) - 1
    return f"'{names[0]}' and {rest} other tensor(s) {several}" if rest else f"'{names[0]}' {one}"


def by_name(specs: Iterable[TensorSpec]) -> dict[str, TensorSpec]:
    """Return the specs by name, sorted."""
    return {spec.name: spec for spec in sorted(specs, key=lambda spec: spec.name)}


def no_such_tensor(source: str, name: str, specs: Mapping[str, TensorSpec]) -> NoReturn:
    """Refuse a name that is not in the checkpoint.

    Raises:
        CheckpointError: Always.
    """
    raise CheckpointError(f"{source} has no tensor '{name}'. {nearest(name, specs)}")


def check_rows(source: str, spec: TensorSpec, start: int, stop: int) -> None:
    """Check that rows `start:stop` exist along the first axis.

    Raises:
        CheckpointError: The tensor has no axis, or not that many rows.
    """
    rows = spec.shape[0] if spec.shape else 0
    if not spec.shape or not 0 <= start <= stop <= rows:
        raise CheckpointError(
            f"{source}: rows {start}:{stop} of '{spec.name}' were asked for; "
            f"its shape is {spec.shape}. Ask for rows within 0:{rows}."
        )


def find_tied(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Map each tensor that is the same view of the same storage as an earlier one to that one.

    Two different views of one storage (slices of a fused weight) are separate tensors. Tensors
    without an address (empty, or on the meta device) are the same only if they are one object.
    """
    kept: dict[tuple[object, ...], str] = {}
    tied: dict[str, str] = {}
    for name, tensor in tensors.items():
        address = 0 if tensor.is_meta else tensor.data_ptr()
        identity = (address, tensor.device) if address else (id(tensor),)
        view = (*identity, tuple(tensor.shape), tensor.stride(), tensor.dtype)
        first = kept.setdefault(view, name)
        if first != name:
            tied[name] = first
    return tied


def empty_fault(whose: str, names: Sequence[str]) -> str:
    """What is to be said of tensors of size 0 that stand where there should be values."""
    return (
        f"{whose} has {len(names)} tensor(s) of size 0 where there should be values: "
        f"{shown(names)}. ZeRO-3 saves these where it does not gather weights: set "
        "stage3_gather_16bit_weights_on_model_save and save again, or run zero_to_fp32.py on its "
        "checkpoint."
    )
