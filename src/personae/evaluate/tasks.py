"""A task: labelled examples, the kind of model that answers them, and how answers are scored."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from personae.evaluate.metrics import Metric

Examples = dict[str, Tensor]
"""A model's keyword arguments by name, first axis the example; always with `labels` (int64).

Text is padded on the right, with an `attention_mask` that is 0 on the padding."""


@dataclass(frozen=True, slots=True)
class Task:
    """One classification task.

    Attributes:
        name: What the task's expert is called.
        model_class: Name of the `transformers` class that loads its checkpoints, such as
            `AutoModelForSequenceClassification`.
        metric: What the score is.
        classes: Class names, in label order.
        train: What experts are trained on.
        test: What they are scored on.
        validation: What is chosen on, neither trained nor scored on; None if nothing is.
    """

    name: str
    model_class: str
    metric: Metric
    classes: tuple[str, ...]
    train: Examples
    test: Examples
    validation: Examples | None = None


def batches(
    examples: Examples, size: int, generator: torch.Generator | None = None
) -> Iterator[Examples]:
    """Yield batches of at most `size` examples, examples of like length together.

    Text is cut to the longest of its batch, which saves most of the work that padding costs.

    Args:
        examples: What to batch.
        size: Examples a batch.
        generator: Shuffles the examples, and then the batches; without one the order is fixed.

    Yields:
        The same names, with fewer examples.
    """
    count = len(examples["labels"])
    order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
    mask = examples.get("attention_mask")
    if mask is not None:
        order = order[torch.argsort(mask.sum(dim=1)[order], stable=True)]
    chunks = order.split(size)
    if generator is not None:
        chunks = [chunks[i] for i in torch.randperm(len(chunks), generator=generator)]
    for chunk in chunks:
        batch = {name: values[chunk] for name, values in examples.items()}
        if mask is not None:
            longest = int(mask[chunk].sum(dim=1).max())
            batch = {
                n: v[:, :longest] if v.shape[1:] == mask.shape[1:] else v for n, v in batch.items()
            }
        yield batch
