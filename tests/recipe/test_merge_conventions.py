"""Merge recipes: by whose method a recipe is merged where mergekit has one of the name too."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from merge_recipes import read, refused
from numpy import ndarray
from pydantic import Field

from personae.errors import MethodError, RecipeError
from personae.methods import (
    MERGE_METHODS,
    MERGEKIT_METHODS,
    DeltaBlocks,
    MergeMethod,
    Site,
    Statistics,
    Undecided,
)
from personae.methods._merge import RowWise
from personae.methods._registry import merge_method
from personae.recipe import MergeSettings

MERGEKIT_RECIPES = {
    "task_arithmetic": """
models:
  - model: org/a
    parameters: {weight: 0.6}
  - model: org/b
    parameters: {weight: [0, 0.5, 1]}
""",
    "ties": """
models:
  - model: org/a
    parameters:
      density: [1, 0.7, 0.1]
      weight: 1.0
  - model: org/b
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1]
  - model: org/c
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
""",
    "dare_ties": """
models:
  - model: org/base
  - model: org/a
    parameters: {weight: 0.5, density: 0.53}
  - model: org/b
    parameters: {weight: 0.3, density: [0.9, 0.4]}
""",
    "dare_linear": """
models:
  - model: org/a
    parameters: {weight: 0.5, density: 0.53}
  - model: org/b
    parameters: {weight: 0.3, density: 0.53}
""",
}


@pytest.fixture
def thinned() -> Iterator[str]:
    """A method of ours, and mergekit's of the same name, which takes more."""

    class Ours(RowWise):
        """Nothing, by our rule."""

        __module__ = "thinned"

        density: float = Field(gt=0, le=1)
        reduce: str = "mean"

        def merge_blocks(
            self,
            blocks: DeltaBlocks,
            statistics: Statistics,
            site: Site,
            undecided: Undecided | None = None,
        ) -> Iterator[ndarray]:
            for _, deltas in blocks:
                yield deltas[0] * np.float32(self.density)

    class Theirs(Ours):
        """Nothing, by theirs."""

        __module__ = "thinned"

        density: float | tuple[float, ...] = 1.0
        weight: float | tuple[float, ...]
        normalize: bool = True
        scale: float = 1.0

        def merge_blocks(
            self,
            blocks: DeltaBlocks,
            statistics: Statistics,
            site: Site,
            undecided: Undecided | None = None,
        ) -> Iterator[ndarray]:
            for _, deltas in blocks:
                yield deltas[0]

    merge_method(paper="none")(Ours)
    merge_method(paper="none", conventions="mergekit")(Theirs)
    yield "thinned"
    del MERGE_METHODS["thinned"], MERGEKIT_METHODS["thinned"]


def test_what_only_mergekit_s_method_takes_is_merged_by_it(tmp_path, thinned):
    text = """
merge_method: thinned
base_model: a/base
models:
  - {model: a/x, parameters: {density: [1, 0.7, 0.1], weight: 1}}
  - {model: a/y, parameters: {density: 0.5, weight: [0, 1]}}
parameters: {normalize: true, lambda: 0.5}
"""
    recipe = read(tmp_path, text)
    assert recipe.settings.conventions == "mergekit"
    assert recipe.settings.merge_method() is MERGEKIT_METHODS["thinned"]
    assert recipe.settings.parameters == {"normalize": True, "scale": 0.5}
    assert recipe.notes[-1].startswith("thinned is merged by mergekit's algorithm (conv")
    assert "thinned has no parameter 'weight'" in recipe.notes[-1]
    told = refused(tmp_path, text + "conventions: personae")
    assert "line 5: thinned has no parameter 'weight'" in told
    assert "mergekit's can: conventions: mergekit." in told


def test_ours_is_taken_where_both_can(tmp_path, thinned):
    text = "merge_method: thinned\nbase_model: b\nmodels: [{model: x}]\n"
    ours = read(tmp_path, text + "parameters: {density: 0.5}").settings
    assert ours.merge_method() is MERGE_METHODS["thinned"]
    weighted = text + "parameters: {weight: 1, density: 0.5}\nconventions: mergekit"
    assert read(tmp_path, weighted).settings.merge_method() is MERGEKIT_METHODS["thinned"]


def test_under_mergekit_s_conventions_ours_serve_where_they_have_none():
    settings = MergeSettings(method="linear", conventions="mergekit")
    method = settings.merge_method()
    assert issubclass(method, MergeMethod) and method.name == "linear"


