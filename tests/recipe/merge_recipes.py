"""Merge recipes as texts: read from a file, or refused, with what is said then."""

from pathlib import Path

import pytest

from personae.errors import RecipeError
from personae.recipe import MergeRecipe, read_merge_recipe

LINEAR = """\
models:
  - model: some/base
  - model: some/math
    parameters:
      weight: [0, 0.3, 0.6]
  - model: some/code
    parameters:
      weight:
        - filter: mlp
          value: 0.5
        - value: 0.2
merge_method: linear
base_model: some/base
parameters:
  normalize: true
  int8_mask: true
dtype: float16
"""


def read(tmp_path: Path, text: str) -> MergeRecipe:
    for model in ("b", "x", "y", "z"):  # what is not there is told beside other faults
        (tmp_path / model).touch()
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return read_merge_recipe(path)


def refused(tmp_path: Path, text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, text)
    return str(caught.value)
