"""What of a module generates, and the token it fills short sequences up with."""

from collections.abc import Callable
from typing import Any

from personae.errors import MethodError


def generating(model: Any) -> Callable[..., Any]:
    """What generates.

    Raises:
        MethodError: if the model's class does not.
    """
    if not hasattr(model, "generate"):
        raise MethodError(f"{type(model).__name__} does not generate: call it instead.")
    return model.generate


def padding_of(model: Any) -> int:
    """The token that ends sequences which are shorter than others."""
    told = model.generation_config
    ends = told.eos_token_id
    found = (told.pad_token_id, ends[0] if isinstance(ends, list) else ends, 0)
    return next(token for token in found if token is not None)
