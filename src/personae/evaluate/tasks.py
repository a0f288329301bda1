"""A task: labelled examples, the kind of model that answers them, and how answers are scored."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Examples = dict[str, Tensor]
"""A model's keyword arguments by name, first axis the example; always with `labels` (int64, or
float32 where values are predicted).

Text is padded on the right, with an `attention_mask` that is 0 on the padding. Images may be bytes
(uint8), which the task's `pixels` turns into what the model takes."""

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True, slots=True)
class Pixels:
    """What a model takes for the bytes of an image: (x / 255 - mean) / std, a channel each."""

    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)

    def __call__(self, images: Tensor) -> Tensor:
        """Images of shape (example, channel, height, width), as numbers."""
        mean, std = (torch.tensor(v, device=images.device) for v in (self.mean, self.std))
        return (images / 255 - mean[:, None, None]) / std[:, None, None]


@dataclass(frozen=True, slots=True, eq=False)
class ZeroShot:
    """The head of a task without a trained one: an embedding a class, from the text tower of CLIP.

    Attributes:
        embeddings: Of shape (class, feature), each of length 1.
        scale: What cosines are multiplied by.
        projection: From the image tower's output into the space of the embeddings, for models that
            have none of their own.
    """

    embeddings: Tensor
    scale: float
    projection: nn.Module


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """One task of classification, or of the prediction of a number.

    Attributes:
        name: What the task's expert is called.
        model_class: Name of the `transformers` class that loads its checkpoints, such as
            `AutoModelForSequenceClassification`.
        metric: What the score is; a name of `METRICS`.
        classes: Class names, in label order; none where numbers are predicted.
        train: What experts are trained on.
        test: What they are scored on.
        validation: What is chosen on, neither trained nor scored on; None if nothing is.
        pixels: Of tasks whose images are bytes.
        zero_shot: The head of a model that has none.
    """

    name: str
    model_class: str
    metric: str
    classes: tuple[str, ...]
    train: Examples
    test: Examples
    validation: Examples | None = None
    pixels: Pixels | None = None
    zero_shot: ZeroShot | None = None

    def inputs(self, batch: Mapping[str, Tensor], device: torch.device) -> Examples:
        """A batch as the model takes it, without its labels."""
        found = {name: v.to(device) for name, v in batch.items() if name != "labels"}
        if self.pixels is not None:
            found["pixel_values"] = self.pixels(found["pixel_values"])
        return found


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
    order = in_order_of_length(examples, generator)
    chunks = order.split(size)
    if generator is not None:
        chunks = [chunks[i] for i in torch.randperm(len(chunks), generator=generator)]
    for chunk in chunks:
        yield taken(examples, chunk)


def in_order_of_length(examples: Examples, generator: torch.Generator | None = None) -> Tensor:
    """Positions of the examples, short texts first; else as they stand, or shuffled."""
    count = len(examples["labels"])
    order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
    mask = examples.get("attention_mask")
    if mask is None:
        return order
    return order[torch.argsort(mask.sum(dim=1)[order], stable=True)]


def taken(examples: Examples, chunk: Tensor) -> Examples:
    """Some of the examples, their texts cut to the longest of them."""
    mask = examples.get("attention_mask")
    batch = {name: values[chunk] for name, values in examples.items()}
    if mask is None:
        return batch
    longest = int(mask[chunk].sum(dim=1).max())
    return {n: v[:, :longest] if v.shape[1:] == mask.shape[1:] else v for n, v in batch.items()}
