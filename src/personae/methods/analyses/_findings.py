"""What an analysis is given and finds: plain values that print as JSON."""

from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

Findings = dict[str, Any]
"""Name to a number, a list of numbers, or findings one level down."""

Side = Literal["horizontal", "vertical"]


def oriented(stack: Float[Tensor, "expert out in"], direction: Side) -> Float[Tensor, "expert _ _"]:
    """The matrices as they are set side by side: DRM-V is DRM-H of the transposes."""
    return stack.mT if direction == "vertical" else stack
