"""Recipes: what is read, and every fault of a file in one error."""

import re
from pathlib import Path

import pytest

from personae.checkpoints.naming import name_of
from personae.errors import MethodError, RecipeError
from personae.recipe import PackSettings, parse_size, read_recipe, settings_from

WHOLE = """
pack_method: dts
base_model: some/base@main
models:
  - model: some/expert
    name: news
    describe: [sports, "politics"]
  - model: ./local/law/
    describe: What a court has decided.
  - model: a/third
parameters:
  qkv: split
budget: 1%
counting: amr_paper
vector: difference
reference:
  merge_method: ties
  parameters: {density: 0.3}
skip: ["visual.*"]
private: [head.weight]
"""


def _read(tmp_path: Path, text: str):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return read_recipe(path)


def test_everything_a_recipe_can_say(tmp_path):
    recipe = _read(tmp_path, WHOLE)
    assert recipe.base == "some/base@main"
    assert recipe.experts == {
        "news": "some/expert",
        "law": str(tmp_path / "local/law"),
        "third": "a/third",
    }
    assert recipe.characteristics == {
        "news": ("sports", "politics"),
        "law": ("What a court has decided.",),
    }
    assert recipe.settings == PackSettings(
        method="dts",
        parameters={"qkv": "split"},
        budget="1%",
        counting="amr_paper",
        vector="difference",
        reference="ties",
        reference_parameters={"density": 0.3},
        skip=("visual.*",),
        private=("head.weight",),
    )


def test_what_is_not_said_has_its_default(tmp_path):
    recipe = _read(tmp_path, "models: [{model: a/b}]")
    assert (recipe.base, recipe.experts) == (None, {"b": "a/b"})
    assert recipe.settings == PackSettings()


def test_a_hub_revision_is_no_part_of_a_name(tmp_path):
    assert _read(tmp_path, "models: [{model: org/name@v1}]").experts == {"name": "org/name@v1"}


def test_all_faults_in_one_error(tmp_path):
    text = """
pack_methd: dts
models:
  - modle: a
vector: sideways
budget: lots
counting: bytes
reference: {merge_methd: ties}
"""
    with pytest.raises(RecipeError) as caught:
        _read(tmp_path, text)
    message = str(caught.value)
    assert "recipe.yaml is wrong in 7 places:" in message
    for fault in (
        "line 2: Unknown key 'pack_methd'. Did you mean 'pack_method'?",
        "line 4: 'models.0.model' is missing.",
        "line 4: Unknown key 'models.0.modle'. Did you mean 'model'?",
        "line 5: vector = 'sideways': Input should be 'task' or 'difference'",
        "line 6: budget = 'lots': 'lots' is no size of a byte or more. Write '1%', '900KB' or",
        "line 7: counting = 'bytes': Input should be 'amr_paper'",
        "line 8: Unknown key 'reference.merge_methd'. Did you mean 'merge_method'?",
    ):
        assert fault in message


def test_faults_of_every_kind_in_one_error(tmp_path):
    text = """
pack_method: dts
models:
  - model: a/x
  - model: b/x
parameters: {rank_fracton: 0.3}
budgt: 1%
vector: difference
reference: {merge_method: average, parameters: {weight: [1, 2, 3]}}
pack_method: svd
"""
    with pytest.raises(RecipeError) as caught:
        _read(tmp_path, text)
    message = str(caught.value)
    for fault in (
        "line 5: Two models are named 'x'. Give each its own 'name'.",
        "line 7: Unknown key 'budgt'. Did you mean 'budget'?",
        "line 9: weight has 3 values for 2 experts.",
        "line 10: 'pack_method' is there twice, in line 2 too. Keep one.",
    ):
        assert fault in message
    assert re.search(r"line 6: .*rank_fracton.* Did you mean 'rank_fraction'\?", message)


def test_values_of_the_reference_must_fit_the_experts():
    settings = PackSettings(vector="difference", reference_parameters={"weight": [1, -1]})
    with pytest.raises(MethodError, match="sum to 0"):
        settings.merge(2)


