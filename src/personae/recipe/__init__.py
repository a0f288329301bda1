"""Recipes: YAML to frozen, validated settings. Opens no checkpoint."""

from personae.recipe._base import Vector
from personae.recipe._merge_reading import (
    read_merge_recipe,
    read_merge_recipes,
    recipe_kind,
)
from personae.recipe._merge_text import merge_recipe_text
from personae.recipe._pack_reading import read_recipe
from personae.recipe._pack_text import pack_recipe_text
from personae.recipe._sizes import parse_size
from personae.recipe._values import count_layers
from personae.recipe.merge_recipe import MergePart, MergeRecipe, MergeSettings
from personae.recipe.mergekit import refuse_mergekit_alone
from personae.recipe.pack_recipe import (
    COUNTING,
    Counting,
    PackRecipe,
    PackSettings,
    settings_from,
)
from personae.recipe.ranks import Ranks, ranks_asked

__all__ = [
    "COUNTING",
    "Counting",
    "MergePart",
    "MergeRecipe",
    "MergeSettings",
    "PackRecipe",
    "PackSettings",
    "Ranks",
    "Vector",
    "count_layers",
    "merge_recipe_text",
    "pack_recipe_text",
    "parse_size",
    "ranks_asked",
    "read_merge_recipe",
    "read_merge_recipes",
    "read_recipe",
    "recipe_kind",
    "refuse_mergekit_alone",
    "settings_from",
]
