"""Running a model on a task's test examples."""

from pathlib import Path

from torch import nn

from personae.evaluate.metrics import METRICS, Answers
from personae.evaluate.models import load_task_model
from personae.evaluate.predictions import BATCH, predict
from personae.evaluate.tasks import Task
from personae.run.work import Work


def score(answers: Answers, task: Task) -> float:
    """The score of answers to the test examples, by the task's metric, as a fraction."""
    return METRICS[task.metric].score(answers, task.test["labels"].numpy())


def evaluate_model(model: nn.Module, task: Task, batch_size: int = BATCH) -> float:
    """Return the model's score on the task's test examples, by the task's metric.

    Args:
        model: Takes the names of `task.test` and returns something with `logits`, of shape
            (example, class). It is put into evaluation mode and left where it is.
        task: What to score it on.
        batch_size: Examples at a time.

    Returns:
        The score as a fraction, not in percent.
    """
    return score(predict(model, task, task.test, batch_size=batch_size), task)


def evaluate_checkpoint(directory: Path, task: Task, batch_size: int = BATCH) -> float:
    """Return the score of the checkpoint in `directory`; see `evaluate_model`.

    Raises:
        CheckpointError: if there is no such directory.
    """
    return evaluate_model(load_task_model(directory, task), task, batch_size)


def predict_checkpoint(directory: Path, task: Task, work: Work, stage: str = "") -> Answers:
    """A checkpoint's answers to the test examples, computed on the device of `work`."""
    model = load_task_model(directory, task).to(work.torch_device)
    return predict(model, task, task.test, work=work, stage=stage)
