"""How alike tasks are, from embeddings of what they are about (DTS, arXiv 2512.01461, eq. 8)."""

import torch
from jaxtyping import Float
from torch import Tensor

from personae.errors import MethodError


def mean_embedding(embeddings: Float[Tensor, "text dim"]) -> Float[Tensor, " dim"]:
    """Average the directions of embeddings: each is scaled to unit length first, the mean is not.

    The paper leaves open whether to normalise before averaging; without it, a text with a long
    embedding would count for more. An all-zero embedding counts as no direction.

    Args:
        embeddings: One row a text, floating; worked on in fp64.

    Returns:
        Their mean, fp64.
    """
    return torch.nn.functional.normalize(embeddings.double(), dim=1).mean(dim=0)


def cosines(
    one: Float[Tensor, " dim"], others: Float[Tensor, "task dim"]
) -> Float[Tensor, " task"]:
    """Cosine of one embedding with each of the others; 0 where either is all zero, fp64."""
    unit = torch.nn.functional.normalize(one.double(), dim=0)
    return torch.nn.functional.normalize(others.double(), dim=1) @ unit


def ratio_weights(similarities: Float[Tensor, " task"]) -> Float[Tensor, " task"]:
    """Weights in proportion to the cosines, γₙ = cₙ / Σ cⱼ; those below 0 count as 0.

    Unclipped, negative cosines would leave the simplex, or divide by a sum near 0.

    Raises:
        MethodError: if no cosine is above 0.
    """
    clipped = similarities.double().clamp(min=0)
    if not bool((clipped > 0).any()):
        raise MethodError(
            f"No cosine is above 0 (the largest is {float(similarities.max()):.3g}), so they have "
            "no ratio. Use softmax weights, or give the weights."
        )
    return clipped / clipped.sum()


def softmax_weights(
    similarities: Float[Tensor, " task"], temperature: float
) -> Float[Tensor, " task"]:
    """Weights γₙ = exp(cₙ / T) / Σ exp(cⱼ / T): a low temperature favours the nearest task.

    Raises:
        MethodError: if the temperature is not above 0 and finite.
    """
    if not 0 < temperature < float("inf"):
        raise MethodError(
            f"A temperature of {temperature:g} gives no weights. Give one above 0, such as 0.1."
        )
    return torch.softmax(similarities.double() / temperature, dim=0)
