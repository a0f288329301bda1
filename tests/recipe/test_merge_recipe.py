"""Merge recipes: mergekit's shape, what is read from it, and every fault with its line."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from pydantic import Field
from torch import Tensor

from personae.errors import MethodError, RecipeError
from personae.methods import MERGE_METHODS, MERGEKIT_METHODS, MergeMethod, Parameters
from personae.methods._registry import everywhere, merge_method
from personae.recipe import (
    MergeRecipe,
    MergeSettings,
    merge_recipe_text,
    read_merge_recipe,
    recipe_kind,
)

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
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return read_merge_recipe(path)


def refused(tmp_path: Path, text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, text)
    return str(caught.value)


@pytest.fixture
def thinned() -> Iterator[str]:
    """A method of ours, and mergekit's of the same name, which takes more."""

    def method(
        task_vectors: Tensor, *, density: Annotated[float, Field(gt=0, le=1)], reduce: str = "mean"
    ) -> Tensor:
        """Nothing, by our rule."""
        return task_vectors[0] * density

    def theirs(
        task_vectors: Tensor,
        *,
        density: float | tuple[float, ...] = 1.0,
        weight: float | tuple[float, ...],
        normalize: bool = True,
        scale: float = 1.0,
    ) -> Tensor:
        """Nothing, by theirs."""
        return task_vectors[0]

    method.__module__ = theirs.__module__ = "thinned"
    merge_method(paper="none", order_free=True, entrywise=everywhere)(method)
    merge_method(paper="none", order_free=True, entrywise=everywhere, conventions="mergekit")(
        theirs
    )
    yield "thinned"
    del MERGE_METHODS["thinned"], MERGEKIT_METHODS["thinned"]


# -- what is read -------------------------------------------------------------------------------


def test_a_recipe_of_mergekit_s_users_loads_unchanged(tmp_path):
    recipe = read(tmp_path, LINEAR)
    assert recipe.base == "some/base"
    assert recipe.experts == {"math": "some/math", "code": "some/code"}
    assert recipe.settings == MergeSettings(
        method="average",
        parameters={"normalize": True},
        expert_parameters=(
            {"weight": [0, 0.3, 0.6]},
            {"weight": [{"filter": "mlp", "value": 0.5}, {"value": 0.2}]},
        ),
        dtype="float16",
    )
    assert recipe.text == LINEAR
    assert recipe.notes == [
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
parameters: {density: 0.3, scope: tensor, lambda: 0.7, normalize: false}
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
        {"news": "some/expert", "law": "./local/law/"},
    )
    assert recipe.settings == MergeSettings(
        method="ties",
        parameters={"density": 0.3, "scope": "tensor", "scale": 0.7, "reduce": "sum"},
        dtype="bfloat16",
        tokenizer_source="news",
        skip=("visual.*",),
        only=("*.mlp.*",),
    )
    assert recipe.notes == [
        "lambda is called scale here.",
        "normalize: false is called reduce: sum here.",
        "dtype: float32 is not used: sums are in float32 here.",
    ]


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
    recipe = read(tmp_path, "merge_method: linear\nmodels: [{model: a/x}, {model: a/y}]")
    assert recipe.base is None
    assert recipe.settings.vector == "difference"


def test_other_methods_say_so_without_a_base(tmp_path):
    text = "merge_method: ties\nmodels: [{model: a/x}, {model: a/y}]\n"
    assert "line 1: ties needs 'base_model'" in refused(tmp_path, text)
    assert read(tmp_path, text + "vector: difference").settings.vector == "difference"
    both = refused(tmp_path, text + "vector: difference\nbase_model: a/b")
    assert "line 3: Differences are from the experts' average: leave base_model out" in both


def test_a_base_with_parameters_is_an_expert_too(tmp_path):
    text = """
merge_method: linear
base_model: a/base
models:
  - {model: a/base, parameters: {weight: 1}}
  - {model: a/x, parameters: {weight: 2}}
"""
    assert list(read(tmp_path, text).experts) == ["base", "x"]


def test_an_adapter_written_as_mergekit_does(tmp_path):
    text = "merge_method: linear\nbase_model: a/base\nmodels: [{model: a/base+b/lora}]"
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
    ],
)
def test_settings_as_a_recipe_read_back_the_same(tmp_path, settings):
    base = None if settings.vector == "difference" else "a/base"
    experts = {"x": "a/x", "y": "./y: z"}
    recipe = read(tmp_path, merge_recipe_text(base, experts, settings))
    assert (recipe.base, recipe.experts) == (base, experts)
    if not any(settings.expert_parameters):
        settings = settings.model_copy(update={"expert_parameters": ()})
    assert recipe.settings == settings


# -- conventions --------------------------------------------------------------------------------


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
    assert recipe.notes[-1].startswith("thinned is mergekit's (conventions: mergekit), as this")
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
    assert isinstance(method, MergeMethod) and method.name in ("average", "linear")


