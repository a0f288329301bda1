"""A merge as the text of a recipe, for merges that were not read from one."""

from collections.abc import Mapping
from typing import Any

import yaml

from personae.recipe.merge_recipe import MergeSettings


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
    for key in ("parameters", "dtype", "tokenizer_source", "vector", "skip", "only"):
        if key in said:
            content[key] = said[key]
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
