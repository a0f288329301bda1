"""`MODEL+ADAPTER`: a model with an adapter merged into it, as a model of its own."""

from collections.abc import Callable, Mapping
from pathlib import Path

from jaxtyping import Float, Shaped
from torch import Tensor

from personae._types import TensorSpec
from personae.checkpoints._protocol import Checkpoint
from personae.checkpoints.adapter_files import CONFIG_FILE
from personae.checkpoints.folders import AuxiliaryFiles


class AdaptedModel:
    """A model with an adapter merged into it, in the model's own dtype, as PEFT leaves it.

    Its adapter's factors are of this model, and not of the base of a family it may be in, so that
    none are offered.

    Attributes:
        model: The model with its adapter, as the adapter's reader sees it.
    """

    def __init__(self, source: str, model: Checkpoint, beneath: Checkpoint) -> None:
        """See the two as one; reads nothing.

        Args:
            source: What the user wrote.
            model: The adapter on its model.
            beneath: The model.
        """
        self.model, self._beneath = model, beneath
        self.source = source
        known = model.revision is not None and beneath.revision is not None
        self.revision = f"{beneath.revision}+{model.revision}" if known else None
        self.specs: Mapping[str, TensorSpec] = model.specs
        self.tied: Mapping[str, str] = model.tied
        self.copies = model.copies
        files = model.auxiliary_files
        self.auxiliary_files: Mapping[str, Path] = AuxiliaryFiles(
            {name for name in files if name != CONFIG_FILE}, lambda name: files[name]
        )

    def read(self, name: str) -> Shaped[Tensor, "..."]:
        """Return one tensor; see `Checkpoint.read`."""
        return self.model.read(name).to(self.specs[name].dtype)

    def read_rows(self, name: str, start: int, stop: int) -> Shaped[Tensor, "rows *rest"]:
        """Return rows `start:stop`; see `Checkpoint.read_rows`."""
        return self.model.read_rows(name, start, stop).to(self.specs[name].dtype)

    def factors(
        self, name: str
    ) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]] | None:
        """None: they are not of the family's base."""
        return None

    def same_as_base(self, name: str) -> bool:
        """False: which base is meant is not known."""
        return False

    def close(self) -> None:
        """Close both."""
        self.model.close()
        self._beneath.close()


def split_adapter(text: str, is_model: Callable[[str], bool]) -> tuple[str, str] | None:
    """Model and adapter of `MODEL+ADAPTER`; None if no part before a `+` is a model.

    Args:
        text: What a user wrote, that is no path itself.
        is_model: Whether a text is a path that exists, or a hub id.
    """
    pieces = text.split("+")
    for cut in range(1, len(pieces)):
        model, adapter = "+".join(pieces[:cut]), "+".join(pieces[cut:])
        if model and adapter and is_model(model):
            return model, adapter
    return None
