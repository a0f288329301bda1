"""How to work: workers, memory, device, progress.

Workers and memory never change a byte. A device sums in an order of its own, so that the last bits
of what it computes may differ from the CPU's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from personae.errors import RecipeError
from personae.run.pool import default_workers

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many steps are done, and how many there are."""


def silent(_stage: str, _done: int, _total: int) -> None:
    """Nobody watches."""


def _ignored(_text: str) -> None:
    """Nobody reads."""


def _unrecorded(_name: str, _fact: Any) -> None:
    """Nobody records."""


@dataclass(frozen=True)
class Work:
    """How to work: workers, memory bound, device, progress.

    Attributes:
        workers: Tensors worked on at once; None for one a core.
        memory: Bound in bytes on the working memory of the CPU; None for no bound. What a device
            holds at once is no more than that.
        device: Where deltas are decomposed and decoded: `auto` (CUDA where there is any), `cpu`,
            `cuda` or `cuda:i`. Results come back to the CPU.
        progress: Told how far the work is.
        note: Told, a line each, what a person should know: prefixes, private tensors.
        fact: Told, as plain values under a name, what only the work itself could find.
    """

    workers: int | None = None
    memory: int | None = None
    device: str = "cpu"
    progress: Progress = silent
    note: Callable[[str], None] = _ignored
    fact: Callable[[str, Any], None] = _unrecorded

    @property
    def threads(self) -> int:
        """Number of workers."""
        return self.workers or default_workers()

    @property
    def torch_device(self) -> torch.device:
        """The device to compute on.

        Raises:
            RecipeError: if there is no such device here.
        """
        if self.device == "cpu":
            return torch.device("cpu")
        available = torch.cuda.is_available()
        if self.device == "auto":
            return torch.device("cuda" if available else "cpu")
        kind, _, index = self.device.partition(":")
        if kind != "cuda" or (index and not index.isdigit()):
            raise RecipeError(f"Unknown device '{self.device}'. Give auto, cpu, cuda or cuda:N.")
        if not available or (index and int(index) >= torch.cuda.device_count()):
            raise RecipeError(f"There is no device '{self.device}' here. Give auto or cpu.")
        return torch.device(self.device)
