"""Rows that are classified, predicted or embedded, of several tasks in one call of the model."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from personae.serve.preprocessing import padded
from personae.serve.refusals import Refusal
from personae.serve.scheduler import Job
from personae.serve.tasks import CLASSIFIES, PREDICTS, ServedTask

POOLINGS = ("mean", "first", "pooler")


@dataclass(eq=False, kw_only=True)
class Row(Job):
    """A text or an image.

    Attributes:
        served: Its task.
        inputs: What the model takes, by name: tokens, or pixels.
        pooling: How hidden states become an embedding.
    """

    served: ServedTask
    inputs: Mapping[str, Any]
    pooling: str


def text_row(
    served: ServedTask, text: str, pair: str | None, *, truncate: bool, pooling: str | None
) -> Row:
    """A text, or two, as a row.

    Raises:
        Refusal: if it has no tokens, or more than the model takes.
    """
    assert served.tokenizer is not None
    encoded = served.tokenizer.encode(text, pair, served.tokens if truncate else None)
    taken = inspect.signature(type(served.model).forward).parameters
    inputs = {name: values for name, values in encoded.items() if name in taken}
    count = len(inputs["input_ids"])
    if count > served.tokens:
        raise Refusal(
            f"A text has {count} tokens; task '{served.name}' takes {served.tokens}. Shorten it, "
            'or send "truncate": true.',
            param="texts",
            code="context_length_exceeded",
        )
    check_tokens(served, inputs["input_ids"], "texts")
    # Without a padding token some classifiers do not find the last word of a padded text.
    alone = served.model.config.pad_token_id is None and served.kind in (CLASSIFIES, PREDICTS)
    key = object() if alone else (*served.key, "text")
    return Row(
        key=key,
        task=served.name,
        compute=compute_rows,
        served=served,
        inputs=inputs,
        pooling=pooling or "mean",
    )


def image_row(served: ServedTask, image: str | list[Any], *, pooling: str | None) -> Row:
    """An image as a row.

    Raises:
        Refusal: if it is none.
    """
    assert served.images is not None
    pixels = served.images.pixels(image)
    return Row(
        key=(*served.key, "image", tuple(pixels.shape)),
        task=served.name,
        compute=compute_rows,
        served=served,
        inputs={"pixel_values": pixels},
        pooling=pooling or "pooler",
    )


def check_tokens(served: ServedTask, tokens: Sequence[int], param: str) -> None:
    """Check that there are tokens, and that the model knows them.

    Raises:
        Refusal: if not.
    """
    if not tokens:
        raise Refusal("A text has no tokens. Send one that is not empty.", param=param)
    known = served.model.get_input_embeddings().num_embeddings
    if not 0 <= min(tokens) <= max(tokens) < known:
        raise Refusal(
            f"Token {max(tokens, key=lambda n: (n < 0, n))} is none of the {known} tokens of task "
            f"'{served.name}'.",
            param=param,
        )


def compute_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What the model says of each row."""
    first = rows[0].served
    if "pixel_values" in rows[0].inputs:
        pixels = torch.stack([row.inputs["pixel_values"] for row in rows])
        inputs = {"pixel_values": pixels.to(first.model.dtype)}
    else:
        inputs = padded([row.inputs for row in rows], first.model.config.pad_token_id or 0)
    inputs = {name: one.to(first.model.device) for name, one in inputs.items()}
    with torch.no_grad():
        output = first.runtime(**inputs, tasks=[row.served.task for row in rows])
    return [_answer(row, n, output, inputs) for n, row in enumerate(rows)]


def _answer(row: Row, n: int, output: Any, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """What an output says of row `n`."""
    config = row.served.model.config
    if row.served.kind in (CLASSIFIES, PREDICTS):
        logits = output.logits[n, : config.num_labels].float()
        _check_finite(logits, row)
        if row.served.kind == PREDICTS:
            return {"values": logits.tolist()}
        several = config.problem_type == "multi_label_classification"
        shares = (logits.sigmoid() if several else logits.softmax(-1)).tolist()
        scores = {config.id2label[place]: share for place, share in enumerate(shares)}
        best = max(scores, key=scores.__getitem__)
        return {"label": best, "score": scores[best], "scores": scores}
    embedding = _pooled(row, n, output, inputs.get("attention_mask")).float()
    _check_finite(embedding, row)
    return {"embedding": embedding.tolist()}


def _pooled(row: Row, n: int, output: Any, mask: Tensor | None) -> Tensor:
    """Hidden states of row `n` as one vector.

    Raises:
        Refusal: if the model has no pooler, and it was asked for.
    """
    hidden = output.get("last_hidden_state")
    if row.pooling == "pooler":
        names = ("image_embeds", "text_embeds", "pooler_output")
        found = next((output[name] for name in names if output.get(name) is not None), None)
        if found is None:
            raise Refusal(
                f'Task \'{row.task}\' has no pooler. Choose "pooling": "mean" or "first".',
                param="pooling",
            )
        return found[n]
    if row.pooling == "first":
        return hidden[n, 0]
    if mask is None:
        return hidden[n].mean(0)
    weights = mask[n].to(hidden.dtype)
    return (hidden[n] * weights[:, None]).sum(0) / weights.sum()


def _check_finite(numbers: Tensor, row: Row) -> None:
    """Check an answer.

    Raises:
        Refusal: if it has a number that JSON cannot hold.
    """
    if not numbers.isfinite().all():
        raise Refusal(f"The model of task '{row.task}' gave a number that is not finite.", 500)
