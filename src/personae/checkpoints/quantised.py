"""Checkpoints whose weights are stored as codes, told by what they hold.

Every quantiser names its tensors its own way, but each stores integers that stand for weights, and
beside them the floating numbers (scales, zeros, codebooks) that turn these into values. An average
of such scales beside the base's codes is no model, and nothing would show it. One-byte floats and
integers under a weight's own name are refused earlier (`dtype_faults`).
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from personae._types import TensorSpec
from personae.checkpoints._protocol import Checkpoint
from personae.checkpoints.vocabulary import read_json
from personae.errors import CheckpointError

_FIELD = "quantization_config"
# Integers that are no codes: places, counters, masks.
_BUFFER = re.compile(
    r"(^|\.|_)(position_ids|token_type_ids|relative_position_index|num_batches_tracked"
    r"|(attn|attention|self)\.(bias|mask|causal_mask))$"
)
_SCALES = re.compile(
    r"(?i)(^|_)(scales?|zeros?|zero_point|shift|absmax|scb|codebooks?|centroids|quant_map|lut|su|sv"
    r"|tables2?)(_|$)"
)


def check_not_quantised(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that holds codes.

    That is: an integer matrix beside scales, or any integers but known buffers where config.json
    has a `quantization_config`. Such a field beside plain weights says only how to load them.

    Raises:
        CheckpointError: naming a tensor of codes, and what tells that it is one.
    """
    suspects = [spec for spec in checkpoint.specs.values() if _may_be_codes(spec)]
    if not suspects:
        return
    beside = dict(_with_scales(suspects, checkpoint.specs))
    method = quantisation_of(checkpoint)
    found = next((spec for spec in suspects if spec.name in beside), suspects[0])
    if method is None and (found.name not in beside or len(found.shape) < 2):
        return
    told = [f"config.json names the quantiser {method}"] if method else []
    told += [f"'{beside[found.name]}' lies beside it"] if found.name in beside else []
    raise CheckpointError(
        f"{checkpoint.source} is quantised: '{found.name}' holds {found.dtype_name} codes "
        f"({', '.join(told)}). Pass the checkpoint it was quantised from, or load it, call "
        "dequantize() and save it."
    )


def quantisation_of(checkpoint: Checkpoint) -> str | None:
    """The quantiser that config.json names; None if it names none."""
    if "config.json" not in checkpoint.auxiliary_files:
        return None
    config: Any = read_json(checkpoint.auxiliary_files["config.json"])
    said = config.get(_FIELD) if isinstance(config, Mapping) else None
    if not said:
        return None
    return repr(said.get("quant_method", _FIELD) if isinstance(said, Mapping) else said)


def _may_be_codes(spec: TensorSpec) -> bool:
    return not spec.is_floating and spec.dtype_name != "bool" and not _BUFFER.search(spec.name)


def _with_scales(
    suspects: list[TensorSpec], specs: Mapping[str, TensorSpec]
) -> Iterator[tuple[str, str]]:
    """Yield suspects that have a scale in their module, or under their own name, with its name."""
    scales: dict[str, str] = {}
    for name in specs:
        module, _, last = name.rpartition(".")
        if module and _SCALES.search(last):
            scales.setdefault(module, name)
    for spec in suspects:
        scale = scales.get(spec.name, scales.get(spec.name.rpartition(".")[0]))
        if scale is not None and scale != spec.name:
            yield spec.name, scale
