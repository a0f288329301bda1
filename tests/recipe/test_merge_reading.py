"""Merge recipes: mergekit's shape, and what is read from it."""

import pytest
from merge_recipes import LINEAR, read, refused

from personae.errors import RecipeError
from personae.family.vocabularies import TokenRow
from personae.recipe import MergeSettings, merge_recipe_text, read_merge_recipe, recipe_kind


def test_a_recipe_of_mergekit_s_users_loads_unchanged(tmp_path):
    recipe = read(tmp_path, LINEAR)
    assert recipe.base == "some/base"
    assert recipe.experts == {"math": "some/math", "code": "some/code"}
    assert recipe.settings == MergeSettings(
        method="linear",
        conventions="mergekit",
        parameters={"normalize": True},
        expert_parameters=(
            {"weight": [0, 0.3, 0.6]},
            {"weight": [{"filter": "mlp", "value": 0.5}, {"value": 0.2}]},
        ),
        dtype="float16",
    )
    assert recipe.text == LINEAR
    assert recipe.notes[1:] == [
        "int8_mask is left out: masks take no memory here, results are the same."
    ]
    recipe.settings.check(list(recipe.experts))


def test_everything_a_recipe_can_say(tmp_path):
    recipe = read(
        tmp_path,
        """
merge_method: ties
conventions: personae
base_model: some/base@main
models:
  - {model: some/expert, name: news}
  - {model: ./local/law/}
parameters: {density: 0.3, scope: tensor, lambda: 0.7}
dtype: float32
out_dtype: bfloat16
tokenizer: {source: some/expert}
skip: ["visual.*"]
only: ["*.mlp.*"]
vector: task
""",
    )
    assert (recipe.base, recipe.experts) == (
        "some/base@main",
        {"news": "some/expert", "law": str(tmp_path / "local/law")},
    )
    assert recipe.settings == MergeSettings(
        method="ties",
        parameters={"density": 0.3, "scope": "tensor", "scale": 0.7},
        dtype="bfloat16",
        tokenizer_source="news",
        skip=("visual.*",),
        only=("*.mlp.*",),
    )
    assert recipe.notes == ["dtype: float32 is not used: sums are in float32 here."]


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("tokenizer_source: base", "base"),
        ("tokenizer_source: union", "union"),
        ("tokenizer_source: a/base", "base"),
        ("tokenizer: {source: model:a/x}", "x"),
        ("tokenizer_source: x", "x"),
        ("dtype: float16", None),
    ],
)
def test_whose_tokenizer_comes_out(tmp_path, said, meant):
    text = f"merge_method: average\nbase_model: a/base\nmodels: [{{model: a/x}}]\n{said}"
    assert read(tmp_path, text).settings.tokenizer_source == meant


def test_an_average_needs_no_base(tmp_path):
    recipe = read(tmp_path, "merge_method: average\nmodels: [{model: a/x}, {model: a/y}]")
    assert recipe.base is None
    assert recipe.settings.vector == "difference"


def test_other_methods_say_so_without_a_base(tmp_path):
    text = "merge_method: ties\nmodels: [{model: a/x}, {model: a/y}]\n"
    assert "line 1: ties needs 'base_model'" in refused(tmp_path, text)
    assert read(tmp_path, text + "vector: difference").settings.vector == "difference"
    both = refused(tmp_path, text + "vector: difference\nbase_model: a/b")
    assert "line 3: Differences are from the experts' average: leave base_model out" in both


def test_an_adapter_written_as_mergekit_does(tmp_path):
    text = "merge_method: average\nbase_model: a/base\nmodels: [{model: a/base+b/lora}]"
    assert read(tmp_path, text).experts == {"lora": "b/lora"}


