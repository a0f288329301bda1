"""Whether a class of transformers, by its configuration, fits the tensors of a model.

What a class has and a model lacks is drawn at random, and what only the model has is left out, by
`from_pretrained` with no more than a warning.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from torch import nn

from personae._types import TensorSpec
from personae.checkpoints.published_layouts import in_layer
from personae.errors import CheckpointError

_MOST_TOLD = 3
_MOST_OWN = 2**26
"""Numbers that a class may have beside those of a model, such as masks and tables of positions."""


def check_size(bare: nn.Module, here: Mapping[str, TensorSpec]) -> None:
    """Refuse a class that is larger than a model, before room is made for it.

    Args:
        bare: It without values.
        here: The model's tensors.

    Raises:
        CheckpointError: A tensor has another shape, or there are far more numbers.
    """
    _refuse(type(bare), _larger(bare, here))


def check_loaded(
    model_class: type, told: Mapping[str, Any], here: Mapping[str, TensorSpec]
) -> None:
    """Refuse a class that was given a model with tensors too few or too many, by its own report.

    A pooler that nobody uses may be missing; a tensor of a layer may not, and its matrices may not
    be left over.

    Args:
        model_class: It.
        told: What `from_pretrained` says of loading.
        here: The model's tensors.

    Raises:
        CheckpointError: It lacks tensors of layers, or the model does.
    """
    _refuse(model_class, _misfits(told, here))


def _larger(bare: nn.Module, here: Mapping[str, TensorSpec]) -> Iterator[str]:
    for name, one in bare.state_dict().items():
        if name in here and here[name].shape != tuple(one.shape):
            yield f"'{name}' has shape {here[name].shape}, expected is {tuple(one.shape)}"
    numbers = sum(one.numel() for one in (*bare.parameters(), *bare.buffers()))
    held = sum(spec.numel for spec in here.values())
    if numbers > 2 * held + _MOST_OWN:
        yield f"it is of {numbers:,} numbers, and {held:,} are here"


def _misfits(told: Mapping[str, Any], here: Mapping[str, TensorSpec]) -> Iterator[str]:
    for name in filter(in_layer, sorted(told["missing_keys"])):
        yield f"there is no '{name}'"
    for name in filter(in_layer, sorted(told["unexpected_keys"])):
        if name in here and len(here[name].shape) > 1 and here[name].is_floating:
            yield f"it has no '{name}'"


def _refuse(model_class: type, faults: Iterable[str]) -> None:
    told = [*islice(faults, _MOST_TOLD)]
    if told:
        raise CheckpointError(
            f"{model_class.__name__} of transformers, by the configuration, does not fit the "
            f"tensors that are here: {'; '.join(told)}. Mend the config.json."
        )
