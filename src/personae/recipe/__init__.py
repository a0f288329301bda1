"""Recipes: YAML to frozen, validated settings. Opens no checkpoint."""

from personae.recipe.pack_recipe import (
    COUNTING,
    Counting,
    PackRecipe,
    PackSettings,
    Vector,
    parse_size,
    read_recipe,
    settings_from,
)

__all__ = [
    "COUNTING",
    "Counting",
    "PackRecipe",
    "PackSettings",
    "Vector",
    "parse_size",
    "read_recipe",
    "settings_from",
]