def test_a_required_parameter(tmp_path, thinned):
    told = refused(tmp_path, "merge_method: thinned\nbase_model: b\nmodels: [{model: x}]")
    assert "thinned needs 'density'" in told
    filtered = MergeSettings(
        method="thinned", parameters={"density": [{"filter": "mlp", "value": 0.5}]}
    )
    told = "thinned: no filter of density fits the tensor 'attention'. Add an entry without"
    with pytest.raises(MethodError, match=told):
        filtered.for_tensor("attention", 2, 1)
    with pytest.raises(RecipeError, match="no filter of density fits"):
        filtered.check(["x"])


# -- faults -------------------------------------------------------------------------------------


def test_all_faults_in_one_error_with_their_lines(tmp_path):
    told = refused(
        tmp_path,
        """\
merge_method: tise
base_modle: a/base
models:
  - model: a/x
    parameters: {weight: 1}
  - model: b/x
  - modle: a/y
    layer_range: [0, 4]
dtype: float61
dtype: float16
out_dtype: float16
slices: [1]
chat_template: auto
tokenizer: {source: unoin, tokens: {}}
random: 1
""",
    )
    lines = [line.split(". ", 1)[1] for line in told.splitlines()[1:]]
    wanted = [
        "line 1: Unknown method 'tise'. Did you mean 'ties'?",
        "line 2: Unknown key 'base_modle'. Did you mean 'base_model'?",
        "line 6: Two models are named 'x'. Give each its own 'name'.",
        "line 7: 'models.2.model' is missing.",
        "line 7: Unknown key 'models.2.modle'. Did you mean 'model'?",
        "line 8: 'layer_range' takes some layers of a model.",
        "line 10: 'dtype' is there twice, in line 9 too. Keep one.",
        "line 12: 'slices' builds a model of parts of others.",
        "line 13: A chat template is not set by a merge",
        "line 14: Rows of single tokens cannot be chosen.",
        "line 14: There is no vocabulary 'unoin'. Did you mean 'union'?",
        "line 15: Unknown key 'random'.",
    ]
    assert len(lines) == len(wanted)
    for line, start in zip(lines, wanted, strict=True):
        assert line.startswith(start)


def test_faults_of_parameters_with_their_lines(tmp_path):
    told = refused(
        tmp_path,
        """\
merge_method: ties
base_model: a/base
models:
  - model: a/x
    parameters:
      density: 0.4
  - model: a/y
    parameters:
      wieght: 2
parameters:
  scale: .nan
  elect:
    - filter: mlp
      value: cuont
    - value: mass
  scope: [0.1, 0.2]
  reduce: [{filter: mlp, vlaue: mean}]
""",
    )
    for fault in (
        "line 9: ties has no parameter 'wieght'. Did you mean 'weight'?",
        "line 11: ties: scale = nan: Input should be a finite number.",
        "line 12: ties: elect = 'cuont': Input should be 'mass' or 'count'.",
        "line 16: ties: scope = 0.1: Input should be 'model' or 'tensor'.",
        "line 17: reduce = [{'filter': 'mlp', 'vlaue': 'mean'}]: expected a value, a list of",
    ):
        assert fault in told


def test_values_on_a_gradient_are_looked_at_too(tmp_path):
    told = refused(
        tmp_path,
        """
merge_method: ties
base_model: a/base
models: [{model: a/x}]
parameters: {scope: tensor, density: [1.0, 0.5, 1.2]}
""",
    )
    assert "line 5: ties: density = 1.2: Input should be less than or equal to 1" in told


def test_weights_of_some_experts_alone():
    settings = MergeSettings(expert_parameters=({"weight": 1.0}, {}))
    with pytest.raises(RecipeError, match="weight is given for 1 of 2 experts, not for 'b'"):
        settings.check(["a", "b"])
    MergeSettings(parameters={"weight": 2.0}, expert_parameters=({"weight": 1.0}, {})).check(
        ["a", "b"]
    )
    with pytest.raises(RecipeError, match="given for 2 experts, but there are 3"):
        settings.check(["a", "b", "c"])


def test_what_all_experts_share_may_be_said_of_each():
    same = ({"scale": 0.3}, {"scale": 0.3})
    settings = MergeSettings(method="ties", expert_parameters=same)
    settings.check(["a", "b"])
    assert settings.for_tensor("x", 1, 2).model_dump()["scale"] == 0.3
    apart = MergeSettings(method="ties", expert_parameters=({"scale": 0.3}, {"scale": 0.4}))
    with pytest.raises(RecipeError, match="ties takes one scale for all experts"):
        apart.check(["a", "b"])


