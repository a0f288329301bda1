"""Merge recipes: the values a method's parameters have at each tensor."""

import pytest
import torch
from merge_recipes import LINEAR, read

from personae.methods import Parameters
from personae.recipe import MergeSettings


def test_values_at_each_tensor(tmp_path):
    settings = read(tmp_path, LINEAR).settings
    # math: 0, 0.3, 0.6 over the layers 0 … 4, so 0.15 at layer 1, 0.45 at layer 3
    for name, weight in {
        "model.embed_tokens.weight": (0, 0.2),
        "model.layers.0.attn.weight": (0, 0.2),
        "model.layers.1.mlp.weight": (0.15, 0.5),
        "model.layers.2.mlp.weight": (0.3, 0.5),
        "model.layers.3.attn.weight": (0.45, 0.2),
        "model.layers.4.attn.weight": (0.6, 0.2),
        "lm_head.weight": (0, 0.2),
    }.items():
        found = settings.for_tensor(name, layers=5, experts=2)
        assert found.model_dump()["weight"] == pytest.approx(weight), name
        assert found.model_dump()["normalize"] is True
    assert settings.for_tensor("model.layers.7.attn.weight", 1, 2).model_dump()["weight"][0] == 0


def test_equal_values_are_one_object_and_one_value():
    settings = MergeSettings(
        expert_parameters=({"weight": [{"filter": "mlp", "value": 2}, {"value": 1}]}, {"weight": 1})
    )
    first, again, other = (
        settings.for_tensor(name, 4, 2) for name in ("1.attn", "2.attn", "1.mlp")
    )
    assert isinstance(first, Parameters)
    assert first is again and first is not other
    assert (first.model_dump()["weight"], other.model_dump()["weight"]) == (1.0, (2.0, 1.0))


def test_an_expert_s_value_goes_before_the_common_one():
    settings = MergeSettings(
        parameters={"weight": [{"filter": "mlp", "value": 3.0}]},
        expert_parameters=({"weight": 2.0}, {}),
    )
    at = {n: settings.for_tensor(n, 1, 2).model_dump()["weight"] for n in ("mlp", "attn")}
    assert at == {"mlp": (2.0, 3.0), "attn": (2.0, 1.0)}  # 1.0: the method's default


def test_filters_are_texts_or_patterns():
    settings = MergeSettings(
        method="ties",
        parameters={
            "scale": [
                {"filter": "*.mlp.*", "value": 2.0},
                {"filter": "mlp", "value": 3.0},
                {"filter": "attn", "value": [0.0, 4.0]},
            ]
        },
    )
    names = ("layers.1.mlp.up", "mlp", "layers.1.attn", "norm")
    scales = [settings.for_tensor(name, 3, 1).model_dump()["scale"] for name in names]
    assert scales == [2.0, 3.0, 2.0, 1.0]


def test_patterns_that_fit_nothing_are_named():
    settings = MergeSettings(
        parameters={"weight": [{"filter": "mlp", "value": 1}, {"filter": "mpl", "value": 2}]},
        skip=("*.bias", "visual.*"),
        only=("layers.*",),
    )
    names = ["layers.0.mlp.bias", "head.weight"]
    assert settings.unmatched(names) == ["skip: visual.*", "weight: mpl"]


def test_settings_stay_what_they_are_when_used():
    settings = MergeSettings(parameters={"weight": 2.0})
    before = settings.model_dump_json()
    settings.for_tensor("x", 1, 1)
    assert settings == MergeSettings.model_validate_json(before)
    assert (
        settings.model_copy(update={"parameters": {"weight": 3.0}})
        .for_tensor("x", 1, 1)
        .model_dump()["weight"]
        == 3.0
    )


def test_a_list_for_all_experts_is_a_gradient_and_says_so():
    settings = MergeSettings(parameters={"weight": [1.0, 3.0]})
    assert settings.for_tensor("layers.1.x", 2, 2).model_dump()["weight"] == 3.0
    (note,) = settings.notes
    assert note.startswith("weight = [1.0, 3.0] is read as a gradient")


def test_weights_reach_the_method():
    settings = MergeSettings(expert_parameters=({"weight": 1.0}, {"weight": 3.0}))
    vectors = torch.tensor([[4.0], [8.0]])
    merged = settings.for_tensor("x", 1, 2).apply(vectors)
    assert merged.tolist() == [7.0]  # (1·4 + 3·8) / 4


def test_numbers_that_yaml_takes_for_texts(tmp_path):
    text = """
merge_method: ties
base_model: b
models:
  - {model: x, parameters: {weight: [1e-1, 1], density: 1e-1}}
  - {model: y, parameters: {weight: [{filter: "1", value: [2e0, 3]}, {value: 5e-1}], density: "1"}}
parameters: {scale: 1e1}
"""
    settings = read(tmp_path, text).settings
    assert settings.expert_parameters == (
        {"weight": [0.1, 1], "density": 0.1},
        {"weight": [{"filter": "1", "value": [2.0, 3]}, {"value": 0.5}], "density": 1.0},
    )
    assert settings.parameters == {"scale": 10.0}
    found = settings.for_tensor("layers.1.w", 2, 2).model_dump()
    assert (found["weight"], found["density"]) == ((1.0, 3.0), (0.1, 1.0))
    given = MergeSettings(parameters={"weight": ["1e-1", 1]})
    assert given.for_tensor("layers.0.w", 2, 2).model_dump()["weight"] == 0.1
    assert MergeSettings(method="ties", parameters={"elect": "mass"}).parameters["elect"] == "mass"