def test_a_required_parameter(tmp_path, thinned):
    told = refused(tmp_path, "merge_method: thinned\nbase_model: b\nmodels: [{model: x}]")
    assert "thinned needs 'density'" in told
    filtered = MergeSettings(
        method="thinned", parameters={"density": [{"filter": "mlp", "value": 0.5}]}
    )
    told = "thinned: no filter of density matches the tensor 'attention'. Add an entry without"
    with pytest.raises(MethodError, match=told):
        filtered.for_tensor("attention", 2, 1)
    with pytest.raises(RecipeError, match="thinned needs a density for every tensor"):
        filtered.check(["x"])


WEIGHTED = """
base_model: b
models:
  - {model: x, parameters: {weight: 0.3}}
  - {model: y, parameters: {weight: 0.3}}
"""
EQUAL = "base_model: b\nmodels: [{model: x}, {model: y}]\n"
NORMALIZED = "parameters: {normalize: true, density: 1.0}\n"


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_normalize_divides_by_weights_so_weighted_recipes_are_merged_by_mergekit_s(
    tmp_path, method
):
    text = f"merge_method: {method}\n"
    recipe = read(tmp_path, text + WEIGHTED + NORMALIZED)
    assert recipe.settings.conventions == "mergekit"
    assert "cannot follow the recipe: normalize: true divides by the sum of the" in recipe.notes[-1]
    # (0.3·2 + 0.3·4) / (0.3 + 0.3); by how many agree it would be 0.9.
    parameters = recipe.settings.for_tensor("w", 1, 2)
    vectors = torch.tensor([[2.0], [4.0]])
    assert parameters.apply(vectors).tolist() == [3.0]
    told = refused(tmp_path, text + WEIGHTED + NORMALIZED + "conventions: personae")
    assert "line 7: normalize: true divides by the sum of the weights that agree" in told
    assert told.endswith("mergekit's can: conventions: mergekit.")


@pytest.mark.parametrize(
    ("weight", "conventions"),
    [
        ("1", "personae"),
        ("1.0", "personae"),
        ("[1, 1.0]", "personae"),
        ("[{filter: mlp, value: 1}, {value: 1}]", "personae"),
        ("2", "mergekit"),
        ("[1, 2]", "mergekit"),
        ("[{filter: mlp, value: 2}, {value: 1}]", "mergekit"),
    ],
)
def test_normalize_is_a_mean_where_every_weight_is_one(tmp_path, weight, conventions):
    common = f"parameters: {{normalize: true, weight: {weight}}}\n"
    recipe = read(tmp_path, "merge_method: ties\n" + EQUAL + common)
    assert recipe.settings.conventions == conventions
    if conventions == "personae":
        assert recipe.settings.parameters["reduce"] == "mean"
        assert recipe.notes[0] == "normalize: true is called reduce: mean here."
    unweighted = read(tmp_path, "merge_method: ties\n" + EQUAL + NORMALIZED).settings
    assert (unweighted.conventions, unweighted.parameters["reduce"]) == ("personae", "mean")
    summed = "merge_method: ties\n" + WEIGHTED + "parameters: {normalize: false}"
    assert read(tmp_path, summed).settings.parameters == {"reduce": "sum"}


@pytest.mark.parametrize("method", MERGEKIT_RECIPES)
@pytest.mark.parametrize("extra", ["{int8_mask: true}", "{lambda: 0.9, int8_mask: true}"])
def test_features_of_mergekit_s_examples_load_unchanged(tmp_path, method, extra):
    text = f"{MERGEKIT_RECIPES[method]}\nmerge_method: {method}\nbase_model: org/base\n"
    recipe = read(tmp_path, f"{text}parameters: {extra}\ndtype: bfloat16\n")
    assert "base" not in recipe.experts
    count = len(recipe.experts)
    first, last = (
        recipe.settings.for_tensor(f"model.layers.{n}.mlp.x", 32, count) for n in (0, 31)
    )
    assert recipe.settings.dtype == "bfloat16"
    if method == "ties":  # our own reads the whole model, where a density cannot vary
        assert recipe.settings.conventions == "mergekit"
        assert first.model_dump()["density"] == (1.0, 0.5, 0.33)
        assert last.model_dump()["density"] == pytest.approx((0.1, 0.5, 0.33))
        assert last.model_dump()["weight"] == (1.0, 1.0, 0.5)
    elif method == "dare_ties":
        assert last.model_dump()["density"] == pytest.approx((0.53, 0.4))
    else:
        assert first.model_dump()["weight"][0] == recipe.settings.expert_parameters[0]["weight"]
