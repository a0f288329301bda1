"""Batches of a task: the keyword arguments of a model's forward, and what it makes of them."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, repeat
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.func import functional_call

from personae.errors import MethodError

Batch = Mapping[str, Tensor]
"""Names of arguments to tensors whose first axis is the sample's; `labels` are not passed on."""

LABELS = "labels"
_MASKS = ("attention_mask", "decoder_attention_mask")


def samples(batch: Batch) -> int:
    """How many there are in a batch."""
    return len(next(one for name, one in batch.items() if name != LABELS))


def rows(batch: Batch, which: slice | Tensor) -> dict[str, Tensor]:
    """Some of a batch's samples; what has no axis of samples stays as it is."""
    count = samples(batch)
    return {
        name: one[which] if one.ndim and len(one) == count else one for name, one in batch.items()
    }


def limited(batches: Iterable[Batch], examples: int) -> Iterator[Batch]:
    """The first so many examples; the last batch is cut."""
    for batch in _filled(batches):
        count = samples(batch)
        yield batch if count <= examples else rows(batch, slice(examples))
        examples -= count
        if examples <= 0:
            return


def endless(batches: Iterable[Batch]) -> Iterator[Batch]:
    """All batches, over and over; what shuffles anew each time is asked anew."""
    return _filled(chain.from_iterable(repeat(batches)))


def _filled(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Batches without those of no sample, of which no mean can be taken."""
    return (batch for batch in batches if samples(batch))


def run(model: nn.Module, batch: Batch, weights: Mapping[str, Tensor] | None = None) -> Any:
    """What a model makes of a batch, with these weights in place of its own."""
    device = device_of(model)
    inputs = {name: one.to(device) for name, one in batch.items() if name != LABELS}
    return functional_call(model, dict(weights or {}), (), inputs)


def logits(
    model: nn.Module, batch: Batch, weights: Mapping[str, Tensor] | None = None
) -> Float[Tensor, "sample *token output"]:
    """The logits of a batch.

    Raises:
        MethodError: The model gives none.
    """
    output = run(model, batch, weights)
    found = output.get("logits") if isinstance(output, Mapping) else output
    found = getattr(found, "logits", found)
    if not isinstance(found, Tensor) or found.ndim < 2 or not found.is_floating_point():
        raise MethodError(
            f"the output, a {type(output).__name__}, has no floating logits of shape (sample, "
            "output). Give models whose output is logits, or has them as `logits`"
        )
    return found


def device_of(model: nn.Module) -> torch.device:
    """Where a model is."""
    return next(model.parameters()).device


def token_mask(batch: Batch, shape: tuple[int, ...]) -> Bool[Tensor, "*shape"] | None:
    """Which of (sample, token), or of both in one axis, are no padding, if a mask says so."""
    for name in _MASKS:
        mask = batch.get(name)
        if mask is not None and mask.ndim == 2 and shape in {(*mask.shape,), (mask.numel(),)}:
            return mask.bool().reshape(shape)
    return None


def entropy(scores: Float[Tensor, "sample *token output"], batch: Batch) -> Float[Tensor, ""]:
    """Mean entropy of the distributions that logits stand for; padding is left out."""
    log = scores.float().log_softmax(dim=-1)
    each = -(log.exp() * log).sum(dim=-1)
    mask = token_mask(batch, tuple(each.shape))
    return each.mean() if mask is None else each[mask.to(each.device)].mean()


def held(batches: Iterable[Batch]) -> Iterable[Batch]:
    """Batches that can be gone through again: an iterator's are kept in a list."""
    return list(batches) if isinstance(batches, Iterator) else batches
