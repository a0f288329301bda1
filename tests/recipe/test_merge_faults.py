"""Merge recipes: every fault in one error, with its line."""

from typing import Any

import pytest
from merge_recipes import read, refused

from personae.errors import MethodError, RecipeError
from personae.recipe import MergeSettings, read_merge_recipe


def test_all_faults_in_one_error_with_their_lines(tmp_path):
    told = refused(
        tmp_path,
        """\
merge_method: tise
base_modle: a/base
models:
  - {model: a/y, name: x}
    # called alike
  - {model: b/x, name: x}
  - modle: a/y
    layer_range: [0, 4]
dtype: float61
dtype: float16
out_dtype: float16
slices: [1]
chat_template: outo
tokenizer: {source: unoin, tokens: {x: {source: {kind: model_token, model: y}}}}
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
        "line 8: 'layer_range' takes some layers of a model,",
        "line 10: 'dtype' is there twice, in line 9 too. Keep one.",
        "line 12: 'models' and 'slices' both say what is merged. Keep one.",
        "line 13: chat_template = 'outo': expected one of auto, alpaca, chatml, exaone, llama3,",
        "line 14: There is no vocabulary 'unoin'. Did you mean 'union'?",
        "line 14: tokenizer.tokens.x.source = {'kind': 'model_token', 'model': 'y'}: a model_token",
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


def test_models_that_are_no_list(tmp_path):
    """Read in mergekit's words, whose parameters are looked for wherever they may be."""
    for models in ("{parameters: {weight: 1, density: 0.5}}", "{a: {parameters: {normalize: 1}}}"):
        (tmp_path / "r.yaml").write_text(
            f"merge_method: ties\nbase_model: base\nmodels: {models}\n"
        )
        with pytest.raises(RecipeError, match=r"line 3: models = .*: expected a list"):
            read_merge_recipe(tmp_path / "r.yaml")


def test_values_that_are_wrong_together():
    apart = ({"weight": [1.0, -1.0]}, {"weight": 1.0})
    with pytest.raises(RecipeError, match="sum to 0"):  # in the last layer
        MergeSettings(expert_parameters=apart).check(["a", "b"])
    in_filter = ({"weight": [{"filter": "*.mlp.*", "value": -1}, {"value": 1}]}, {"weight": 1})
    with pytest.raises(RecipeError, match="sum to 0"):
        MergeSettings(expert_parameters=in_filter).check(["a", "b"])
    MergeSettings(expert_parameters=({"weight": [1.0, 0.0]}, {"weight": 1.0})).check(["a", "b"])


def test_what_the_whole_model_is_looked_at_for_cannot_vary():
    varying: dict[str, Any] = {"density": [0.1, 0.9]}
    with pytest.raises(
        RecipeError, match="reads the whole model before it merges, so density cannot"
    ):
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
    with pytest.raises(RecipeError, match="no base whose vocabulary the output could have"):
        MergeSettings(vector="difference", tokenizer_source="base").check(["a"])
    with pytest.raises(RecipeError, match=r"Unknown method 'avrage'. Did you mean 'average'\?"):
        MergeSettings(method="avrage").check(["a"])
    with pytest.raises(RecipeError, match="'ram' is a method of mergekit that personae does not"):
        MergeSettings(method="ram", conventions="mergekit").check(["a"])
    with pytest.raises(MethodError, match="'dts' is a codec, not a merge method"):
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
        ("merge_method: linear\nmodels: [{model: a}]\n1: 2", "Unknown key '1'"),
        ("merge_method: linear\nmodels: &m [{model: a}, *m]", "has an alias in line 2 (*m)"),
    ],
)
def test_what_is_no_recipe(tmp_path, text, message):
    assert message in refused(tmp_path, text)


def test_a_recipe_that_is_not_there(tmp_path):
    with pytest.raises(RecipeError, match=r"none.yaml cannot be read: No such file"):
        read_merge_recipe(tmp_path / "none.yaml")


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
        "merge_method: ties\nbase_model: b\nmodels: [{model: a}]\nconventions: papers\n"
        f"parameters: {{density: {value}, scope: tensor}}",
    )
    assert said.endswith(message)


AVERAGE = "merge_method: average\nbase_model: b\n"
TIES = "merge_method: ties\nconventions: mergekit\nbase_model: b\n"


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (
            f"{AVERAGE}models:\n"
            "  - {model: x, parameters: {weight: 1}}\n"
            "  - {model: y, parameters: {weight: -1}}",
            4,
            "average divides by the sum of the weights, and 1, -1 sum to 0.",
        ),
        (
            "merge_method: consensus\nbase_model: b\nmodels: [{model: x}, {model: y}]\n"
            "parameters:\n  scale: 0.3\n  at_least: 3",
            6,
            "consensus: at_least is 3, and there are 2 expert(s), so that no entry could be kept. "
            "Give at most 2.",
        ),
        (
            "merge_method: consensus\nbase_model: b\nmodels: [{model: x}]",
            1,
            "consensus: at_least is 2, and there are 1 expert(s), so that no entry could be kept. "
            "Give at most 1.",
        ),
        (f"{TIES}models: [{{model: x}}]", 1, "ties needs 'weight'. Give it. mergekit asks"),
    ],
)
def test_values_that_are_wrong_together_have_a_line(tmp_path, text, line, message):
    assert f"is wrong: line {line}: {message}" in refused(tmp_path, text)


