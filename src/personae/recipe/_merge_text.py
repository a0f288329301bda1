"""A merge as the text of a recipe, for merges that were not read from one."""

from collections.abc import Mapping
from typing import Any

import yaml

from personae.recipe.merge_recipe import MergeSettings

_KEYS = (
    *("parameters", "dtype", "tokenizer_source", "chat_template", "vector", "skip", "only"),
    *("output", "rank", "energy", "budget", "max_rank", "rank_pattern"),
)


def merge_recipe_text(base: str | None, experts: Mapping[str, str], settings: MergeSettings) -> str:
    """YAML that `read_merge_recipe` reads as these settings for these models.

    Args:
        base: Where the base is.
        experts: Name to where it is.
        settings: How they are merged.
    """
    content: dict[str, Any] = {"merge_method": settings.method, "conventions": settings.conventions}
    if base is not None and settings.vector == "task":
        content["base_model"] = base
    models: list[dict[str, Any]] = [{"model": m, "name": name} for name, m in experts.items()]
    for entry, own in zip(models, settings.expert_parameters, strict=False):
        if own:
            entry["parameters"] = own
    content["models"] = models
    said = settings.model_dump(mode="json", exclude_defaults=True)
    if settings.tokens or settings.pad_to_multiple_of:
        content["tokenizer"] = _tokenizer(settings)
        said.pop("tokenizer_source", None)
    for key in _KEYS:
        if key in said:
            content[key] = said[key]
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _tokenizer(settings: MergeSettings) -> dict[str, Any]:
    tokens: dict[str, Any] = {}
    for token, row in settings.tokens.items():
        source: Any = row.model if row.model is not None else {"kind": "zero"}
        if row.token is not None:
            source = {"kind": "model_token", "model": row.model, "token": row.token}
        if row.token_id is not None:
            source = {"kind": "model_token", "model": row.model, "token_id": row.token_id}
        tokens[token] = {"source": source, "force": row.force}
    found = {"source": settings.tokenizer_source, "tokens": tokens}
    return found | {"pad_to_multiple_of": settings.pad_to_multiple_of}
