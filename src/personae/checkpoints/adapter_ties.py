"""Adapters of weights that their base has as one: `lm_head` and `embed_tokens`.

PEFT adapts and saves modules, whether or not they share a weight. What fits the one weight of the
base is taken: factors on one of its modules, or the same factors or whole tensor on several
(`ensure_weight_tying`). An output layer saved apart stays the adapter's own tensor. Where the base
has them as two, both have a row for each token.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from personae._types import TensorSpec
from personae.checkpoints._protocol import Checkpoint
from personae.checkpoints.adapter_files import Adapted, AdapterConfig
from personae.checkpoints.tied import embedding_of, is_copy, says_tied
from personae.checkpoints.vocabulary import is_input_embedding, is_output_layer
from personae.errors import Faults

_WITH_OUTPUT_LAYER = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
_TOGETHER = "Train it with ensure_weight_tying, or on a base saved untied."


def tied_names(wanted: Collection[str], base: Checkpoint) -> dict[str, str]:
    """Weights that the base has only under another name: name to that one.

    Beside those that the base tells, embeddings and output layers among `wanted` that it lacks,
    where its config.json ties them and their names say to which embedding.

    Raises:
        CheckpointError: The config.json is damaged.
    """
    known = [f".{name}" for name in (*base.specs, *base.tied)]
    inputs = [name for name in base.specs if is_input_embedding(name)]
    lacking = [
        name
        for name in wanted
        if name.endswith(".weight")
        and (is_output_layer(name) or is_input_embedding(name))
        and not any(here.endswith(f".{name}") for here in known)
        and not any(f".{name}".endswith(here) for here in known)
    ]
    if not lacking or not says_tied(base):
        return dict(base.tied)
    found = {name: embedding_of(name, inputs) for name in lacking}
    return {**{name: kept for name, kept in found.items() if kept}, **base.tied}


def without_same(
    replaced: Mapping[str, str], tied: Mapping[str, str], tensors: Checkpoint, base: Checkpoint
) -> dict[str, str]:
    """Tensors saved whole, without those that equal what the base ties them to.

    Args:
        replaced: Name in the base to stored name.
        tied: As `tied_names` gives it.
        tensors: What the adapter stores.
        base: Its base.

    Raises:
        CheckpointError: A file changed since it was opened.
    """
    kept = dict(replaced)
    for name, key in replaced.items():
        twin = tied.get(name)
        if twin is None:
            continue
        holder, twin_key = (tensors, replaced[twin]) if twin in replaced else (base, twin)
        if is_copy(tensors, key, holder, twin_key):
            del kept[name]
    return kept


def check_same(tensors: Checkpoint, one: Adapted, other: Adapted, faults: Faults) -> None:
    """Add a fault for two modules that share a weight and are adapted by other factors."""
    pairs = zip(_factors(tensors, one), _factors(tensors, other), strict=True)
    if one.scaling == other.scaling and all(torch.equal(a, b) for a, b in pairs):
        return
    faults.add(
        f"{tensors.source} adapts '{one.pair.module}' and '{other.pair.module}' separately, but "
        f"they are one weight in its base. {_TOGETHER}"
    )


def _factors(tensors: Checkpoint, how: Adapted) -> tuple[Tensor, Tensor]:
    """The stored factors, (rows, rank) and (rank, columns) of the weight."""
    a, b = tensors.read(how.pair.a), tensors.read(how.pair.b)
    return (a.T, b.T) if how.transposed else (b, a)


def check_saved(
    config: AdapterConfig,
    tensors: Checkpoint,
    adapted: Collection[str],
    replaced: Mapping[str, str],
    tied: Mapping[str, str],
    base: Checkpoint,
    faults: Faults,
) -> None:
    """Add a fault for an embedding trained whole while the output layer tied to it was not.

    Args:
        config: What the adapter says of itself.
        tensors: What it stores.
        adapted: Names of the weights that have factors, tied ones too.
        replaced: Names of the tensors saved whole, without those that equal others.
        tied: As `tied_names` gives it.
        base: The adapter's base.
        faults: Where faults are added.

    Raises:
        CheckpointError: The base's config.json is damaged.
    """
    saved = [n for n in replaced if is_input_embedding(n) and config.saves(n.rpartition(".")[0])]
    if not saved or any(is_output_layer(name) for name in (*base.specs, *replaced)):
        return
    known = {key.removeprefix("base_model.model.") for key in (*tensors.specs, *tensors.tied)}
    heads = [name for name in tied if is_output_layer(name) and name.endswith(".weight")]
    alone = config.task_type in _WITH_OUTPUT_LAYER and (heads or says_tied(base))
    if any(name in adapted for name in heads) or (alone and not any(map(is_output_layer, known))):
        faults.add(
            f"{tensors.source} trains '{saved[0]}' whole, but not the output layer that its base "
            f"ties to it. {_TOGETHER}"
        )


def check_grown(
    tensors: Checkpoint, specs: Mapping[str, TensorSpec], base: Checkpoint, faults: Faults
) -> None:
    """Add a fault for an embedding that has grown while its output layer has not, or the reverse.

    PEFT saves a layer that was resized only where it is adapted, or none is. The rows that it left
    out are nowhere, and no model has two numbers of tokens.

    Args:
        tensors: What the adapter stores.
        specs: The tensors of the adapted model.
        base: The adapter's base.
        faults: Where faults are added.
    """
    inputs = [name for name in base.specs if is_input_embedding(name)]
    for head in (name for name in base.specs if is_output_layer(name)):
        embedding = embedding_of(head, inputs)
        if embedding is None or base.specs[embedding].shape != base.specs[head].shape:
            continue
        if specs[embedding].shape[0] != specs[head].shape[0]:
            faults.add(
                f"{tensors.source} has {specs[embedding].shape[0]} rows of '{embedding}', but "
                f"{specs[head].shape[0]} of '{head}': of the two, it was saved without one that "
                "was resized. Merge the adapter into its resized base with PEFT and pass the "
                "result."
            )
