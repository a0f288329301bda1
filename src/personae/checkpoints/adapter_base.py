"""The base of adapters as they tell it themselves: names and shapes of the weights they adapt.

That is all a merge of adapters into one needs, unless they store tensors whole: no base, however
large, has to be at hand.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from personae.checkpoints.adapter_files import (
    CONFIG_FILE,
    AdapterConfig,
    kept_pair,
    read_adapter_config,
    sort_stored,
)
from personae.checkpoints.opening import adapter_config_file, open_checkpoint
from personae.errors import CheckpointError, Faults

_GIVE_BASE = "Give the base (base_model)."


def base_of_adapters(experts: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights without values, on the meta device.

    Args:
        experts: Name to path or hub id of the adapter.

    Raises:
        CheckpointError: if an expert is no such adapter, or they do not tell of one base; every
            fault at once.
    """
    faults = Faults()
    weights: dict[str, Tensor] = {}
    said: dict[str, str] = {}
    for name, source in experts.items():
        try:
            config, own = _adapted_weights(source)
        except CheckpointError as error:
            for text in error.faults or (str(error),):
                faults.add(f"Expert '{name}': {text}")
            continue
        for weight, tensor in own.items():
            known = weights.setdefault(weight, tensor)
            if known.shape != tensor.shape:
                faults.add(
                    f"Expert '{name}' adapts '{weight}' of shape {tuple(tensor.shape)}, another "
                    f"expert of {tuple(known.shape)}: they are not of one base. {_GIVE_BASE}"
                )
        said[name] = config.base_model_name_or_path or "nothing"
    if len({*said.values()}) > 1 or "nothing" in said.values():
        told = ", ".join(f"'{name}' {base}" for name, base in said.items())
        faults.add(
            "Without a base, adapters have to say the same one in base_model_name_or_path; they "
            f"say: {told}. {_GIVE_BASE}"
        )
    faults.raise_if_any(CheckpointError)
    return weights


def _adapted_weights(source: Any) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """What an adapter says of itself, and the weights it adapts.

    Raises:
        CheckpointError: if it cannot be read, or is no adapter in PEFT's format.
    """
    tensors = open_checkpoint(source, as_stored=True)
    try:
        path = adapter_config_file(source)
        if path is None:
            raise CheckpointError(
                f"{tensors.source} is no adapter in PEFT's format: it has no {CONFIG_FILE}. "
                f"{_GIVE_BASE}"
            )
        config, faults = read_adapter_config(path), Faults()
        pairs, _ = sort_stored([*tensors.specs, *tensors.tied], tensors.source, faults)
        faults.raise_if_any(CheckpointError)
        found: dict[str, Tensor] = {}
        for pair in (kept_pair(pair, tensors.tied) for pair in pairs):
            a, b = tensors.specs[pair.a], tensors.specs[pair.b]
            if [*config.parameters_of(pair.module), "weight"][0] != "weight" or pair.inside:
                faults.add(
                    f"{tensors.source} adapts parameters of '{pair.module}' (target_parameters), "
                    f"and A and B do not tell what shape they have. {_GIVE_BASE}"
                )
                continue
            if min(len(a.shape), len(b.shape)) < 2:
                faults.add(
                    f"{tensors.source}: A {a.shape} and B {b.shape} of '{pair.module}' are no "
                    "matrices. Save the adapter again."
                )
                continue
            shape = (b.shape[0], *a.shape[1:])
            if pair.embedding or (config.fan_in_fan_out and len(shape) == 2):
                shape = shape[::-1]
            weight = torch.empty(shape, dtype=a.dtype, device="meta")
            found[f"{pair.module}.weight"] = weight
        faults.raise_if_any(CheckpointError)
        return config, found
    finally:
        tensors.close()