def test_which_kind_a_recipe_is(tmp_path):
    path = tmp_path / "r.yaml"
    for text, kind in {
        "merge_method: ties": "merge",
        "pack_method: dts": "pack",
        "models: []\nreference: {merge_method: ties}": "pack",
    }.items():
        path.write_text(text)
        assert recipe_kind(path) == kind
    path.write_text("merge_method: ties\npack_method: dts")
    with pytest.raises(RecipeError, match="line 2: A recipe merges or packs"):
        recipe_kind(path)
    with pytest.raises(RecipeError, match="line 2: A recipe merges or packs"):
        read_merge_recipe(path)


@pytest.mark.parametrize(
    "settings",
    [
        MergeSettings(),
        MergeSettings(vector="difference", method="ties", dtype="float16"),
        MergeSettings(
            method="ties",
            parameters={"scale": [0.5, 1.0], "reduce": "sum", "density": 0.3},
            expert_parameters=({}, {}),
            tokenizer_source="union",
            skip=("*.bias",),
            only=("*.mlp.*", "x"),
        ),
        MergeSettings(expert_parameters=({"weight": 1.5}, {"weight": [0.0, 1.0]})),
        MergeSettings(method="ties", conventions="mergekit", parameters={"weight": 1.0}),
        MergeSettings(method="slerp", vector="difference"),
        MergeSettings(
            tokenizer_source="x",
            tokens={
                "<p>": TokenRow("y", force=True),
                "<q>": TokenRow("base", token="a"),
                "<r>": TokenRow("y", token_id=3),
                "<s>": TokenRow(),
            },
            pad_to_multiple_of=8,
            chat_template="chatml",
        ),
    ],
)
def test_settings_as_a_recipe_read_back_the_same(tmp_path, settings):
    base = None if settings.vector == "difference" else "a/base"
    experts = {"x": "a/x", "y": "/y: z"}
    recipe = read(tmp_path, merge_recipe_text(base, experts, settings))
    assert (recipe.base, recipe.experts) == (base, experts)
    if not any(settings.expert_parameters):
        settings = settings.model_copy(update={"expert_parameters": ()})
    assert recipe.settings == settings


def test_a_key_with_nothing_after_it_says_nothing(tmp_path):
    text = """
merge_method: average
base_model: a/base
models:
  - model: a/x
    parameters:
parameters:
skip:
only:
tokenizer_source:
tokenizer:
"""
    recipe = read(tmp_path, text)
    assert recipe.settings == MergeSettings()
    assert recipe.experts == {"x": "a/x"}


def test_a_tokenizer_with_tokens_padding_and_a_template(tmp_path):
    recipe = read(
        tmp_path,
        """
merge_method: average
base_model: a/base
models: [{model: a/x}]
chat_template: auto
tokenizer:
  pad_to_multiple_of: 64
  tokens:
    "<p>": {source: a/x, force: true}
    "<q>": {source: {kind: model_token, model: a/base, token: hi}}
    "<r>": {source: {kind: model_token, model: x, token_id: 7}}
    "<s>": {source: {kind: zero}}
""",
    )
    assert recipe.settings == MergeSettings(
        tokenizer_source="union",
        tokens={
            "<p>": TokenRow("x", force=True),
            "<q>": TokenRow("base", token="hi"),
            "<r>": TokenRow("x", token_id=7),
            "<s>": TokenRow(),
        },
        pad_to_multiple_of=64,
        chat_template="auto",
    )


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("pad_to_multiple_of: 0", "tokenizer.pad_to_multiple_of = 0: Input should be greater"),
        ("tokens: {x: {source: no}}", "There is no model 'no'. Known: base, x."),
        ("tokens: {x: {}}", "'tokenizer.tokens.x.source' is missing."),
        (
            "tokens: {x: {source: {kind: model_token, model: x}}}",
            "a model_token needs a model, and a token or a token_id.",
        ),
    ],
)
def test_a_tokenizer_that_cannot_be(tmp_path, said, wanted):
    text = f"merge_method: average\nbase_model: b\nmodels: [{{model: a/x}}]\ntokenizer: {{{said}}}"
    assert wanted in refused(tmp_path, text.replace("source: no", 'source: "no"'))
