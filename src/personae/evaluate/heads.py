"""Scores of an encoder under another model's head."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from personae.checkpoints import open_checkpoint
from personae.evaluate.evaluation import evaluate_model
from personae.evaluate.models import load_model
from personae.evaluate.tasks import Task
from personae.execute import outline


def score_with_head(
    checkpoint: Path,
    head: Path,
    task: Task,
    delta: Callable[[str], Tensor | None] = lambda _: None,
) -> float:
    """Score a checkpoint on a task, with what only another one of its architecture has.

    Args:
        checkpoint: Gives every tensor it has.
        head: A whole model whose head, names and configuration are used.
        task: What to score on.
        delta: By the checkpoint's name, fp32 values to add to a tensor; None for nothing.
    """
    reference = open_checkpoint(checkpoint)
    of = outline.of_checkpoint(reference, head)
    state: dict[str, Tensor] = {}
    for name, spec in of.specs.items():
        if name not in of.reference_names:
            state[name] = of.whole(name)
            continue
        tensor = reference.read(of.reference_names[name])
        added = delta(of.reference_names[name])
        if added is not None:
            tensor = (tensor.float() + added).to(spec.dtype)
        state[name] = torch.cat([tensor, of.whole(name)]) if name in of.grown else tensor
    state |= {dropped: state[kept] for dropped, kept in of.tied.items()}
    score = score_state(state, head, task)
    of.close()
    reference.close()
    return score


def score_state(state: Mapping[str, Tensor], head: Path, task: Task) -> float:
    """Score the model of this directory's configuration with these weights in it."""
    model = load_model(head, task.model_class)
    model.load_state_dict(state)
    return evaluate_model(model, task)
