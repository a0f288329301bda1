"""TALL-masks: each task is located in the sum of all task vectors by a mask.

arXiv:2405.07813. The threshold is a matter of validation data: the paper takes the best of 0.2,
0.3, 0.4, 0.5 and 0.6 for each task; without data the middle one is the default.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from personae._types import SVD, Layout, Parts
from personae.errors import MethodError
from personae.methods._codec import Bits, Codec, Context
from personae.methods._registry import codec
from personae.ops.bits import packed_size
from personae.ops.chunks import by_chunks, chunks
from personae.ops.masks import decode_mask, encode_mask, mask_layout

Threshold = Annotated[float, Field(gt=0)]


@codec(paper="arXiv:2405.07813")
class TALLMask(Codec):
    """A mask on the multi-task vector τ = Σ τ_n, which all tasks share.

    It marks where |τ_n| > threshold · |τ − τ_n|; what is decoded is the masked τ.

    Parts:
        mask, gaps: the entries marked (see `ops.masks`).

    A delta of which nothing is marked has no parts.
    """

    shares: ClassVar = True

    threshold: Threshold | dict[str, Threshold] = Field(
        default=0.4,
        description="An entry is kept where |τ_n| > threshold · |τ − τ_n|. One "
        "value, or one per task.",
    )

    def for_task(self, task: str) -> "TALLMask":
        """Choose the threshold of this task.

        Raises:
            MethodError: if thresholds are given by task, but none for this one.
        """
        if not isinstance(self.threshold, Mapping):
            return self
        if task not in self.threshold:
            raise MethodError(
                f"tall_mask: threshold has no value for task '{task}', only for "
                f"{', '.join(self.threshold)}. Give one for each task, or one for all."
            )
        return self.model_copy(update={"threshold": self.threshold[task]})

    def degenerates(self, experts: int) -> str:
        """The multi-task vector is the sum, which is 0 there."""
        return (
            "that average for every task: what tasks share is the sum of their vectors, which "
            "is 0 here"
        )

    def share(self, deltas: Sequence[Float[Tensor, "..."]]) -> Float[Tensor, "..."]:
        """The multi-task vector, summed in fp64."""
        return by_chunks(_sum, torch.float32, *deltas).reshape(deltas[0].shape)

    def encode(
        self, delta: Float[Tensor, "..."], svd: SVD | None = None, context: Context | None = None
    ) -> Parts:
        """Mark where the task outweighs the others."""
        shared = (context or self.alone(delta)).shared
        if shared is None:
            return {}
        threshold = self.threshold
        assert not isinstance(threshold, Mapping), "a threshold for this task is chosen first"

        def outweighs(own: Tensor, whole: Tensor) -> Tensor:
            return (own.abs() > threshold * (whole - own).abs()) & (whole != 0)

        return encode_mask(by_chunks(outweighs, torch.bool, delta, shared))

    def decode(
        self, parts: Parts, shape: tuple[int, ...], shared: Tensor | None = None
    ) -> Float[Tensor, "..."]:
        """The masked multi-task vector; parts that do not fit the shape are refused."""
        if not parts or shared is None:
            return torch.zeros(shape)
        delta = torch.zeros(shape, device=shared.device)
        for target, here, own in chunks(delta, decode_mask(parts, delta.numel()), shared):
            target[here] = own[here]
        return delta

    def layout(self, shape: tuple[int, ...], rank: int | None = None) -> Layout:
        """A mask."""
        return mask_layout(torch.Size(shape).numel())

    def bits(self, shape: tuple[int, ...], rank: int | None = None) -> Bits:
        """A bit an element."""
        count = torch.Size(shape).numel()
        return Bits(count, count, 8 * packed_size(count, 1))


def _sum(*deltas: Float[Tensor, " entry"]) -> Float[Tensor, " entry"]:
    """The sum in fp64."""
    total = deltas[0].double()
    for delta in deltas[1:]:
        total = total + delta
    return total
