"""Results that are not one model: what weighs the experts sample by sample, and runs."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor, nn

from personae.errors import MethodError, nearest


class RoutedModel(nn.Module, ABC):
    """Experts mixed for each sample by itself, whatever else is in its batch.

    Its `state_dict` is all that was learned and stored; the architecture is the experts'.

    Attributes:
        private: Task to the parameters and buffers that stay that expert's own, such as its head.
    """

    def __init__(self, model: nn.Module, private: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take the architecture, and each task's private part."""
        super().__init__()
        self._model = (model,)  # not a part of the state
        self.private = {task: dict(own) for task, own in private.items()}

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks, in order."""
        return tuple(self.private)

    @property
    def model(self) -> nn.Module:
        """The architecture, whose own weights do not count."""
        return self._model[0]

    def own(self, head: str) -> dict[str, Tensor]:
        """The private part of a task.

        Raises:
            MethodError: if there is no such task.
        """
        if head not in self.private:
            raise MethodError(f"There is no task '{head}'. {nearest(head, self.private)}")
        return self.private[head]

    @abstractmethod
    def forward(self, head: str, **batch: Tensor) -> Float[Tensor, "sample *token output"]:
        """The logits that a task's own head gives for these samples."""
        ...
