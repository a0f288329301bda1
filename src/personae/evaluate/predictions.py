"""A model's answers to the examples of a task, batch by batch, in as much memory as there is."""

from typing import Any

import numpy as np
import torch
from torch import nn

from personae.errors import BudgetError
from personae.evaluate.metrics import METRICS, Answers
from personae.evaluate.tasks import Examples, Task, in_order_of_length, taken
from personae.run.work import Work

BATCH = 128
"""Examples at a time; halved where memory does not suffice."""


def predict(
    model: nn.Module,
    task: Task,
    examples: Examples,
    *,
    batch_size: int = BATCH,
    work: Work | None = None,
    stage: str = "",
) -> Answers:
    """Answers to the examples, in their order.

    Where memory runs out, the batch is halved, and that is said; what is computed already is kept.

    Args:
        model: Takes the names of the examples and returns something with `logits`, of shape
            (example, class), or (example, 1) where numbers are predicted. It is put into
            evaluation mode and left where it is.
        task: Whose examples they are.
        examples: The task's, of any split.
        batch_size: Examples at a time.
        work: Progress and notes.
        stage: What progress calls it; progress is not told where this is empty.

    Raises:
        BudgetError: if not even one example fits into the memory.
    """
    work = work or Work()
    model.eval()
    device = next(iter(model.parameters())).device
    order = in_order_of_length(examples)
    numbers = METRICS[task.metric].answers == "numbers"
    answers = np.zeros(len(order), np.float32 if numbers else np.int64)
    done = 0
    while done < len(order):
        chunk = order[done : done + batch_size]
        try:
            logits = _logits(model, task, taken(examples, chunk), device)
        except MemoryError as error:
            if batch_size == 1:
                raise BudgetError(
                    f"Task '{task.name}': one example does not fit into the memory of {device}. "
                    "Use another device (--device cpu), or shorter examples."
                ) from error
            batch_size = max(1, len(chunk) // 2)
            if device.type == "cuda":
                torch.cuda.empty_cache()
            work.note(f"{task.name}: out of memory, batches of {batch_size} from here on")
            continue
        found = logits.squeeze(-1) if numbers else logits.argmax(dim=-1)
        answers[chunk.numpy()] = found.cpu().numpy()
        done += len(chunk)
        if stage:
            work.progress(stage, done, len(order))
    return answers


def _logits(model: nn.Module, task: Task, batch: Examples, device: torch.device) -> torch.Tensor:
    """Logits of a batch.

    Raises:
        MemoryError: if memory is short.
        RuntimeError: whatever else the model raises.
    """
    try:
        with torch.inference_mode():
            result: Any = model(**task.inputs(batch, device))
            return result.logits.float()
    except RuntimeError as error:
        text = str(error).lower()  # PyTorch has no error of its own for the CPU's memory
        short = "out of memory" in text or "can't allocate memory" in text
        if isinstance(error, torch.OutOfMemoryError) or short:
            raise MemoryError from error
        raise
