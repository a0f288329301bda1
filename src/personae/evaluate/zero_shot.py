"""CLIP without a trained head: classes are told by what the text tower makes of their names."""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from personae.errors import CheckpointError
from personae.evaluate.tasks import ZeroShot

TEMPLATES = ("a photo of a {}.",)


class ZeroShotModel(nn.Module):
    """An image tower and a head of text: cosines of images and classes, times a scale."""

    def __init__(self, model: Any, head: ZeroShot) -> None:
        """Take a whole CLIP model, which has a projection, or its image tower alone."""
        super().__init__()
        self.tower = getattr(model, "vision_model", model)
        self.projection = getattr(model, "visual_projection", head.projection)
        self.head = nn.Parameter(head.embeddings, requires_grad=False)
        self.scale = head.scale

    def forward(self, pixel_values: Tensor) -> Any:
        """Logits of shape (example, class)."""
        pooled = self.tower(pixel_values=pixel_values).pooler_output
        images = functional.normalize(self.projection(pooled), dim=-1)
        return SimpleNamespace(logits=self.scale * images @ self.head.T)


def zero_shot_head(
    model: Any, tokenizer: Any, classes: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> ZeroShot:
    """The head of a task from its class names, as CLIP's authors make it.

    Every template is filled with every name; the embeddings of one class, each of length 1, are
    averaged and made of length 1 again.

    Args:
        model: A whole CLIP model of `transformers`.
        tokenizer: Its tokenizer.
        classes: Their names, in label order.
        templates: Sentences with {} in the place of a name.

    Raises:
        CheckpointError: if the model has no text tower.
    """
    if not hasattr(model, "text_projection") or not hasattr(model, "visual_projection"):
        raise CheckpointError(
            f"{type(model).__name__} has no text tower to make a zero-shot head with. Name a whole "
            "CLIP model under text_model."
        )
    model.eval()
    with torch.inference_mode():
        embeddings = [
            _embedding(model, tokenizer, [template.format(name) for template in templates])
            for name in classes
        ]
        # Cloned: tensors of inference mode can be in no other computation.
        return ZeroShot(
            torch.stack(embeddings).clone(),
            float(model.logit_scale.exp()),
            model.visual_projection.requires_grad_(False),
        )


def _embedding(model: Any, tokenizer: Any, sentences: Sequence[str]) -> Tensor:
    tokens: Mapping[str, Tensor] = tokenizer(
        list(sentences), padding=True, truncation=True, return_tensors="pt"
    )
    names = ("input_ids", "attention_mask")
    pooled = model.text_model(**{name: tokens[name] for name in names}).pooler_output
    each = functional.normalize(model.text_projection(pooled), dim=-1)
    return functional.normalize(each.mean(dim=0), dim=-1)
