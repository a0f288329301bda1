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


TIES = "merge_method: ties\nbase_model: b\nmodels: [{model: x}, {model: y}]\n"
THEIRS = TIES + "parameters: {weight: 1, density: 0.5, normalize: true, int8_mask: true}\n"
INT8_MASK = "int8_mask is left out: masks take no memory here, results are the same."


def test_a_recipe_in_mergekit_s_words_means_mergekit_s_model(tmp_path):
    recipe = read(tmp_path, THEIRS)
    assert recipe.settings.conventions == "mergekit"
    assert recipe.settings.merge_method() is MERGEKIT_METHODS["ties"]
    assert recipe.notes == [
        "ties is mergekit's algorithm here: no key of the recipe is personae's own. For the "
        "paper's algorithm, write conventions: papers",
        INT8_MASK,
    ]
    assert read(tmp_path, f"{THEIRS}conventions: mergekit").notes == [INT8_MASK]


@pytest.mark.parametrize("word", ["papers", "personae"])
def test_the_papers_by_a_word(tmp_path, word):
    recipe = read(tmp_path, f"{TIES}conventions: {word}")
    assert recipe.settings == MergeSettings(method="ties", conventions="papers")
    assert recipe.settings.merge_method() is MERGE_METHODS["ties"]
    assert recipe.notes == []


@pytest.mark.parametrize(
    ("more", "line", "key"),
    [
        ("skip: [x.*]", 4, "skip"),
        ("only: [x.*]", 4, "only"),
        ("vector: task", 4, "vector"),
        ("parameters: {scale: 0.5}", 4, "scale"),
        ("parameters:\n  weight: 1\n  reduce: sum", 6, "reduce"),
        ("parameters: {elect: count}", 4, "elect"),
        ("parameters: {scope: tensor}", 4, "scope"),
    ],
)
def test_a_key_of_our_own_means_the_papers_and_is_named(tmp_path, more, line, key):
    recipe = read(tmp_path, TIES + more)
    assert recipe.settings.conventions == "papers"
    assert recipe.notes == [
        f"line {line}: ties is the paper's algorithm here: '{key}' is personae's own key. For "
        "mergekit's algorithm, write conventions: mergekit"
    ]


def test_a_name_of_a_model_is_our_own_key(tmp_path):
    recipe = read(tmp_path, TIES.replace("model: y", "model: y, name: z"))
    assert recipe.settings.conventions == "papers"
    assert "line 3: ties is the paper's algorithm here: 'name' is" in recipe.notes[0]
    named = TIES.replace("model: y", "model: y, name: z") + "parameters: {weight: 1}\n"
    recipe = read(tmp_path, f"{named}conventions: mergekit")
    assert ([*recipe.experts], recipe.notes) == (["x", "z"], [])


@pytest.mark.parametrize("method", ["average", "dare", "drm", "tsv_m", "consensus", "wudi"])
def test_a_method_of_our_own_is_ours(tmp_path, method):
    recipe = read(tmp_path, TIES.replace("ties", method))
    assert (recipe.settings.conventions, recipe.notes) == ("papers", [])
    told = refused(tmp_path, TIES.replace("ties", method) + "int8_mask: true\nrandom_seed: 1")
    assert "line 4: Unknown key 'int8_mask'." in told and "line 5: Unknown key 'random_s" in told


@pytest.mark.parametrize("method", ["arcee_fusion", "karcher"])
def test_nothing_is_said_where_both_mean_one_algorithm(tmp_path, method):
    text = f"merge_method: {method}\nbase_model: b\nmodels: [{{model: b}}, {{model: x}}]"
    assert not any("conventions" in note for note in read(tmp_path, text).notes)


def test_defaults_are_mergekit_s(tmp_path):
    """Everything is kept where no density is given, and divided by the weights that agree."""
    recipe = read(tmp_path, TIES + "parameters: {weight: 0.5}")
    vectors = torch.tensor([[2.0, 1.0], [4.0, -3.0]])
    # (0.5·2 + 0.5·4) / (0.5 + 0.5), and the -3 alone
    assert recipe.settings.for_tensor("w", 1, 2).apply(vectors).tolist() == [3.0, -3.0]
    ours = read(tmp_path, TIES + "parameters: {weight: 0.5, scope: tensor, density: 1.0}")
    assert ours.settings.for_tensor("w", 1, 2).apply(vectors).tolist() == [1.5, -1.5]


def test_what_mergekit_asks_for_is_asked_for_with_a_way_out(tmp_path):
    assert refused(tmp_path, TIES + "conventions: mergekit").endswith(
        "line 1: ties needs 'weight'. Give it. mergekit asks for it; with conventions: papers it "
        "is 1.0 by default."
    )


