"""Running a model on a task's test examples."""

from pathlib import Path

import torch
from torch import nn

from personae.evaluate.metrics import METRICS
from personae.evaluate.models import load_model
from personae.evaluate.tasks import Task, batches


def evaluate_model(model: nn.Module, task: Task, batch_size: int = 128) -> float:
    """Return the model's score on the task's test examples, by the task's metric.

    Args:
        model: Takes the names of `task.test` and returns something with `logits`, of shape
            (example, class). It is put into evaluation mode and left where it is.
        task: What to score it on.
        batch_size: Examples at a time.

    Returns:
        The score as a fraction, not in percent.
    """
    model.eval()
    device = next(model.parameters()).device
    predictions, labels = [], []
    with torch.inference_mode():
        for batch in batches(task.test, batch_size):
            labels.append(batch.pop("labels"))
            on_device = {name: values.to(device) for name, values in batch.items()}
            predictions.append(model(**on_device).logits.argmax(dim=-1).cpu())
    return METRICS[task.metric](torch.cat(predictions), torch.cat(labels))


def evaluate_checkpoint(directory: Path, task: Task, batch_size: int = 128) -> float:
    """Return the score of the checkpoint in `directory`; see `evaluate_model`.

    Raises:
        CheckpointError: if there is no such directory.
    """
    return evaluate_model(load_model(directory, task.model_class), task, batch_size)
