"""What the two families share: where things lie, and training every expert that is missing."""

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from personae.demo.training import complete_directory
from personae.evaluate import Task, evaluate_model

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("PERSONAE_DATA", REPOSITORY.parent / "shared" / "data"))
RUNS = REPOSITORY / "runs" / "families"
VALIDATION = 500
"""Examples that are chosen on: the last of the training split, in the order they are drawn in."""
TESTED = 500
"""Examples of a test split that are scored, drawn at random: a table's row costs half a minute."""


def say(text: str) -> None:
    """Print one line at once, with the time of day."""
    print(time.strftime("%H:%M:%S"), text, flush=True)


def classes_of(directory: Path) -> tuple[str, ...]:
    """Return the class names of a data set, in label order."""
    return tuple(json.loads((directory / "classes.json").read_text("utf-8"))["classes"])


def train_experts(
    tasks: Sequence[Task],
    directory: Path,
    expert: Callable[[Task], nn.Module],
    save: Callable[[nn.Module, Path], None],
) -> None:
    """Train, score and save each expert that is not there yet, one after the other.

    Args:
        tasks: One expert each.
        directory: The family's; each expert appears in it under its task's name, complete
            or not at all, with `training.json` beside its weights.
        expert: Trains one and returns it.
        save: Writes it into a directory.
    """
    for task in tasks:
        target = directory / task.name
        if target.is_dir():
            say(f"{task.name}: already there")
            continue
        say(f"{task.name}: {len(task.train['labels'])} examples, {len(task.classes)} classes")
        start = time.perf_counter()
        model = expert(task)
        facts = {
            "task": task.name,
            "metric": task.metric,
            "score": evaluate_model(model, task),
            "train_examples": len(task.train["labels"]),
            "test_examples": len(task.test["labels"]),
            "parameters": sum(p.numel() for p in model.parameters()),
            "seconds": round(time.perf_counter() - start, 1),
        }
        with complete_directory(target) as partial:
            save(model, partial)
            (partial / "training.json").write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
        say(f"{task.name}: {task.metric} {facts['score']:.4f} in {facts['seconds']} s")
