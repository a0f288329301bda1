"""Training of small families of experts, for the demo and the benchmarks."""

import shutil
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from personae.evaluate.models import load_model
from personae.evaluate.tasks import Examples, Task, batches

Progress = Callable[[str], None]
"""Takes one line about what is going on."""


def train(
    model: nn.Module,
    examples: Examples,
    *,
    epochs: int,
    learning_rate: float,
    head_learning_rate: float | None = None,
    batch_size: int = 32,
    seed: int = 0,
    progress: Progress = lambda _: None,
) -> None:
    """Train all parameters in place by AdamW, with a short warm-up and a linear decay.

    There is no weight decay, so that what no example touches (rows of an embedding) stays
    exactly as in the base and costs nothing in a pack.

    Args:
        model: A `transformers` model that returns a `loss`; its head is what lies outside
            `model.base_model`.
        examples: What to train on.
        epochs: Passes over the examples.
        learning_rate: Its peak, for the encoder.
        head_learning_rate: Its peak for the head; the encoder's if not given.
        batch_size: Examples a step.
        seed: Of the order of the examples and of dropout. The global random state is left as
            it was.
        progress: Told the mean loss of each epoch.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        _groups(model, learning_rate, head_learning_rate or learning_rate),
        weight_decay=0.0,
        fused=True,
    )
    steps = epochs * -(-len(examples["labels"]) // batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * steps), 1.1 * (1 - step / steps), 1.0)
    )
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for epoch in range(epochs):
            losses: list[float] = []
            for batch in batches(examples, batch_size, generator):
                loss = model(**batch).loss
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                losses.append(loss.item())
            progress(f"epoch {epoch + 1} of {epochs}: loss {sum(losses) / len(losses):.3f}")
    model.eval()


def _groups(model: nn.Module, learning_rate: float, head_learning_rate: float) -> list[dict]:
    """Return AdamW's parameter groups: the encoder and the head."""
    encoder_model: nn.Module = model.base_model  # pyright: ignore[reportAssignmentType]
    encoder = dict.fromkeys(encoder_model.parameters())
    head = [p for p in model.parameters() if p not in encoder]
    return [
        {"params": list(encoder), "lr": learning_rate},
        {"params": head, "lr": head_learning_rate},
    ]


def with_new_head(base: Path, task: Task, seed: int) -> nn.Module:
    """Load the base with an untrained head for the task's classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return load_model(
            base,
            task.model_class,
            num_labels=len(task.classes),
            id2label=dict(enumerate(task.classes)),
            label2id={name: label for label, name in enumerate(task.classes)},
            ignore_mismatched_sizes=True,
        )


@contextmanager
def complete_directory(directory: Path) -> Generator[Path]:
    """Give a directory to write into, which appears as `directory` only when all is written.

    What an interrupted run left behind is removed by the next one.

    Yields:
        The hidden directory beside the final one.
    """
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    partial.rename(directory)


def joined(tasks: Sequence[Task]) -> Examples:
    """Return the training examples of all tasks, under one numbering of all their classes."""
    examples = {name: torch.cat([task.train[name] for task in tasks]) for name in tasks[0].train}
    first, labels = 0, []
    for task in tasks:
        labels.append(task.train["labels"] + first)
        first += len(task.classes)
    return examples | {"labels": torch.cat(labels)}
