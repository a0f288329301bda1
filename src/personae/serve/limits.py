"""How much one request, and all that wait, may ask for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds that every request is held to.

    Attributes:
        body_bytes: Of a request's body.
        tokens: Of one row, its answer included; the model's own bound holds too.
        queue: Rows that wait.
        seconds: Until a request is given up.
    """

    body_bytes: int = 8_000_000
    tokens: int = 8192
    queue: int = 256
    seconds: float = 120.0
