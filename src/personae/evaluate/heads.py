"""Scores of an encoder under another model's head."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from personae.checkpoints import open_checkpoint
from personae.evaluate.evaluation import evaluate_checkpoint
from personae.evaluate.tasks import Task
from personae.execute import outline
from personae.writers import CheckpointWriter


def score_with_head(
    checkpoint: Path,
    head: Path,
    task: Task,
    *,
    private: tuple[str, ...] = (),
    delta: Callable[[str], Tensor | None] = lambda _: None,
) -> float:
    """Score a checkpoint on a task, with what only another one of its architecture has.

    Args:
        checkpoint: Gives every tensor it has.
        head: A whole model whose head, names and configuration are used.
        task: What to score on.
        private: Patterns of names taken from `head` although the checkpoint has them.
        delta: By the checkpoint's name, fp32 values to add to a tensor; None for nothing.
    """
    reference = open_checkpoint(checkpoint)
    of = outline.of_checkpoint(reference, head, private=private)
    with tempfile.TemporaryDirectory() as folder:
        of.copy(Path(folder))
        with CheckpointWriter(Path(folder), of.specs.values(), tied=of.tied) as writer:
            for name in of.specs:
                if name not in of.reference_names:
                    writer.write(name, of.whole(name))
                    continue
                tensor = reference.read(of.reference_names[name])
                added = delta(of.reference_names[name])
                tensor = tensor if added is None else tensor.float() + added
                whole = torch.cat([tensor, of.whole(name)]) if name in of.grown else tensor
                writer.write(name, whole)
        score = evaluate_checkpoint(Path(folder), task)
    of.close()
    reference.close()
    return score