def test_filters_alone_where_there_is_no_default(tmp_path):
    filtered = "[{filter: mlp, value: 0.5}]"
    wanted = (
        "ties needs a weight for every tensor, but there are only entries with a filter. Add a "
        "last entry without 'filter' for all other tensors."
    )
    models = f"""models:
  - {{model: x, parameters: {{weight: 1}}}}
  - model: y
    parameters:
      weight: {filtered}
"""
    assert refused(tmp_path, TIES + models).endswith(f"is wrong: line 8: {wanted}")
    common = f"{TIES}models: [{{model: x}}]\nparameters:\n  weight: {filtered}"
    assert refused(tmp_path, common).endswith(f"is wrong: line 6: {wanted}")
    read(tmp_path, f"{TIES}{models}parameters: {{weight: 1}}")
    read(tmp_path, TIES + models.replace("0.5}]", "0.5}, {value: 1}]"))


def test_an_average_without_a_base_whose_weights_scale_it(tmp_path):
    text = """merge_method: average
models:
  - {model: x, parameters: {weight: 0.5}}
  - {model: y, parameters: {weight: 0.7}}
"""
    told = refused(tmp_path, f"{text}parameters: {{normalize: false}}")
    assert "line 5: average: normalize is false and the weights sum to 1.2, which would" in told
    assert read(tmp_path, text).base is None
    read(tmp_path, text.replace("0.7", "0.5") + "parameters: {normalize: false}")
    read(tmp_path, f"{text}parameters: {{normalize: false}}\nbase_model: b")  # base + Σ w τ
    settings = MergeSettings(
        vector="difference", parameters={"normalize": False, "weight": [0.5, 0.6]}
    )
    with pytest.raises(RecipeError, match=r"sum to 1\.2, which would scale the whole model"):
        settings.check(["a", "b"])  # in the last layer


@pytest.mark.parametrize(
    ("models", "names"),
    [
        ("[{model: a/my model}, {model: наука/法律}]", ["my model", "法律"]),
        ("[{model: a/x}, {model: a/X}]", ["x", "X"]),
        (
            "[{model: a/checkpoint-500}, {model: b/checkpoint-500}, {model: b/y}]",
            ["a/checkpoint-500", "b/checkpoint-500", "y"],
        ),
        ("[{model: a/t/last}, {model: b/t/last/}]", ["a/t/last", "b/t/last"]),
        (
            "[{model: a/t/model.safetensors}, {model: /b/t/x.bin}, {model: /t}]",
            ["a/t", "x", "/t"],
        ),
        ("[{model: a/x}, {model: b/y, name: x}]", ["a/x", "x"]),
        ("[{model: a/x@v1}, {model: a/x@refs/pr/1}]", ["a/x@v1", "a/x@refs/pr/1"]),
        ("[{model: a/x}, {model: a/x}, {model: a/x}]", ["x", "x #2", "x #3"]),
        ("[{model: a/x, name: .x y}, {model: ..}]", [".x y", ".."]),
    ],
)
def test_every_model_has_a_label_of_its_own(tmp_path, models, names):
    text = f"merge_method: average\nbase_model: b\nmodels: {models}"
    assert list(read(tmp_path, text).experts) == names


def test_a_name_given_twice(tmp_path):
    text = "merge_method: average\nmodels:\n  - {model: a/x, name: y}\n  - {model: b, name: y}"
    told = "line 4: Two models are named 'y'. Give each its own 'name'."
    assert told in refused(tmp_path, text)


@pytest.mark.parametrize(
    ("value", "odd"),
    [
        ("[0.1, 0.2, true]", "true"),
        ("[0.1, 0.2, x]", "'x'"),
        ("[true, 0.1]", "true"),
        ("[{value: 1}, 0.1]", "0.1"),
    ],
)
def test_a_gradient_names_what_is_no_number(tmp_path, value, odd):
    text = f"{AVERAGE}models: [{{model: x}}]\nparameters: {{weight: {value}}}"
    assert refused(tmp_path, text).endswith(f"a list of {{filter, value}}, not {odd} in it.")


def test_two_sources_of_the_tokenizer(tmp_path):
    text = f"{AVERAGE}models: [{{model: a/x}}]\ntokenizer_source: x\ntokenizer:\n  source: "
    told = refused(tmp_path, f"{text}base")
    assert told.endswith("line 6: tokenizer_source is 'x' and tokenizer.source 'base'. Keep one.")
    assert read(tmp_path, f"{text}a/x").settings.tokenizer_source == "x"
