"""Opening and saving a checkpoint as a `transformers` model, quietly."""

from pathlib import Path
from typing import Any

from torch import nn

from personae._quiet import quiet_transformers
from personae.errors import CheckpointError
from personae.evaluate.tasks import Task
from personae.evaluate.zero_shot import ZeroShotModel


def load_model(directory: Path, model_class: str, **options: Any) -> nn.Module:
    """Load a checkpoint in fp32, in evaluation mode.

    Args:
        directory: A checkpoint directory.
        model_class: Name of a class of `transformers`.
        **options: For its `from_pretrained`, such as `num_labels`.

    Raises:
        CheckpointError: if there is no such directory, or no such model in it.
    """
    import transformers

    if not directory.is_dir():
        raise CheckpointError(
            f"no checkpoint directory at '{directory}'. Give the directory that holds "
            "config.json and the weights."
        )
    with quiet_transformers():
        loader = getattr(transformers, model_class)
        try:
            return loader.from_pretrained(directory, dtype="float32", **options).eval()
        except Exception as error:  # transformers raises many kinds; all mean the same here
            said = (str(error).strip() or repr(error)).splitlines()[0]
            raise CheckpointError(
                f"transformers cannot load '{directory}' as {model_class}: {said}"
            ) from error


def load_task_model(directory: Path, task: Task) -> nn.Module:
    """Load a checkpoint as the model that answers a task; see `load_model`."""
    return for_task(load_model(directory, task.model_class), task)


def for_task(model: nn.Module, task: Task) -> nn.Module:
    """The model that answers a task: as it is, or with the head that is made of class names."""
    return model if task.zero_shot is None else ZeroShotModel(model, task.zero_shot).eval()


def save_model(model: nn.Module, directory: Path) -> None:
    """Write a `transformers` model as a checkpoint directory."""
    with quiet_transformers():
        model.save_pretrained(directory)  # pyright: ignore[reportCallIssue]
