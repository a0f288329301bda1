"""Tasks, metrics and accuracy–size records: how good a model is, and what it costs to keep."""

from personae.evaluate.evaluation import evaluate_checkpoint, evaluate_model
from personae.evaluate.merged import evaluate_merge
from personae.evaluate.models import load_model, save_model
from personae.evaluate.records import Record, record, records_from_json, records_to_json
from personae.evaluate.tasks import Examples, Task
from personae.evaluate.thresholds import choose_thresholds

__all__ = [
    "Examples",
    "Record",
    "Task",
    "choose_thresholds",
    "evaluate_checkpoint",
    "evaluate_merge",
    "evaluate_model",
    "load_model",
    "record",
    "records_from_json",
    "records_to_json",
    "save_model",
]
