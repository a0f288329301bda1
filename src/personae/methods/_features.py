"""What a router looks at: one vector a sample, from a model that runs."""

import threading
from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from personae.errors import MethodError
from personae.methods._batches import (
    LABELS,
    Batch,
    device_of,
    limited,
    run,
    samples,
    token_mask,
)
from personae.methods._experts import Experts, Weights
from personae.methods._layers import LinearLayer, linear_layers, watched

Pool = Literal["mean", "first"]
"""Of the states of tokens their mean without padding, or the first."""


def features(
    model: nn.Module, batch: Batch, weights: Mapping[str, Tensor], pool: Pool
) -> Float[Tensor, "sample dim"]:
    """The last hidden states of a model of `transformers`; of others what its last layer is given.

    Raises:
        MethodError: if these are not one vector, or one a token, for each sample.
    """
    with torch.no_grad():
        states = _states(model, batch, weights).float()
    count = samples(batch)
    if states.ndim not in (2, 3) or len(states) != count:
        raise MethodError(
            f"The router looks at hidden states of shape {tuple(states.shape)}, for {count} "
            "samples. They must be (sample, dim) or (sample, token, dim)."
        )
    if states.ndim == 2:
        return states
    if pool == "first":
        return states[:, 0]
    mask = token_mask(batch, tuple(states.shape[:2]))
    if mask is None:
        return states.mean(dim=1)
    shares = mask.to(states).unsqueeze(-1)
    return (states * shares).sum(dim=1) / shares.sum(dim=1).clamp(min=1)


def features_of_tasks(
    experts: Experts, weights: Weights, examples: int, pool: Pool
) -> dict[str, Float[Tensor, "_ dim"]]:
    """Features of so many examples of each task, in the first expert with these weights."""
    fitted = experts.cast(weights)
    found: dict[str, Tensor] = {}
    for task, batches in experts.batches.items():
        some = limited(batches, examples)
        found[task] = torch.cat([features(experts.first, one, fitted, pool) for one in some])
        experts.progress(len(found), len(experts.batches))
    return found


def _states(model: nn.Module, batch: Batch, weights: Mapping[str, Tensor]) -> Tensor:
    if hasattr(getattr(model, "config", None), "output_hidden_states"):
        device = device_of(model)
        given = {name: one.to(device) for name, one in batch.items() if name != LABELS}
        if _answers_prompts(model) and "decoder_input_ids" not in given:
            start = torch.zeros(samples(batch), 1, dtype=torch.long, device=device)
            given["decoder_input_ids"] = start  # of no effect on the encoder's states
        output = functional_call(model, dict(weights), (), {**given, "output_hidden_states": True})
        found = getattr(output, "hidden_states", None)
        found = getattr(output, "encoder_hidden_states", None) if found is None else found
        if found:
            return found[-1]
    last: list[Tensor] = []
    here = threading.get_ident()

    def given_to(_: LinearLayer, inputs: Tensor) -> None:
        if threading.get_ident() == here:  # others may compute with the same layers
            last[:] = [inputs]

    with watched(model, linear_layers(model), given_to):
        run(model, batch, weights)
    return last[0]


def _answers_prompts(model: nn.Module) -> bool:
    """Whether it is an encoder-decoder that generates, whose states are its encoder's."""
    generates = getattr(model, "can_generate", lambda: False)()
    return bool(generates and getattr(getattr(model, "config", None), "is_encoder_decoder", False))