@pytest.mark.parametrize("method", ["ties", "dare_ties", "task_arithmetic"])
def test_a_recipe_that_mergekit_would_refuse_is_the_paper_s(tmp_path, method):
    """mergekit has no default for a weight: without one anywhere it merges nothing."""
    recipe = read(tmp_path, TIES.replace("ties", method))
    assert recipe.settings.conventions == "papers"
    assert recipe.notes == [
        f"{method} is the paper's algorithm here: the recipe gives no 'weight', without which "
        "mergekit refuses it. For mergekit's algorithm, give each model one and write conventions: "
        "mergekit"
    ]
    some = read(tmp_path, TIES.replace("ties", method) + "parameters: {weight: 1}")
    assert some.settings.conventions == "mergekit"


def test_a_misspelt_weight_is_no_paper_s_default(tmp_path):
    told = refused(tmp_path, TIES + "parameters: {wieght: 1}")
    assert "ties has no parameter 'wieght'. Did you mean 'weight'?" in told


def test_what_mergekit_does_not_read_is_left_out_with_a_note_each(tmp_path):
    text = """\
name: stage-one
merge_method: dare_ties
base_model: b
normalize: true
int8_mask: true
random_seed: 7
lamda: 0.5
models:
  - model: x
    wieght: 0.3
    layer_range: [0, 32]
    parameters: {weight: 0.5, densty: 0.3}
  - model: y
    parameters: {weight: 0.5, dtype: float16, t: 1, int8_mask: true, anything: 2}
parameters: {t: 0.5}
dytpe: bfloat16
tokenizer: {sorce: base, source: base}
"""
    recipe = read(tmp_path, text)
    assert recipe.settings == MergeSettings(
        method="dare_ties",
        conventions="mergekit",
        expert_parameters=({"weight": 0.5}, {"weight": 0.5}),
        tokenizer_source="base",
    )
    left_out = "is left out, as mergekit does not read it."
    wanted = [
        f"line 1: 'name' {left_out}",
        f"line 4: 'normalize' {left_out} It is read under 'parameters' alone.",
        f"line 5: 'int8_mask' {left_out} It is read under 'parameters' alone.",
        f"line 6: 'random_seed' {left_out}",
        f"line 7: 'lamda' {left_out}",
        f"line 10: 'models.0.wieght' {left_out}",
        f"line 11: 'models.0.layer_range' {left_out}",
        f"line 12: 'models.0.parameters.densty' {left_out} Did you mean 'density'?",
        f"line 14: 'models.1.parameters.dtype' {left_out} It is read at the top of a recipe alone.",
        f"line 14: 'models.1.parameters.t' {left_out}",
        f"line 14: 'models.1.parameters.anything' {left_out}",
        INT8_MASK,
        f"line 15: 'parameters.t' {left_out}",
        f"line 16: 'dytpe' {left_out} Did you mean 'dtype'?",
        f"line 17: 'tokenizer.sorce' {left_out} Did you mean 'source'?",
    ]
    assert sorted(recipe.notes[1:]) == sorted(wanted)
    told = refused(tmp_path, f"{text}conventions: papers")
    for line, key in (1, "name"), (4, "normalize"), (7, "lamda"), (10, "models.0.wieght"):
        assert f"line {line}: Unknown key '{key}'." in told
    assert "line 16: Unknown key 'dytpe'. Did you mean 'dtype'?" in told
    assert "line 12: dare_ties has no parameter 'densty'. Did you mean 'density'?" in told


def test_a_slip_is_told_where_the_recipe_is_refused_and_nothing_else(tmp_path):
    text = """\
merge_method: ties
base_model: b
models:
  - model: x
    parameters: {weight: 1, normalise: 2}
  - {model: y, parameters: {wieght: 1}}
parameters: {normalize: true, density: 0.5}
"""
    told = refused(tmp_path, text).splitlines()
    assert len(told) == 4
    assert "line 5: 'models.0.parameters.normalise' is left out" in told[1]
    assert "line 5: weight is given for 1 of 2 experts, not for 'y'." in told[2]
    assert "line 6: 'models.1.parameters.wieght' is left out" in told[3]
    assert "Did you mean 'weight'?" in told[3]


def test_one_wrong_key_makes_no_other_a_fault(tmp_path):
    text = THEIRS.replace("density: 0.5", "density: 5").replace(", int8_mask: true", "")
    assert "is wrong: line 4: ties: density = 5" in refused(tmp_path, text)
    text = THEIRS.replace("merge_method: ties", "merge_method: tise")
    assert "is wrong: line 1: Unknown method 'tise'. Did you mean 'ties'?" in refused(
        tmp_path, text
    )


