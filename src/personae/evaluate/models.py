"""Opening and saving a checkpoint as a `transformers` model, quietly."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from personae.errors import CheckpointError


def load_model(directory: Path, model_class: str, **options: Any) -> nn.Module:
    """Load a checkpoint in fp32, in evaluation mode.

    Args:
        directory: A checkpoint directory.
        model_class: Name of a class of `transformers`.
        **options: For its `from_pretrained`, such as `num_labels`.

    Raises:
        CheckpointError: if there is no such directory.
    """
    import transformers

    if not directory.is_dir():
        raise CheckpointError(
            f"no checkpoint directory at '{directory}'. Give the directory that holds "
            "config.json and the weights."
        )
    with _quiet():
        loader = getattr(transformers, model_class)
        return loader.from_pretrained(directory, dtype="float32", **options).eval()


def save_model(model: nn.Module, directory: Path) -> None:
    """Write a `transformers` model as a checkpoint directory."""
    with _quiet():
        model.save_pretrained(directory)  # pyright: ignore[reportCallIssue]


@contextmanager
def _quiet() -> Generator[None]:
    """Silence load reports and progress bars of `transformers`, then put them back."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