def test_values_that_are_wrong_together():
    apart = ({"weight": [1.0, -1.0]}, {"weight": 1.0})
    with pytest.raises(RecipeError, match="sum to 0"):  # in the last layer
        MergeSettings(expert_parameters=apart).check(["a", "b"])
    in_filter = ({"weight": [{"filter": "*.mlp.*", "value": -1}, {"value": 1}]}, {"weight": 1})
    with pytest.raises(RecipeError, match="sum to 0"):
        MergeSettings(expert_parameters=in_filter).check(["a", "b"])
    MergeSettings(expert_parameters=({"weight": [1.0, 0.0]}, {"weight": 1.0})).check(["a", "b"])


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
    if method == "ties":  # our own looks at the whole model, where a density cannot vary
        assert recipe.settings.conventions == "mergekit"
        assert first.model_dump()["density"] == (1.0, 0.5, 0.33)
        assert last.model_dump()["density"] == pytest.approx((0.1, 0.5, 0.33))
        assert last.model_dump()["weight"] == (1.0, 1.0, 0.5)
    elif method == "dare_ties":
        assert last.model_dump()["density"] == pytest.approx((0.53, 0.4))
    else:
        assert first.model_dump()["weight"][0] == recipe.settings.expert_parameters[0]["weight"]


def test_what_the_whole_model_is_looked_at_for_cannot_vary():
    varying: dict[str, Any] = {"density": [0.1, 0.9]}
    with pytest.raises(RecipeError, match="looks at the whole model, so density cannot differ"):
        MergeSettings(method="ties", parameters=varying).check(["a"])
    MergeSettings(method="ties", parameters=varying | {"scope": "tensor"}).check(["a"])
    MergeSettings(method="ties", parameters={"scale": [0.1, 0.9]}).check(["a"])
    filtered = {"density": [{"filter": "mlp", "value": 0.2}]}  # elsewhere the default
    with pytest.raises(RecipeError, match="or 'scope: tensor'"):
        MergeSettings(method="ties", parameters=filtered).check(["a"])


def test_faults_beside_the_parameters():
    with pytest.raises(RecipeError, match="There is no expert to merge"):
        MergeSettings().check([])
    with pytest.raises(RecipeError, match=r"no vocabulary 'mth'. Did you mean 'math'\?"):
        MergeSettings(tokenizer_source="mth").check(["math"])
    with pytest.raises(RecipeError, match="no base whose vocabulary could come out"):
        MergeSettings(vector="difference", tokenizer_source="base").check(["a"])
    with pytest.raises(RecipeError, match=r"Unknown method 'avrage'. Did you mean 'average'\?"):
        MergeSettings(method="avrage").check(["a"])
    with pytest.raises(RecipeError, match="'della' is a method of mergekit that personae does not"):
        MergeSettings(method="della", conventions="mergekit").check(["a"])
    with pytest.raises(MethodError, match="'dts' codes models, it does not merge them"):
        MergeSettings(method="dts").merge_method()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no settings"),
        ("- a", "holds no settings"),
        ("models: [", "is no valid YAML"),
        ("models: !!python/object/apply:os.system [true]", "is no valid YAML"),
        ("merge_method: average", "'models' is missing"),
        ("models: [{model: a}]", "'merge_method' is missing"),
        ("merge_method: linear\nmodels: []", "There is no expert to merge"),
        ("merge_method: linear\nmodels: 3", "models = 3: expected a list"),
        ("merge_method: linear\nmodels: [3]", "models.0 = 3: expected keys with values"),
        ("merge_method: linear\nmodels: [{model: a}]\n1: 2", "1 = 1: Keys should be strings"),
        ("merge_method: linear\nmodels: &m [{model: a}, *m]", "models.1 = "),
    ],
)
def test_what_is_no_recipe(tmp_path, text, message):
    assert message in refused(tmp_path, text)


def test_a_recipe_that_is_not_there(tmp_path):
    with pytest.raises(RecipeError, match=r"none.yaml cannot be read: No such file"):
        read_merge_recipe(tmp_path / "none.yaml")


# -- values at a tensor -------------------------------------------------------------------------


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
    merged = settings.merge_method().merge(vectors, settings.for_tensor("x", 1, 2))
    assert merged.tolist() == [7.0]  # (1·4 + 3·8) / 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "models: [org/a]",
            "models.0 = 'org/a': expected keys with values. Write '- model: org/a'.",
        ),
        ("models: org/a", "models = 'org/a': expected a list. Write '- model: org/a'."),
        ("models: [{model: ''}]", "models.0.model = '': expected a name or path."),
        ("models: [{model: 3}]", "models.0.model = 3: expected text."),
    ],
)
def test_models_of_another_form_are_one_fault(tmp_path, text, message):
    said = refused(tmp_path, f"merge_method: average\nbase_model: b\n{text}")
    assert said.endswith(f"is wrong: line 3: {message}")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("20", "Input should be less than or equal to 1. It is a fraction: 20 % is 0.2."),
        ("2000", "Input should be less than or equal to 1."),
        ("yes", "expected a number or word, not true."),
        ("[{filter: a, value: no}, {value: 0.5}]", "expected a number or word, not false."),
    ],
)
def test_a_density_that_is_no_fraction(tmp_path, value, message):
    said = refused(
        tmp_path,
        "merge_method: ties\nbase_model: b\nmodels: [{model: a}]\n"
        f"parameters: {{density: {value}, scope: tensor}}",
    )
    assert said.endswith(message)
