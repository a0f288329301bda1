"""Merge recipes that list the base among the models, or give it a weight."""

from pathlib import Path

import pytest
import torch
from merge_recipes import read, refused
from safetensors.torch import load_file, save_file

from personae.commands.merge import merge
from personae.methods import MERGE_METHODS, METHODS_BY_CONVENTIONS, Conventions, build
from personae.recipe import MergeRecipe

LISTED = """
base_model: a/base
models:
  - {model: a/x, parameters: {weight: 3}}
  - {model: a/base, parameters: {weight: 1}}
"""
UNLISTED = "base_model: a/base\nmodels: [{model: a/x}, {model: a/y}]\nparameters: {weight: 1}\n"
AVERAGED = "The base has a weight: it is averaged as the other models are."


def test_an_average_counts_a_base_that_has_a_weight(tmp_path: Path):
    values = {"base": 1.0, "x": 5.0, "y": 9.0}
    for name, value in values.items():
        save_file({"w": torch.full((2, 2), value)}, tmp_path / f"{name}.safetensors")
    text = f"""
merge_method: linear
base_model: {tmp_path}/base.safetensors
models:
  - {{model: {tmp_path}/x.safetensors, parameters: {{weight: 2}}}}
  - {{model: {tmp_path}/base.safetensors, parameters: {{weight: 1}}}}
  - {{model: {tmp_path}/y.safetensors, parameters: {{weight: 1}}}}
"""
    recipe = read(tmp_path, text)
    out = merge(recipe.base, recipe.experts, tmp_path / "out", settings=recipe.settings)
    # (2·5 + 1 + 9) / 4
    assert load_file(out / "model.safetensors")["w"].tolist() == [[5.0, 5.0], [5.0, 5.0]]


def averaged(recipe: MergeRecipe) -> list[str] | None:
    return [*recipe.experts] if recipe.base is None else None


def test_an_averaged_base_is_the_first_expert(tmp_path: Path):
    recipe = read(tmp_path, f"merge_method: average{LISTED}tokenizer_source: base")
    assert recipe.experts == {"base": "a/base", "x": "a/x"}
    assert recipe.settings.expert_parameters == ({"weight": 1}, {"weight": 3})
    assert (recipe.base, recipe.settings.vector) == (None, "difference")
    assert recipe.settings.tokenizer_source == "base"
    assert recipe.notes == [AVERAGED]
    for_all = LISTED.replace(", parameters: {weight: 1}", "") + "parameters: {weight: 2}"
    assert averaged(read(tmp_path, f"merge_method: linear{for_all}")) == ["base", "x"]


def test_a_base_without_a_weight_is_not_averaged(tmp_path: Path):
    text = LISTED.replace(", parameters: {weight: 1}", "")
    recipe = read(tmp_path, f"merge_method: linear\nconventions: papers{text}")
    assert (recipe.base, recipe.experts, recipe.notes) == ("a/base", {"x": "a/x"}, [])


def test_mergekit_s_linear_averages_a_base_that_is_not_listed(tmp_path: Path):
    recipe = read(tmp_path, f"merge_method: linear\nconventions: mergekit\n{UNLISTED}")
    assert averaged(recipe) == ["base", "x", "y"]
    assert recipe.notes == [AVERAGED]
    recipe = read(tmp_path, f"merge_method: linear\nconventions: papers\n{UNLISTED}")
    assert (averaged(recipe), recipe.notes) == (None, [])
    assert read(tmp_path, f"merge_method: average\n{UNLISTED}").notes == []


def test_mergekit_s_means_of_models_take_a_base_that_is_not_listed(tmp_path: Path):
    text = UNLISTED.replace("parameters: {weight: 1}\n", "")
    recipe = read(tmp_path, f"merge_method: karcher\n{text}")
    assert averaged(recipe) == ["base", "x", "y"]
    assert recipe.notes == ["The base is averaged as the other models are, as mergekit does it."]
    recipe = read(tmp_path, f"merge_method: karcher\nconventions: papers\n{text}")
    assert (averaged(recipe), recipe.notes) == (None, [])


@pytest.mark.parametrize(
    ("method", "conventions"),
    [
        *((name, "papers") for name in ("task_arithmetic", "ties", "dare", "dare_ties")),
        *((name, "mergekit") for name in ("task_arithmetic", "ties", "dare_linear", "dare_ties")),
    ],
)
def test_a_base_whose_task_vector_makes_no_difference_is_left_out(
    tmp_path: Path, method: str, conventions: Conventions
):
    text = f"merge_method: {method}\nconventions: {conventions}{LISTED}"
    recipe = read(tmp_path, text)
    assert (recipe.base, recipe.experts) == ("a/base", {"x": "a/x"})
    assert recipe.settings.expert_parameters == ({"weight": 3},)
    assert recipe.notes == ["The base is left out of the models: its task vector is zero."]


NO_DIFFERENCE = sorted(n for n, method in MERGE_METHODS.items() if not method.counts_experts)


@pytest.mark.parametrize("method", NO_DIFFERENCE)
def test_zeros_make_no_difference(method: str):
    """What `personae` has of these; mergekit leaves the base out itself."""
    entry = METHODS_BY_CONVENTIONS["papers"][method]
    settings = {"density": 1.0} if method.startswith(("dare", "della")) else {}  # nothing is drawn
    built = build(entry, settings)
    vectors = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(1))
    zeros = torch.zeros(1, 6, 5)
    merged = built.apply(vectors)
    assert torch.equal(built.apply(torch.cat([vectors, zeros])), merged)
    assert merged.any()


def test_methods_that_count_experts_refuse_parameters_of_the_base(tmp_path: Path):
    told = refused(tmp_path, f"merge_method: drm{LISTED}")
    assert told.endswith("line 5: The base is no expert, and drm counts experts: leave it out.")
    zeros = {*NO_DIFFERENCE, "average"}
    models = {name for name, method in MERGE_METHODS.items() if method.of_models()}
    for method in MERGE_METHODS.keys() - zeros - models:
        text = f"merge_method: {method}\nconventions: papers{LISTED}"
        assert "counts experts: leave it out" in refused(tmp_path, text)
    plain = LISTED.replace(", parameters: {weight: 1}", "")
    assert read(tmp_path, f"merge_method: drm{plain}").experts == {"x": "a/x"}


@pytest.mark.parametrize("models", ["[]", "[{model: a/base}]", "[{model: a/base, name: b}]"])
@pytest.mark.parametrize("more", ["", "parameters: {weight: 1}", "parameters: {normalize: false}"])
@pytest.mark.parametrize("method", ["average", "linear", "consensus"])
def test_no_model_beside_the_base(tmp_path: Path, models: str, more: str, method: str):
    text = f"merge_method: {method}\nbase_model: a/base\nmodels: {models}\nconventions: papers\n"
    told = refused(tmp_path, text + (more if method != "consensus" else ""))
    assert told.endswith("is wrong: line 3: There is no expert to merge. Give at least one.")
