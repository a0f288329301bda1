"""A pack as the text of a recipe, for packs that were not read from one."""

from collections.abc import Mapping
from typing import Any

import yaml

from personae.recipe.pack_recipe import PackSettings

_KEYS = ("parameters", "budget", "counting", "vector", "skip", "private")


def pack_recipe_text(base: str | None, experts: Mapping[str, str], settings: PackSettings) -> str:
    """YAML that `read_recipe` reads as these settings for these models.

    Args:
        base: Where the base is; differences from the average need none.
        experts: Name to where it is.
        settings: How they are packed.
    """
    content: dict[str, Any] = {"pack_method": settings.method}
    if base is not None and not settings.from_average:
        content["base_model"] = base
    content["models"] = [{"model": model, "name": name} for name, model in experts.items()]
    said = settings.model_dump(mode="json", exclude_defaults=True)
    content |= {key: said[key] for key in _KEYS if key in said}
    if settings.reference is not None:
        content["reference"] = {"merge_method": settings.reference}
    if settings.reference_parameters:
        content.setdefault("reference", {})["parameters"] = said["reference_parameters"]
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