def test_models_are_needed(tmp_path):
    with pytest.raises(RecipeError, match="'models' is missing"):
        _read(tmp_path, "base_model: a")


@pytest.mark.parametrize("budget", ["0%", "-1%", "0.01", "0", "1 parsec", "%", "1%%"])
def test_bad_budgets(tmp_path, budget):
    with pytest.raises(RecipeError, match="is no size of a byte or more"):
        _read(tmp_path, f"models: [{{model: a}}]\nbudget: {budget!r}")
    with pytest.raises(RecipeError, match="is no size of a byte or more"):
        settings_from({"budget": budget})


def test_names_of_models(tmp_path):
    with pytest.raises(RecipeError, match=r"Two models are named 'x'. Give each its own 'name'"):
        _read(tmp_path, "models: [{model: a/x}, {model: b/x}, {model: c, name: y}]")
    with pytest.raises(RecipeError, match=r"line 2: 'my x' is not a safe file name"):
        _read(tmp_path, "models:\n  - model: a/my x")


def test_a_key_with_nothing_after_it_says_nothing(tmp_path):
    recipe = _read(tmp_path, "models: [{model: a/x}]\nparameters:\nskip:\nprivate:")
    assert recipe.settings == PackSettings()


def test_no_models_are_no_weights_that_sum_to_nothing():
    PackSettings().merge(0)


@pytest.mark.parametrize("text", ["", "just words", "- a\n- b", "3"])
def test_what_holds_no_settings(tmp_path, text):
    with pytest.raises(RecipeError, match="holds no settings"):
        _read(tmp_path, text)


def test_what_is_no_yaml(tmp_path):
    with pytest.raises(RecipeError, match=r"is no valid YAML"):
        _read(tmp_path, "models: [")


def test_yaml_that_would_build_objects_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"is no valid YAML"):
        _read(tmp_path, "models: !!python/object/apply:os.system [true]")


def test_keys_that_are_no_text(tmp_path):
    with pytest.raises(RecipeError, match="Unknown key '1'"):
        _read(tmp_path, "models: [{model: a}]\n1: 2")


def test_a_recipe_that_is_not_there(tmp_path):
    with pytest.raises(RecipeError, match=r"none.yaml cannot be read: No such file"):
        read_recipe(tmp_path / "none.yaml")


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(RecipeError, match="is no UTF-8 text"):
        read_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1%", 0.01),
        ("0.5 %", 0.005),
        ("900KB", 900_000),
        ("1.5MiB", 3 * 2**19),
        ("2gib", 2**31),
        ("1_000", 1000),
        ("7 B", 7),
    ],
)
def test_sizes(text, size):
    found = parse_size(text, percent=True)
    assert found == size
    assert type(found) is type(size)


@pytest.mark.parametrize("text", ["1%", "", "KB", "-3MB", "1TB", "nan", "inf", "0.2B"])
def test_what_is_no_number_of_bytes(text):
    with pytest.raises(ValueError, match=r"is no size of a byte or more. Write '900MB' or '2GiB'"):
        parse_size(text)


def test_unknown_options_suggest_the_nearest():
    with pytest.raises(RecipeError, match=r"Unknown key 'metod'. Did you mean 'method'\?"):
        settings_from({"metod": "dts"})


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("org/name", "name"),
        ("org/name@refs/pr/1", "name"),
        ("runs/cola", "cola"),
        ("/home/me@here/cola", "cola"),
        ("runs/cola/model.safetensors", "cola"),
        ("runs/cola/pytorch_model.bin", "cola"),
        ("runs/cola.safetensors", "cola"),
        ("runs/v1.5", "v1.5"),
    ],
)
def test_what_an_expert_without_a_name_is_called(model, name):
    assert name_of(model) == name


def test_true_is_no_number_of_a_codec():
    settings = PackSettings(parameters={"rank_fraction": True})
    with pytest.raises(MethodError, match=r"rank_fraction = True: expected a number or word, not"):
        settings.codec()


def test_a_reference_that_merges_adapters_alone_is_refused():
    settings = PackSettings(vector="difference", reference="core_space")
    with pytest.raises(MethodError, match="core_space merges LoRA adapters"):
        settings.merge(2)
