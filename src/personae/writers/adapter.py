"""A LoRA adapter on disk, as PEFT and the engines that serve adapters read it.

`adapter_model.safetensors` holds A (rank, in) and B (out, rank) of each module, and whole tensors;
`adapter_config.json` says what they are. Alpha is the rank, so that nothing is scaled. There is one
rank for all, smaller ones padded with zeros; or each module has its own, which some engines get
wrong: llama.cpp divides one alpha by each tensor's rank, SGLang makes room for one rank only.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from personae._types import TensorSpec
from personae.writers.checkpoint import CheckpointWriter, file_bytes

ROOT = "base_model.model."
STEM = "adapter_model"
CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class AdapterSpec:
    """What an adapter holds, but for the values.

    Attributes:
        shapes: Module to (out, in) of its weight, whichever way the base stores it; the kernel
            after these, where it is a convolution.
        ranks: Module to the rank of its factors.
        dtype: What factors are stored in.
        whole: Tensors that are stored whole, by their names in memory.
        embeddings: Those of the modules that are embeddings.
    """

    shapes: Mapping[str, tuple[int, ...]]
    ranks: Mapping[str, int]
    dtype: torch.dtype
    whole: Sequence[TensorSpec] = ()
    embeddings: frozenset[str] = frozenset()

    @property
    def specs(self) -> list[TensorSpec]:
        """Of all tensors, as they are stored."""
        found = [replace(spec, name=self.key(spec.name)) for spec in self.whole]
        for module, (rows, *others) in self.shapes.items():
            a, b = self.keys(module)
            rank = self.ranks[module]
            found.append(TensorSpec(a, (rank, *others), self.dtype))
            found.append(TensorSpec(b, (rows, rank, *(1 for _ in others[1:])), self.dtype))
        return found

    def keys(self, module: str) -> tuple[str, str]:
        """What A and B of a module are stored as."""
        if module in self.embeddings:
            return f"{ROOT}{module}.lora_embedding_A", f"{ROOT}{module}.lora_embedding_B"
        return f"{ROOT}{module}.lora_A.weight", f"{ROOT}{module}.lora_B.weight"

    def key(self, name: str) -> str:
        """What a whole tensor is stored as; adapted modules are wrapped, with all they have."""
        module, _, last = name.rpartition(".")
        return f"{ROOT}{module}.base_layer.{last}" if module in self.shapes else ROOT + name

    @property
    def nbytes(self) -> int:
        """Bytes of the weights file, its header included."""
        return file_bytes(self.specs)


class AdapterWriter:
    """Writes the weights of an adapter into a directory, in any order, from any thread."""

    def __init__(self, directory: Path, spec: AdapterSpec) -> None:
        """Write the header; see `CheckpointWriter`."""
        self._spec = spec
        self._writer = CheckpointWriter(
            directory,
            spec.specs,
            shard_bytes=sys.maxsize,
            stem=STEM,
            computed=[key for module in spec.shapes for key in spec.keys(module)],
        )

    def write_factors(
        self, module: str, b: Float[Tensor, "out rank"], a: Float[Tensor, "rank in"]
    ) -> None:
        """Write both factors of a module, in the dtype of the adapter, padded to its rank.

        Of a convolution they are of the matrix (out, the rest).
        """
        key_a, key_b = self._spec.keys(module)
        rank, (_, *others) = self._spec.ranks[module], self._spec.shapes[module]
        missing = rank - a.shape[0]
        a = torch.nn.functional.pad(a, (0, 0, 0, missing)).view(rank, *others)
        b = torch.nn.functional.pad(b, (0, missing))
        self._writer.write(key_a, a)
        self._writer.write(key_b, b.view(*b.shape, *(1 for _ in others[1:])))

    def write_whole(self, name: str, tensor: Tensor) -> None:
        """Write a tensor that is stored whole, by its name in memory."""
        self._writer.write(self._spec.key(name), tensor)

    def __enter__(self) -> "AdapterWriter":
        """Return the writer."""
        return self

    def __exit__(self, *error: Any) -> None:
        """Close, or after an error only release the file."""
        self._writer.__exit__(*error)


def adapter_config(
    spec: AdapterSpec,
    targets: Sequence[str],
    *,
    base: str,
    revision: str | None,
    task_type: str | None,
    model_class: str | None,
    transposed: bool,
    saved: Sequence[str],
    bias: str = "none",
) -> bytes:
    """The text of `adapter_config.json`.

    Args:
        spec: What the adapter holds.
        targets: Names that tell the adapted modules.
        base: Path or hub id of the model it is for.
        revision: The hub commit of that.
        task_type: PEFT's type of the task.
        model_class: The class of the model, where PEFT has no type for its task.
        transposed: Whether weights are stored (in, out), as in GPT-2.
        saved: Modules that are stored whole.
        bias: Which biases are stored whole beside them, in PEFT's words.
    """
    most = max(spec.ranks.values())
    differ = len({*spec.ranks.values()}) > 1
    # PEFT takes the first pattern that a name ends with: the longest names first.
    ordered = sorted(spec.ranks.items(), key=lambda pair: (-len(pair[0]), pair[0]))
    own = dict(ordered) if differ else {}
    mapping = {"base_model_class": model_class, "parent_library": "transformers"}
    content = {
        "peft_type": "LORA",
        "task_type": task_type,
        "auto_mapping": mapping if model_class and not task_type else None,
        "base_model_name_or_path": base,
        "revision": revision,
        "r": most,
        "lora_alpha": most,
        "rank_pattern": own,
        "alpha_pattern": own,
        "target_modules": list(targets),
        "modules_to_save": list(saved) or None,
        "fan_in_fan_out": transposed,
        "bias": bias,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