def test_papers_refuse_mergekit_s_parameters_and_say_whose_they_are(tmp_path):
    told = refused(tmp_path, f"{THEIRS}conventions: papers")
    assert "line 4: ties has no parameter 'normalize'." in told
    assert "mergekit's ties has it: conventions: mergekit." in told


def test_what_is_said_of_one_model_alone_is_the_default_of_others(tmp_path):
    text = TIES.replace("model: x", "model: x, parameters: {density: 0.5}")
    recipe = read(tmp_path, text + "parameters: {weight: 1}")
    assert recipe.settings.for_tensor("w", 1, 2).model_dump()["density"] == (0.5, 1.0)
    told = refused(tmp_path, f"{text}conventions: papers")
    assert "density is given for 1 of 2 experts, not for 'y'." in told


def test_task_arithmetic_does_not_read_what_it_does_not_use(tmp_path):
    text = TIES.replace("ties", "task_arithmetic") + "parameters: {weight: 1, density: 0.5}"
    recipe = read(tmp_path, text)
    assert recipe.settings.parameters == {"weight": 1}
    assert recipe.notes[1].endswith("does not read it. Its task_arithmetic has none.")


def test_several_documents_are_refused_with_a_way_out(tmp_path):
    told = refused(tmp_path, f"{THEIRS}---\n{THEIRS}")
    assert "holds 2 documents (parted by ---)" in told
    assert "give each a file of its own" in told


def test_a_filter_is_text_for_mergekit_and_not_a_pattern(tmp_path):
    text = (
        TIES
        + """\
parameters:
  density:
    - filter: "*.mlp.*"
      value: 0.1
    - filter: "*"
      value: 0.7
  weight: [{filter: mlp, value: 2}, {value: 1}]
"""
    )
    recipe = read(tmp_path, text)
    assert recipe.settings.for_tensor("a.mlp.w", 1, 2).model_dump()["density"] == 0.7
    assert recipe.settings.for_tensor("a.mlp.w", 1, 2).model_dump()["weight"] == 2
    assert "line 6: 'parameters.density.0' is left out" in recipe.notes[1]
    ours = read(tmp_path, f"{text}  scope: tensor\n")
    assert ours.settings.for_tensor("a.mlp.w", 1, 2).model_dump()["density"] == 0.1


def test_what_is_one_for_all_models_is_not_read_under_a_model(tmp_path):
    text = THEIRS.replace("model: x", "model: x, parameters: {lambda: 0.5, normalize: false}")
    recipe = read(tmp_path, text)
    assert recipe.settings.expert_parameters == ()
    assert recipe.notes[1:3] == [
        f"line 3: 'models.0.parameters.{name}' is left out, as mergekit does not read it. It is "
        "one for all models, under 'parameters'."
        for name in ("lambda", "normalize")
    ]


def test_a_weight_under_karcher_is_not_read_by_mergekit(tmp_path):
    text = "merge_method: karcher\nmodels:\n- {model: x, parameters: {weight: 2}}\n- {model: y}\n"
    recipe = read(tmp_path, text)
    assert recipe.settings.expert_parameters == ()
    assert recipe.notes[0].endswith("does not read it. Its karcher has none.")
    ours = read(
        tmp_path,
        text.replace("model: y", "model: y, parameters: {weight: 1}") + "conventions: papers",
    )
    assert ours.settings.expert_parameters == ({"weight": 2}, {"weight": 1})


def test_what_mergekit_has_alone_names_what_is_near(tmp_path):
    told = refused(tmp_path, TIES.replace("ties", "ramplus_tl"))
    assert "line 1: 'ramplus_tl' is a method of mergekit that personae does not have." in told
    assert "Near to it is ties." in told


def test_under_mergekit_s_conventions_ours_serve_where_they_have_none():
    settings = MergeSettings(method="linear", conventions="mergekit")
    method = settings.merge_method()
    assert issubclass(method, MergeMethod) and method.name == "linear"


def test_a_required_parameter(tmp_path, thinned):
    told = refused(
        tmp_path, "merge_method: thinned\nconventions: papers\nbase_model: b\nmodels: [{model: x}]"
    )
    assert "thinned needs 'density'" in told
    filtered = MergeSettings(
        method="thinned", parameters={"density": [{"filter": "mlp", "value": 0.5}]}
    )
    told = "thinned: no filter of density matches the tensor 'attention'. Add an entry without"
    with pytest.raises(MethodError, match=told):
        filtered.for_tensor("attention", 2, 1)
    with pytest.raises(RecipeError, match="thinned needs a density for every tensor"):
        filtered.check(["x"])


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
